"""`explain`: which backend would serve a call, and why the others would not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from recmas_kernels.backends.call import Call
from recmas_kernels.backends.choice import load, order, refusal, requested
from recmas_kernels.config import LinkConfig
from recmas_kernels.devices import compute_dtype
from recmas_kernels.layers import why_not_plain

_Variants = Callable[[ModuleType], list[str]]


def explain(link: Any, x: torch.Tensor) -> str:
    """Which kernel would serve ``link(x)`` in the present grad mode, and why not the others.

    Args:
        link: a `FusedRecursiveLink` or a `FrozenLinear`. Of an eager `RecursiveLink`, which always runs as plain torch,
            and of any module with a ``config`` like its, it tells who would serve a fused link of this shape.
        x: ``[..., in_features]``, a floating-point tensor.

    Returns:
        A few lines per op. If something would learn, the backward op is explained as well.

    Raises:
        TypeError: no link, no tensor, or one of integers.
        ValueError: x does not fit the link.
    """
    own = getattr(type(link), "explain", None)
    if own is not None:  # a FrozenLinear's
        return str(own(link, x))
    config: Any = getattr(link, "config", None)
    if not isinstance(link, torch.nn.Module) or not isinstance(config, LinkConfig):
        raise TypeError(f"link is a {type(link).__name__}, expected a RecursiveLink")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a tensor")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected a floating-point dtype")
    if x.shape[-1:] != (config.in_features,):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {config.in_features}]")
    if config.layers == 1:
        return "a one-layer link runs as plain torch; no kernel is involved"
    reason = why_not_plain(link._modules, config) if isinstance(link, torch.nn.Module) else None
    if reason is not None:
        return f"the link runs as plain torch, through its layers: {reason}"
    dtype = compute_dtype(x)
    tokens = x.numel() // max(1, x.shape[-1])
    training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in link.parameters()))
    ops = ("link_fwd_train", "link_bwd") if training else ("link_fwd",)
    sizes = (tokens, config.in_features, config.hidden_features, config.out_features)
    calls = [Call(op, x.device.type, dtype, *sizes, training) for op in ops]

    def variants(call: Call, module: ModuleType) -> list[str]:
        lines = getattr(module, "variants", None)  # only a backend with several ways to serve a link has them
        return lines(call, config.residual, x.device) if lines is not None else []

    return "\n".join(explain_call(call, partial(variants, call)) for call in calls)


def explain_call(call: Call, variants: _Variants = lambda module: []) -> str:
    """One line per backend: whether it would serve ``call``, and if not, why not.

    ``variants(module)`` gives further lines about the backend that would.
    """
    shape = f"{call.tokens} x {call.in_features} -> {call.hidden_features} -> {call.out_features}"
    lines = [f"{call.op} {call.device} {str(call.dtype).removeprefix('torch.')} {shape}:"]
    name, chosen = requested(), None
    for candidate in order(call.device):
        reason = refusal(candidate, call)
        if reason is None and chosen is None and name in ("auto", candidate):
            chosen = candidate
            lines.append(f"  {candidate}: serves this call{_facts(candidate, call)}")
            lines += [f"    {line}" for line in variants(load(candidate))]
        elif reason is None:
            lines.append(f"  {candidate}: could serve it" + ("" if name == "auto" else f", but {name!r} was asked for"))
        else:
            lines.append(f"  {candidate}: {reason}")
    if chosen is None:
        lines.append(f"  error: {name!r} was asked for and does not serve it")
    return "\n".join(lines)


def _facts(name: str, call: Call) -> str:
    """What a backend's ``describe`` adds about a call that it serves, in brackets; nothing where it has none."""
    describe = getattr(load(name), "describe", None)
    facts = describe(call) if describe is not None else ""
    return f" ({facts})" if facts else ""
