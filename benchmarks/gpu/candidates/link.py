"""A link of the candidates' products between the package's own passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.gpu.candidates import gradients, products
from recmas_kernels.backends.triton import link, plan
from recmas_kernels.reference import LinkArguments

NAME = "candidate"


@contextmanager
def installed() -> Iterator[None]:
    """A block in which Triton serves every link by the candidates."""
    with (
        mock.patch.object(plan, "variant", return_value=NAME),
        mock.patch.dict(link.PRODUCTS, {NAME: _products}),
        mock.patch.dict(link.GRADIENTS, {NAME: _gradients}),
        mock.patch.dict(link.WEIGHT_GRADIENTS, {NAME: gradients.weight_gradients}),
    ):
        yield


def _products(
    arguments: LinkArguments, normed: Callable[..., Tensor], *, keep: bool
) -> tuple[Tensor, Tensor | None, None]:
    x, w1, b1, w2, b2, w3, b3 = arguments[:7]
    act, pre = products.up(normed(), w1, b1, arguments.gelu, keep=keep)
    return products.down(act, x.to(arguments.dtype), w2, b2, w3, b3, arguments.residual), pre, None


def _gradients(
    arguments: LinkArguments, around: Any, pre: Tensor, act: Tensor | None, *, need_du: bool, need_b1: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dpre, db1 = products.hidden_gradient(around.dz, arguments.w2, pre, act, arguments.gelu, sums=need_b1)
    if not need_du:
        return dpre, None, db1
    more = None if around.w3 is None else (around.dz, around.w3)
    addend = around.dz if around.residual == "identity" else None
    return dpre, products.input_gradient(dpre, arguments.w1, more=more, addend=addend), db1
