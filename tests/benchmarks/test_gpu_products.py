"""The product suite reaches past the dispatch: what it calls exists and fits."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from benchmarks.suites.gpu.test_bench_products import OURS, PAIRS, PLAIN, draw

pytest.importorskip("triton")

from benchmarks.gpu.candidates import gradients, products

FUNCTIONS = {
    "up": (products, "up"),
    "down": (products, "down"),
    "hidden gradient": (products, "hidden_gradient"),
    "input gradient": (products, "input_gradient"),
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
