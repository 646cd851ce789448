"""`fuse`: replace the eager links inside a model by fused ones that share their parameters."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from recmas_kernels.adapter_types import infer_config, with_eps_of
from recmas_kernels.config import NORM_NAMES
from recmas_kernels.fused_link import FusedRecursiveLink
from recmas_kernels.link import RecursiveLink

Module = TypeVar("Module", bound=nn.Module)
_CHECK_ROWS = 16
_LINK_CHILDREN = {"proj1", "proj2", "residual_proj", *NORM_NAMES["inner"], *NORM_NAMES["outer"]}


def fuse(module: Module) -> Module:
    """Replace every eager RecursiveLink inside ``module`` by a `FusedRecursiveLink` that shares its parameters.

    Links are ours (`RecursiveLink`) or the reference implementation's, recognised by their ``adapter_type`` and
    parameter names; each is compared with its replacement on random rows before the swap. Links whose layers are
    wrapped (PEFT, quantised or hooked Linears) are left alone and reported in a warning.

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
    wrapped = _wrapped(module, children)
    if wrapped is not None:
        warnings.warn(f"fuse: {name} is left as it is: {wrapped}", stacklevel=3)
        return None
    try:
        config = (
            module.config
            if isinstance(module, RecursiveLink)
            else infer_config(dict(module.named_parameters()), adapter_type)
        )
        config = with_eps_of(module, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    fused = FusedRecursiveLink(config, device="meta")
    fused._modules.clear()
    for child_name, child in children.items():  # in their own order: an optimiser's state is stored in it
        fused.add_module(child_name, child)
    fused.train(module.training)
    _compare(module, fused, name)
    return fused


def _wrapped(module: nn.Module, children: dict[str, nn.Module]) -> str | None:
    """Why the module's layers cannot be read directly; None if they are plain."""
    for child_name, child in children.items():
        if child_name in _LINK_CHILDREN:
            if type(child) not in (nn.Linear, nn.LayerNorm):
                return f"{child_name} is a {type(child).__module__}.{type(child).__qualname__}"
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return f"{child_name} has hooks"
        elif any(True for _ in child.parameters()):
            return f"it has parameters of its own in {child_name}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    return None


@torch.no_grad()
def _compare(eager: nn.Module, fused: FusedRecursiveLink, name: str) -> None:
    """Raise unless both give the same rows: within twice plain torch's own distance from float64, plus one eps."""
    weight = fused.proj1.weight
    if weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_CHECK_ROWS, fused.config.in_features, generator=generator).to(weight.device, weight.dtype)

    def plain(dtype: torch.dtype) -> RecursiveLink:
        link = RecursiveLink(fused.config, device=weight.device, dtype=dtype)
        link.load_state_dict({key: value.to(dtype) for key, value in fused.state_dict().items()})
        return link

    truth = plain(torch.float64)(rows.double())
    scale = truth.abs().max()

    def error(out: Tensor) -> Tensor:
        return (out.double() - truth).abs().max()

    budget = 2 * error(plain(weight.dtype)(rows)) + torch.finfo(weight.dtype).eps * scale
    if error(eager(rows)) > budget:
        raise ValueError(f"{name} does not compute what its type and parameters say; it is no known RecursiveLink")
    if error(fused(rows)) > budget:
        raise ValueError(f"the fused kernels differ from {name} by more than rounding on this machine")
