"""Fits find what made-up times were made of, and refuse what was not in them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness.scaling import Power, non_negative, whole


def noisy(times, rounds=9, seed=0):
    draw = np.random.default_rng(seed)
    return [list(time * draw.normal(1, 0.01, rounds)) for time in times]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_exponent_is_found_beside_an_offset(exponent):
    sizes = [64, 128, 256, 512, 1024]
    fit = Power.of(sizes, noisy([0.1 + 3 * (size / 64) ** exponent for size in sizes]))
    assert fit.exponent == pytest.approx(exponent, abs=0.08)
    assert fit.low <= exponent + 0.08
    assert fit.high >= exponent - 0.08
    assert fit.r2 > 0.995


def test_a_line_through_logarithms_would_be_bent_by_the_offset():
    sizes = [64, 128, 256, 512, 1024]
    times = [1.0 + size / 64 for size in sizes]
    bent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    assert bent < 0.85
    assert Power.of(sizes, noisy(times)).exponent == pytest.approx(1.0, abs=0.1)


def test_coefficients_are_never_negative():
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found, _ = non_negative(columns, np.array([3.0, 2.0, 1.0]))
    assert found.min() >= 0
    assert found[1] == 0


def test_whole_model_finds_its_terms_and_leaves_out_what_is_not_there():
    draw = np.random.default_rng(1)
    columns = np.stack([np.ones(40), draw.uniform(1, 9, 40), draw.uniform(1, 9, 40) ** 2], axis=1)
    terms, r2 = whole(["1", "a", "b"], columns, noisy(columns @ np.array([2.0, 3.0, 0.0])))
    assert [term.coefficient for term in terms] == pytest.approx([2.0, 3.0, 0.0], abs=0.15)
    assert r2 > 0.99
