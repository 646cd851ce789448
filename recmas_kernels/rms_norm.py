"""RMSNorms of any model in one kernel instead of eight operators, recognised by what they compute."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recmas_kernels.backends import cpu
from recmas_kernels.backends.choice import requested
from recmas_kernels.devices import autocast_enabled
from recmas_kernels.observed import observed
from recmas_kernels.own_forward import OwnForward
from recmas_kernels.watch import Watch

_EPS_NAMES = ("variance_epsilon", "eps")  # what modules call it
_ROWS = 4


def recognised(norm: nn.Module) -> tuple[float, float] | None:
    """``(offset, eps)`` of a frozen module on the CPU that computes ``x / sqrt(mean(x^2) + eps) (offset + weight)``.

    What it computes with random gains is compared with float64, element by element, so that no name and no present
    value decides; None for every other module, and for one whose ``forward`` takes more than the rows.
    """
    weight, eps = norm._parameters.get("weight"), _eps_of(norm)
    if not _has_a_norms_parts(norm) or weight is None or eps is None:
        return None
    if weight.dim() != 1 or weight.requires_grad or weight.device.type != "cpu" or not cpu.reads(weight.dtype):
        return None
    if cpu.unavailable() is not None or not _takes_rows_alone(type(norm).forward):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    gains = torch.randn(weight.shape, generator=generator, device="cpu").to(weight.dtype)
    rows = torch.randn(_ROWS, weight.shape[0], generator=generator, device="cpu") + 0.5
    rows[::2] *= eps**0.5  # where eps weighs as much as the row
    rows = rows.to(weight.dtype)
    found = _computed(norm, gains, rows)
    if found is None or found.shape != rows.shape or found.dtype is not weight.dtype:
        return None
    unit = rows.double() * torch.rsqrt(rows.double().square().mean(dim=-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        exact = unit * (offset + gains.double())
        if bool(((found.double() - exact).abs() <= 4 * torch.finfo(weight.dtype).eps * exact.abs()).all()):
            return offset, eps
    return None


def _has_a_norms_parts(module: nn.Module) -> bool:
    alone = module._parameters.keys() == {"weight"} and not module._modules and not module._buffers
    return alone and _eps_of(module) is not None


def _takes_rows_alone(forward: Any) -> bool:
    _, *taken = inspect.signature(forward).parameters.values()
    return len(taken) == 1 and taken[0].kind in (taken[0].POSITIONAL_ONLY, taken[0].POSITIONAL_OR_KEYWORD)


def _computed(norm: nn.Module, gains: Tensor, rows: Tensor) -> Tensor | None:
    """What the module's class makes of ``rows`` with these gains; the module itself is not touched."""
    probe: nn.Module = object.__new__(type(norm))
    probe.__dict__.update(norm.__dict__)
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(gains, requires_grad=False)}
    with torch.no_grad(), _WithoutChance():
        try:
            found = type(norm).forward(probe, rows)
        except Exception:  # a module of another kind, which draws random numbers or takes rows of another shape
            return None
    return found if isinstance(found, Tensor) else None


class _WithoutChance(TorchDispatchMode):
    """Operators that draw random numbers raise on this thread: a state put back afterwards is every thread's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError("it draws random numbers")
        return func(*args, **(kwargs or {}))


class NormKernel(OwnForward):
    """The ``forward`` of one recognised norm: one kernel, where no gradient is asked for and nothing observes.

    A norm that was changed since, in any attribute, mode, parameter or function of its class, is looked at again; one
    that computes something else now runs as its class says.

    Attributes:
        computes: ``(offset, eps)``, as for `recognised`.
    """

    computes: tuple[float, float] | None = None
    _dtype: torch.dtype | None = None
    _watch: Watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1 and not torch.compiler.is_compiling():
            y = self._served(args[0])
            if y is not None:
                return y
        return type(self.module).forward(self.module, *args, **kwargs)

    def _served(self, x: Any) -> Tensor | None:
        weight = self.module._parameters.get("weight")
        if type(x) is not Tensor or not x.is_cpu or observed() or x.is_neg() or x._is_zerotensor() or weight is None:
            return None
        if x.dtype is not weight.dtype or x.shape[-1:] != weight.shape or type(weight) not in (Tensor, nn.Parameter):
            return None
        learns = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
        if learns or not (weight.is_cpu and weight.is_contiguous()) or weight.is_neg() or autocast_enabled("cpu"):
            return None
        if weight.dtype is not self._dtype or not self._watch.unchanged():
            self.look()
        if self.computes is None or requested() not in ("auto", "cpu"):
            return None
        return cpu.rms_norm(x, weight, *self.computes)

    def look(self) -> bool:
        if not _has_a_norms_parts(self.module):  # most modules of a model: a watch of each would take 0.4 ms
            self.computes, self._dtype = None, None  # looked at again by the next call
            return False
        watch = Watch(self.module)  # first: what changes from here on is seen
        self.computes = recognised(self.module)  # before the watch, for threads that find the norm unchanged meanwhile
        weight = self.module._parameters.get("weight")
        self._dtype, self._watch = None if weight is None else weight.dtype, watch
        return self.computes is not None


def _eps_of(norm: nn.Module) -> float | None:
    found = (getattr(norm, name, None) for name in _EPS_NAMES)
    return next((eps for eps in found if isinstance(eps, float)), None)
