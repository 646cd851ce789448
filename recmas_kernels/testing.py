"""For tests and benchmarks of links: reproducible inputs, the float64 oracle and the error budget.

Errors are relative: the largest error over the largest element of the float64 result. What a link may lose follows from
its arithmetic, see `Noise`. Where a test has no such figure, four times what eager torch loses in the same dtype is
allowed, and at least four eps of it: how far below that eager stays is luck, which differs by processor. Whatever
exceeds its budget raises AssertionError, which reports eager's error as well.
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

    def named(self) -> dict[str, Tensor]:
        """All of them, by what an error message calls them."""
        return {"y": self.y, **{f"gradient of {name}": grad for name, grad in self.grads.items()}}


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


_SUMMED_ALONE = 32  # rows that a column sum adds one by one, before it adds the sums of such groups


class Noise:
    """The error that rounding may cause in each result of a link, from float64 alone.

    A link rounds its rows at nine places, four forward and five backward, each time by at most half of an eps of the
    compute dtype. Moving every input and parameter by one eps, up or down at random, shows in float64 what rounding
    does to each result, conditioning and cancellation included: nine independent roundings of half that size come to
    1.5 times this, and the largest of many errors to a little more than the largest of three samples, so 2 are allowed.
    Sums are formed in float32: one of n terms loses about sqrt(n) / 2 of its eps. The longest are the products', and
    the weight gradients' over the tokens; column sums (of biases and gains) add groups of rows, which is shorter.
    """

    _SAMPLES = 3

    def __init__(self, link: RecursiveLink, x: Tensor, dy: Tensor, dtype: torch.dtype) -> None:
        exact = eager_twin(link, torch.float64)
        self.truth = run(exact, x.double(), dy.double())
        tokens = x.numel() // max(1, x.shape[-1])
        config = link.config
        widest = max(config.in_features, config.hidden_features, config.out_features)
        eps = torch.finfo(dtype).eps
        samples = []
        for seed in range(self._SAMPLES):
            generator = torch.Generator().manual_seed(seed)
            moved = eager_twin(link, torch.float64)
            with torch.no_grad():
                for parameter in moved.parameters():
                    parameter.copy_(_nudged(parameter, eps, generator))
            samples.append(run(moved, _nudged(x, eps, generator), _nudged(dy, eps, generator)).named())
        self.bounds: dict[str, float] = {}
        for name, truth in self.truth.named().items():
            rounding = max(relative_error(sample[name], truth) for sample in samples)
            columns = truth.dim() == 1  # the gradient of a bias or of a gain
            longest = max(widest, _SUMMED_ALONE + tokens // _SUMMED_ALONE if columns else tokens)
            self.bounds[name] = 2 * rounding + longest**0.5 / 2 * torch.finfo(torch.float32).eps

    def check(self, actual: Results, eager: Results) -> None:
        """AssertionError naming the first result that is not finite or beyond its bound."""
        for name, truth in self.truth.named().items():
            found, peer = actual.named()[name], eager.named()[name]
            _expect_finite(name, found, truth)
            error = relative_error(found, truth)
            if error > self.bounds[name]:
                raise AssertionError(
                    f"{name}: error {error:.3e} exceeds the bound {self.bounds[name]:.3e} of its arithmetic; "
                    f"eager's is {relative_error(peer, truth):.3e}"
                )


def _nudged(tensor: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Every element of a float64 copy one eps away, up or down at random."""
    signs = torch.randint(0, 2, tensor.shape, generator=generator).double() * 2 - 1
    return tensor.detach().double() * (1 + eps * signs.to(tensor.device))


def _expect_finite(what: str, actual: Tensor, truth: Tensor) -> None:
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if not torch.isfinite(actual).all():
        raise AssertionError(f"{what}: not finite")


def check_budget(what: str, actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """AssertionError naming ``what`` unless ``actual`` is finite and within the budget that ``eager`` gives."""
    _expect_finite(what, actual, truth)
    error, peer = relative_error(actual, truth), relative_error(eager, truth)
    budget = 4 * max(peer, torch.finfo(dtype).eps)
    if error > budget:
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {budget:.3e}; eager's is {peer:.3e}")


def check_link(link: FusedRecursiveLink, x: Tensor, dy: Tensor) -> Results:
    """Run the fused link and check y and every gradient against their bounds. Returns the fused results."""
    dtype = x.dtype
    eager, fused = run(eager_twin(link, dtype), x, dy), run(link, x, dy)
    Noise(link, x, dy, dtype).check(fused, eager)
    for name, grad in fused.grads.items():
        if grad.dtype != dtype:
            raise AssertionError(f"gradient of {name}: dtype {grad.dtype}, expected {dtype}")
    return fused


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every ``torch.empty`` and ``new_empty`` with NaN, so that an unwritten element shows.

    CPU kernels may have scratch memory of an earlier call; inside of ``backends.cpu.fresh_scratch()`` they have not.
    """
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
