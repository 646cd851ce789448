"""`fuse`: replace the eager links inside a model by fused ones that share their parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from recmas_kernels.adapter_types import infer_config, with_eps_of
from recmas_kernels.config import NORM_NAMES, LinkConfig
from recmas_kernels.fused_link import FusedRecursiveLink
from recmas_kernels.layers import has_hooks, why_not_plain
from recmas_kernels.link import RecursiveLink

Module = TypeVar("Module", bound=nn.Module)
_CHECK_ROWS = 16
_LINK_CHILDREN = {"proj1", "proj2", "residual_proj", *NORM_NAMES["inner"], *NORM_NAMES["outer"]}


def fuse(module: Module) -> Module:
    """Replace every eager RecursiveLink inside ``module`` by a `FusedRecursiveLink` that shares its parameters.

    Links are ours (`RecursiveLink` itself, no subclass) or the reference implementation's, recognised by their
    ``adapter_type`` and parameter names; each is compared with its replacement on random rows before the swap. A link
    that carries more than its replacement would (a subclass, layers that are not plain, gates, buffers, hooks, dropout)
    is left alone and reported in a warning. Plain attributes move along.

    Args:
        module: any module; a link at the root is replaced too.

    Returns:
        ``module``, changed in place; the fused link itself when ``module`` is a link.

    Raises:
        TypeError: no module.
        ValueError: a link's attributes and parameters do not determine its type, or its results differ.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.Module")
    replaced: dict[nn.Module, nn.Module] = {}
    for name, child in list(module.named_modules()):
        fused = _fused(child, name or type(child).__name__)
        if fused is not None:
            replaced[child] = fused
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children would leave out a second name of a link
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(module, module)  # type: ignore[return-value]


def _fused(module: nn.Module, name: str) -> FusedRecursiveLink | None:
    if isinstance(module, FusedRecursiveLink):
        return None
    adapter_type = getattr(module, "adapter_type", None)
    children = dict(module.named_children())
    if not isinstance(module, RecursiveLink):
        norms = any({a, b} <= children.keys() for a, b in NORM_NAMES.values())
        if "proj1" not in children or not (isinstance(adapter_type, str) or ("proj2" in children and norms)):
            return None
        if not isinstance(adapter_type, str):
            raise ValueError(
                f"{name} has the parameters of a RecursiveLink but no adapter_type, which names its residual"
            )
    reason = _carries_more(module, children)
    if reason is None:
        try:
            config = _config(module, adapter_type)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        reason = None if config.layers == 1 else why_not_plain(children, config)
    if reason is not None:
        warnings.warn(f"fuse: {name} is left as it is: {reason}", stacklevel=3)
        return None
    fused = FusedRecursiveLink(config, device="meta")
    fused._modules.clear()
    for child_name, child in module._modules.items():  # in their own order: an optimiser's state is stored in it
        fused.add_module(child_name, child)
    held = {key: value for key, value in module.__dict__.items() if key not in fused.__dict__}
    held.pop("_compiled_call_impl", None)  # a call of the module that is replaced
    fused.__dict__.update(held)
    fused.training = module.training
    _compare(module, fused, name)
    return fused


def _config(module: nn.Module, adapter_type: str | None) -> LinkConfig:
    if isinstance(module, RecursiveLink):
        return with_eps_of(module, module.config)
    return with_eps_of(module, infer_config(dict(module.named_parameters()), adapter_type))


def _carries_more(module: nn.Module, children: dict[str, nn.Module]) -> str | None:
    """What the module has that a fused link would drop; None if nothing."""
    if isinstance(module, RecursiveLink) and type(module) is not RecursiveLink:
        return f"it is a {type(module).__module__}.{type(module).__qualname__}, whose forward may be another"
    if any(hooks for key, hooks in module.__dict__.items() if key.endswith("_hooks")):
        return "it has hooks"
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if module._parameters:
        return f"it has a parameter {next(iter(module._parameters))} of its own"
    if module._buffers:
        return f"it has a buffer {next(iter(module._buffers))} of its own"
    for name, child in children.items():
        if name in _LINK_CHILDREN:
            if type(child) not in (nn.Linear, nn.LayerNorm):
                return f"{name} is a {type(child).__module__}.{type(child).__qualname__}"
        elif isinstance(child, nn.modules.dropout._DropoutNd):
            if child.p > 0:
                return f"{name} drops values in training"
        elif any(True for _ in (*child.parameters(), *child.buffers())):
            return f"it has parameters of its own in {name}"
        elif has_hooks(child) or "forward" in child.__dict__:
            return f"{name} has hooks"
    return None


@contextmanager
def _trained(module: nn.Module) -> Iterator[None]:
    """In training mode, in which a link must compute the same; afterwards each part has its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.train()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def _compare(eager: nn.Module, fused: FusedRecursiveLink, name: str) -> None:
    """Raise unless both give the same rows: within twice plain torch's own distance from float64, plus one eps."""
    weight = fused.proj1.weight
    if weight.device.type == "meta":
        return
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(_CHECK_ROWS, fused.config.in_features, generator=generator, device="cpu")
    rows = rows.to(weight.device, weight.dtype)

    def plain(dtype: torch.dtype) -> RecursiveLink:
        link = RecursiveLink(fused.config, device=weight.device, dtype=dtype)
        link.load_state_dict({key: value.to(dtype) for key, value in fused.state_dict().items()})
        return link

    truth = plain(torch.float64)(rows.double())
    scale = truth.abs().max()

    def error(out: Tensor) -> Tensor:
        return (out.double() - truth).abs().max()

    budget = 2 * error(plain(weight.dtype)(rows)) + torch.finfo(weight.dtype).eps * scale
    with _trained(eager):
        in_training = eager(rows)
    if error(eager(rows)) > budget or error(in_training) > budget:
        raise ValueError(f"{name} does not compute what its type and parameters say; it is no known RecursiveLink")
    if error(fused(rows)) > budget:
        raise ValueError(f"the fused kernels differ from {name} by more than rounding on this machine")
