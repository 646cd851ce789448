"""Which kernel serves which call: the whole dispatch, as one readable table.

A backend is a module with ``unavailable() -> reason | None`` (can it work on this machine at all?), ``declines(call)
-> reason | None`` (does it take this call?) and one function per op, named and shaped as the op. Both answers depend
on nothing that changes while a process runs, so choices are remembered. For `explain` it may add ``describe(call) ->
facts`` and, with several ways to serve a link, ``variants(call, residual, norm, device) -> lines``. The reference takes
everything. This package and its modules are the only readers of ``RECMAS_*`` variables at run time.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from types import ModuleType

# Tried in this order for tensors on a device; the first that is available and does not decline serves the call.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
ELSEWHERE = ("reference",)
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
_MODULES = {
    "reference": "recmas_kernels.reference",
    "cpu": "recmas_kernels.backends.cpu",
    "cuda": "recmas_kernels.backends.cuda",
    "triton": "recmas_kernels.backends.triton",
}


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message says why."""


class Call(NamedTuple):
    """What the choice of a kernel depends on. Sizes count elements; ``hidden_features`` is 0 for the row ops."""

    op: str
    device: str
    dtype: torch.dtype
    tokens: int
    in_features: int
    hidden_features: int
    out_features: int
    training: bool


@dataclass(eq=False)
class _Request:
    name: str


_forced: list[_Request] = []


def setting(name: str) -> str | None:
    """``os.environ.get(name)``, which alone takes 0.6 us to find out that a variable is absent; this takes 0.15 us."""
    environment: Any = os.environ
    try:
        if environment.encodekey(name) not in environment._data:
            return None
    except AttributeError:  # another mapping than CPython's own
        pass
    return environment.get(name)


def requested() -> str:
    """The backend asked for: the innermost ``use_backend``, else ``RECMAS_BACKEND``, else "auto"."""
    return _known(_forced[-1].name if _forced else setting("RECMAS_BACKEND") or "auto")


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the block with ``name`` ("auto", "reference", "cpu", "cuda" or "triton").

    A named backend never falls back: a call that it cannot serve raises `BackendUnavailableError` with the reason.
    The choice holds for the whole process, since backward passes run on threads of autograd's own; of several threads'
    blocks the one begun last holds.
    """
    request = _Request(_known(name))
    _forced.append(request)
    try:
        yield
    finally:
        # By identity: another thread's block may have begun after this one and not ended yet.
        _forced[:] = [other for other in _forced if other is not request]


@cache
def load(name: str) -> ModuleType:
    """The module of a backend. Importing it loads nothing compiled."""
    return importlib.import_module(_MODULES[name])


def refusal(name: str, call: Call) -> str | None:
    """Why backend ``name`` does not serve ``call``; None if it does."""
    if name == "reference":
        return None
    if name not in ORDER.get(call.device, ELSEWHERE):
        return f"it does not serve {call.device} tensors"
    try:
        module = load(name)
    except ModuleNotFoundError as error:
        if error.name != _MODULES[name]:
            raise
        return "this build does not contain it"
    return module.unavailable() or module.declines(call)


def check_slot_rows(slot_rows: torch.Tensor, table_rows: int) -> None:
    """Under ``RECMAS_CHECK=1``: raise ValueError unless the rows are unique and inside ``[0, table_rows)``.

    Not otherwise, since on an accelerator it waits for the device.
    """
    if setting("RECMAS_CHECK") != "1" or slot_rows.numel() == 0:
        return
    if slot_rows.unique().numel() != slot_rows.numel():
        raise ValueError("slot_rows names a row more than once")
    if slot_rows.min() < 0 or slot_rows.max() >= table_rows:
        raise ValueError(f"slot_rows names rows outside [0, {table_rows})")


def expect_reference(what: str) -> None:
    """Raise BackendUnavailableError if kernels were asked for by name where only plain torch can serve ``what``."""
    name = requested()
    if name not in ("auto", "reference"):
        raise BackendUnavailableError(f"backend {name!r} cannot serve {what}: plain torch does, by use_backend('auto')")


def choose(op: str, call: Call) -> ModuleType:
    """The backend module that serves ``call``, by the table and the user's request."""
    return _serving(requested(), op, call, ORDER.get(call.device, ELSEWHERE))


@lru_cache(maxsize=4096)
def _serving(name: str, op: str, call: Call, order: tuple[str, ...]) -> ModuleType:
    if name != "auto":
        reason = refusal(name, call)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend {name!r} cannot serve {op} on {call.device} in {call.dtype}: {reason}; "
                "use_backend('auto') chooses one that can"
            )
        return load(name)
    for candidate in order:
        if refusal(candidate, call) is None:
            return load(candidate)
    raise AssertionError("the reference backend takes every call")


def _how(name: str, call: Call) -> str:
    """What a backend has to add about a call that it serves: `` (facts)`` of its ``describe``, where it has one."""
    describe = getattr(load(name), "describe", None)
    facts = describe(call) if describe is not None else ""
    return f" ({facts})" if facts else ""


def explain_call(call: Call, variants: Callable[[ModuleType], list[str]] = lambda module: []) -> str:
    """One line per backend: whether it would serve ``call``, and if not, why not; ``variants`` of the one that does."""
    shape = f"{call.tokens} x {call.in_features} -> {call.hidden_features} -> {call.out_features}"
    lines = [f"{call.op} {call.device} {str(call.dtype).removeprefix('torch.')} {shape}:"]
    name, chosen = requested(), None
    for candidate in ORDER.get(call.device, ELSEWHERE):
        reason = refusal(candidate, call)
        if reason is None and chosen is None and name in ("auto", candidate):
            chosen = candidate
            lines.append(f"  {candidate}: serves this call{_how(candidate, call)}")
            lines += [f"    {line}" for line in variants(load(candidate))]
        elif reason is None:
            lines.append(f"  {candidate}: could serve it" + ("" if name == "auto" else f", but {name!r} was asked for"))
        else:
            lines.append(f"  {candidate}: {reason}")
    if chosen is None:
        lines.append(f"  error: {name!r} was asked for and does not serve it")
    return "\n".join(lines)


def is_plain_link(residual: str, mixed: bool, *tensors: torch.Tensor | None) -> bool:
    """Whether x and a link's ten parameters need neither a closer look nor a conversion; False if that is not known.

    Any device; asks the compiled CPU module, which reads all of them in 0.4 us. ``mixed``: see `cpu.is_plain_link`.
    """
    return load("cpu").is_plain_link(residual, mixed, *tensors)


_has_autocast = cache(torch.amp.is_autocast_available)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; False for devices that have none, such as "meta"."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def reads_at_once(tensor: torch.Tensor) -> bool:
    """Whether the host can look at a value without waiting for a device."""
    return tensor.device.type == "cpu"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a link computes in: autocast's where it is on (it leaves float64 alone), else x's."""
    device_type = x.device.type
    if autocast_enabled(device_type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def explain(link: Any, x: torch.Tensor) -> str:
    """Which kernel would serve ``link(x)`` in the present grad mode, and why not the others.

    ``link`` is a `RecursiveLink` (or anything with its ``config``); ``x`` is ``[..., in_features]``. Under grad the
    backward op is explained as well.

    Raises:
        TypeError: no link, no tensor, or one of integers.
        ValueError: x does not fit the link.
    """
    config: Any = getattr(link, "config", None)
    if not hasattr(config, "in_features"):
        raise TypeError(f"link is a {type(link).__name__}, expected a RecursiveLink")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected a floating-point dtype")
    if x.shape[-1:] != (config.in_features,):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {config.in_features}]")
    if config.layers == 1:
        return "a one-layer link runs as plain torch; no kernel is involved"
    dtype = compute_dtype(x)
    tokens = x.numel() // max(1, x.shape[-1])
    training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in link.parameters()))
    ops = ("link_fwd_train", "link_bwd") if training else ("link_fwd",)
    sizes = (tokens, config.in_features, config.hidden_features, config.out_features)
    calls = [Call(op, x.device.type, dtype, *sizes, training) for op in ops]

    def variants(call: Call, module: ModuleType) -> list[str]:
        lines = getattr(module, "variants", None)  # only a backend with several ways to serve a link has them
        return lines(call, config.residual, config.norm, x.device) if lines is not None else []

    return "\n".join(explain_call(call, partial(variants, call)) for call in calls)
