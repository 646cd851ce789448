"""The bounds of `recmas_kernels.testing`: sound arithmetic keeps them, and a sum that loses accuracy breaks them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recmas_kernels import FusedRecursiveLink, LinkConfig, use_backend
from recmas_kernels.testing import LOW_PRECISION, Noise, Results, eager_twin, make_link, make_rows, name_of, run


def noise_and_results(link: FusedRecursiveLink, x: torch.Tensor, dy: torch.Tensor) -> tuple[Noise, Results]:
    with use_backend("reference"):
        results = run(link, x, dy)
    noise = Noise(link, x, dy, x.dtype)
    noise.check(results, run(eager_twin(link, x.dtype), x, dy))
    return noise, results


def one_by_one(rows: torch.Tensor) -> torch.Tensor:
    """The sum of the rows in their own dtype, each added to what came before it."""
    if rows.dtype == torch.float32:
        return torch.from_numpy(np.add.accumulate(rows.numpy(), axis=0)[-1])
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


def product_one_by_one(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x weight^T``, accumulated in ``dtype``."""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=dtype)
    for column in range(x.shape[1]):
        total += x[:, column : column + 1].to(dtype) * weight[:, column].to(dtype)
    return total.to(x.dtype)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 2**16), (torch.bfloat16, 2048), (torch.float16, 2**13)])
def test_a_long_sum_one_by_one_breaks_the_bound(dtype, tokens):
    link = make_link(LinkConfig("outer", 4, 4, 4, "none", norm=False), dtype)
    x, dy = make_rows(tokens, 4, dtype=dtype), torch.full((tokens, 4), 0.1, dtype=dtype)
    noise, results = noise_and_results(link, x, dy)
    results.grads["proj2.bias"] = one_by_one(dy)
    with pytest.raises(AssertionError, match=r"gradient of proj2\.bias: error .* exceeds the bound .* eager's is"):
        noise.check(results, results)


@pytest.mark.parametrize("accumulator", [torch.float16, torch.bfloat16], ids=name_of)
def test_products_accumulated_in_16_bits_break_the_bound(accumulator):
    link = make_link(LinkConfig("outer", 64, 64, 64, "none", norm=False, bias=False))
    x, dy = make_rows(7, 64), make_rows(7, 64, seed=2)
    noise, results = noise_and_results(link, x, dy)
    hidden = F.gelu(product_one_by_one(x, link.proj1.weight.detach(), accumulator))
    results.y = product_one_by_one(hidden, link.proj2.weight.detach(), accumulator)
    with pytest.raises(AssertionError, match="y: error"):
        noise.check(results, results)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_values_rounded_once_more_than_the_arithmetic_says(dtype):
    """One eps in y alone, at its largest element, is noise; sixteen are not."""
    link = make_link(LinkConfig("inner", 16, 16, 16, "identity", norm=False), dtype)
    x, dy = make_rows(5, 16, dtype=dtype), make_rows(5, 16, dtype=dtype, seed=2)
    noise, results = noise_and_results(link, x, dy)
    eps = torch.finfo(dtype).eps
    exact = noise.truth.y
    noise.check(Results(exact * (1 + eps), results.grads), results)
    with pytest.raises(AssertionError, match="y: error"):
        noise.check(Results(exact * (1 + 16 * eps), results.grads), results)


def test_nan_and_other_shapes_are_named():
    link = make_link(LinkConfig("inner", 8, 8, 8, "identity"))
    x, dy = make_rows(3, 8), make_rows(3, 8, seed=2)
    noise, results = noise_and_results(link, x, dy)
    with pytest.raises(AssertionError, match="y: not finite"):
        noise.check(Results(torch.full_like(results.y, float("nan")), results.grads), results)
    with pytest.raises(AssertionError, match=r"y: shape \(2, 8\), expected \(3, 8\)"):
        noise.check(Results(results.y[:2], results.grads), results)
