"""Bad arguments of `recursive_link` are named before any kernel runs."""

from __future__ import annotations

import pytest
import torch

from recmas_kernels import recursive_link

VALID = {"x": (2, 8), "w1": (6, 8), "w2": (8, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7)}, r"x has shape \(2, 7\), expected \[\.\.\., 8\]"),
        ({"w2": torch.zeros(8, 5)}, r"w2 has shape \(8, 5\), expected \(8, 6\)"),
        ({"w1": torch.zeros(6)}, "w1 and w2 must have two dimensions"),
        ({"b1": torch.zeros(8)}, r"b1 has shape \(8,\), expected \(6,\)"),
        ({"b2": torch.zeros(6)}, "b2 has shape"),
        ({"norm_in": (torch.zeros(6), None)}, "norm_in weight has shape"),
        ({"norm_out": (torch.zeros(8), torch.zeros(6))}, "norm_out bias has shape"),
        ({"norm_in": (None, torch.zeros(8))}, "norm_in has no weight"),
        ({"norm_out": (None, None)}, "norm_out has no weight"),
        ({"residual": "gated"}, "residual is 'gated', expected one of identity, linear, none"),
        ({"residual": "linear"}, "w3 is missing with residual='linear'"),
        ({"w3": torch.zeros(8, 8)}, "w3 is given with residual='identity'"),
        ({"b3": torch.zeros(8)}, "b3 is given without w3"),
        ({"w2": torch.zeros(5, 6)}, "needs in_features == out_features, got 8 and 5"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"x": torch.zeros(2, 8, dtype=torch.bfloat16)}, "x has dtype torch.bfloat16 and w1 has torch.float32"),
        ({"w1": torch.zeros(6, 8, device="meta")}, "x is on cpu and w1 is on meta"),
    ],
)
def test_bad_input_is_named_before_any_kernel_runs(change, message):
    call = {name: torch.zeros(shape) for name, shape in VALID.items()}
    with pytest.raises(ValueError, match=message):
        recursive_link(**{**call, **change})


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="x is a list, expected a tensor"):
        recursive_link([[0.0] * 8], torch.zeros(6, 8), torch.zeros(8, 6))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        recursive_link(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(6, 8), torch.zeros(8, 6))
