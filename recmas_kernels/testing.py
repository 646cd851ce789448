"""For tests and benchmarks of links: reproducible inputs, the float64 oracle and the error budget.

A result is within the budget if its largest error, relative to the largest element of the float64 result, is at most
twice that of eager torch in the same dtype, plus one eps of the dtype. Whatever exceeds it raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from recmas_kernels.config import LinkConfig
from recmas_kernels.fused_link import FusedRecursiveLink
from recmas_kernels.link import RecursiveLink

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def configs() -> dict[str, LinkConfig]:
    """Every kind of link of the mathematics, at sizes that divide nothing."""
    return {
        "inner": LinkConfig("inner", 40, 40, 40, "identity"),
        "inner-equation-3": LinkConfig("inner", 40, 23, 40, "identity", norm=False, bias=False),
        "outer": LinkConfig("outer", 40, 46, 23, "linear"),
        "outer-equation-4": LinkConfig("outer", 23, 8, 40, "linear", norm=False),
        "no-residual": LinkConfig("outer", 23, 40, 17, "none", bias=False),
        "tanh": LinkConfig("inner", 17, 33, 17, "identity", activation="gelu_tanh"),
    }


def make_link(config: LinkConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> FusedRecursiveLink:
    """A fused link on the CPU with every parameter random, norm gains (around 1) and biases included."""
    generator = torch.Generator().manual_seed(seed)
    link = FusedRecursiveLink(config, dtype=dtype)
    for name, parameter in link.named_parameters():
        is_gain = parameter.dim() == 1 and name.endswith("weight")
        scale = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        values = torch.randn(parameter.shape, generator=generator) * (0.2 if is_gain else scale) + is_gain
        parameter.data.copy_(values)
    return link


def make_rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Standard normal numbers ``[*shape]`` on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass
class Results:
    """What `run` returns: ``y`` and the gradient of every input, by name ("x" and the parameters' names)."""

    y: Tensor
    grads: dict[str, Tensor]


def run(link: RecursiveLink, x: Tensor, dy: Tensor) -> Results:
    """``link(x)`` and all gradients for the incoming gradient ``dy``, which is shaped as ``y``."""
    x = x.detach().requires_grad_()
    names, parameters = zip(*link.named_parameters(), strict=True)
    y = link(x)
    grads = torch.autograd.grad(y, (x, *parameters), dy.to(y.dtype))
    return Results(y.detach(), dict(zip(("x", *names), grads, strict=True)))


def eager_twin(link: RecursiveLink, dtype: torch.dtype) -> RecursiveLink:
    """The plain module with ``link``'s parameters in ``dtype``, on its device."""
    twin = RecursiveLink(link.config, device=link.proj1.weight.device, dtype=dtype)
    twin.load_state_dict({key: value.to(dtype) for key, value in link.state_dict().items()})
    return twin


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """``max|actual - truth| / max|truth|``; 0 for no elements."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - truth).abs().max() / scale).item()


def check_budget(what: str, actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """AssertionError naming ``what`` unless ``actual`` is finite and within the budget of ``eager`` in ``dtype``."""
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{what}: not finite")
    error, budget = relative_error(actual, truth), 2 * relative_error(eager, truth) + torch.finfo(dtype).eps
    if error > budget:
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {budget:.3e}")


def check_link(link: FusedRecursiveLink, x: Tensor, dy: Tensor) -> Results:
    """Run the fused link and check y and every gradient against the budget. Returns the fused results."""
    dtype = x.dtype
    truth = run(eager_twin(link, torch.float64), x.double(), dy.double())
    eager, fused = run(eager_twin(link, dtype), x, dy), run(link, x, dy)
    check_budget("y", fused.y, eager.y, truth.y, dtype)
    for name, grad in truth.grads.items():
        check_budget(f"gradient of {name}", fused.grads[name], eager.grads[name], grad, dtype)
        if fused.grads[name].dtype != dtype:
            raise AssertionError(f"gradient of {name}: dtype {fused.grads[name].dtype}, expected {dtype}")
    return fused


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every ``torch.empty`` and ``new_empty`` with NaN, workspaces too, so that an unwritten element shows."""
    empty, new_empty, empty_like = torch.empty, Tensor.new_empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:  # all ones is NaN in every floating type
            return tensor.fill_(255)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
        mock.patch.object(Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k))),
    ):
        yield
