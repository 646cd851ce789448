"""The product suite reaches past the dispatch: what it calls exists, fits, and can be tuned apart."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

from benchmarks.harness.gpu.tuned import Tuned
from benchmarks.suites.gpu.test_bench_products import OURS, PAIRS, PLAIN, draw

pytest.importorskip("triton")

from recmas_kernels.backends.triton import gradients, matmul, tuning

FUNCTIONS = {
    "up": (matmul, "up"),
    "down": (matmul, "down"),
    "hidden gradient": (matmul, "hidden_gradient"),
    "input gradient": (matmul, "input_gradient"),
    "weight gradients": (gradients, "weight_gradients"),
}


@pytest.mark.parametrize("kind", OURS)
def test_our_calls_fit_the_functions(kind: str) -> None:
    module, name = FUNCTIONS[kind]
    with mock.patch.object(module, name, autospec=True) as function:
        OURS[kind](draw(4, torch.device("cpu"), seed=0))
    function.assert_called_once()


@pytest.mark.parametrize("kind", [kind for kind in PAIRS if kind in ("down", "input gradient", "weight gradients")])
def test_the_librarys_products_are_the_same_products(kind: str) -> None:
    """Those without GELU: the pairs multiply to what plain torch computes."""
    given = {name: tensor.double() for name, tensor in draw(4, torch.device("cpu"), seed=0).items()}
    products = torch.cat([(left @ right).flatten() for left, right in PAIRS[kind](given)])
    torch.testing.assert_close(products, PLAIN[kind](given).flatten())


def test_what_the_tuner_finds_out_stays_inside() -> None:
    tuned, device = Tuned(), torch.device("cuda", 0)
    seen: list[tuple[str | None, str | None]] = []
    place = ("tile", 0, "key")

    def call() -> None:
        seen.append((os.environ.get("RECMAS_TUNE"), tuning.recall("tile", ["key"], device)))
        tuning._recalled[place] = "128 x 256"

    with (
        mock.patch.dict(tuning._recalled, {place: None}, clear=True),
        mock.patch.object(tuning, "_answers_for", return_value=(None, {})),
    ):
        tuned(call)
        tuned(call)
        assert tuning._recalled == {place: None}
    assert seen == [("1", None), ("1", "128 x 256")]
    assert tuned.answers == {place: "128 x 256"}
