"""`RecursiveLink`, the link as an eager torch module: the peer that every kernel is measured against."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels import checkpoint
from recmas_kernels.adapter_types import with_eps_of
from recmas_kernels.config import ACTIVATIONS, NORM_NAMES, LinkConfig

if TYPE_CHECKING:
    from typing_extensions import Self


def _check_device(device: torch.device | str | None) -> None:
    """Raise ValueError or TypeError for what torch knows no device by."""
    try:
        torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {device!r}: {reason}") from None


def _expect_like(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the first key of a link's state that differs from those ``expected`` in a link like it."""
    for key in sorted(expected.keys() ^ state.keys()):
        problem = "missing" if key in expected else "not expected"
        raise ValueError(f"key {key!r} is {problem} in a link of this shape")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ValueError(f"key {key!r} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}")
        if not state[key].is_floating_point():
            raise ValueError(f"key {key!r} has dtype {state[key].dtype}, expected a floating-point dtype")


class RecursiveLink(nn.Module):
    """A RecursiveLink in plain torch, with the parameter names of the reference implementation.

    ``norm_out(r + proj2(gelu(proj1(norm_in(x)))))``, r the raw x, ``residual_proj(x)`` or nothing (arXiv 2604.25917,
    equations 3 and 4, with the released modules' LayerNorms). Initialised as `nn.Linear` and `nn.LayerNorm` are.

    Args:
        config: the link's shape.
        device: where the parameters live.
        dtype: their dtype; float32 by default, as masters.

    Raises:
        TypeError: no `LinkConfig`, or no floating-point dtype.
        ValueError: torch knows no such device.
    """

    def __init__(
        self, config: LinkConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if not isinstance(config, LinkConfig):
            raise TypeError(f"config is a {type(config).__name__}, expected a LinkConfig")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype is {dtype!r}, expected a floating-point dtype")
        _check_device(device)
        super().__init__()
        self.config = config
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.hidden_features if config.layers == 2 else config.out_features
        self.proj1 = nn.Linear(config.in_features, width, bias=config.bias, **place)
        if config.layers == 2:
            self.proj2 = nn.Linear(width, config.out_features, bias=config.bias, **place)
        if config.residual == "linear":
            self.residual_proj = nn.Linear(config.in_features, config.out_features, bias=config.bias, **place)
        if config.norm:
            name_in, name_out = NORM_NAMES[config.kind]
            self.add_module(name_in, nn.LayerNorm(config.in_features, eps=config.eps, **place))
            self.add_module(name_out, nn.LayerNorm(config.out_features, eps=config.eps, **place))

    @classmethod
    def inner(
        cls,
        features: int,
        hidden: int | None = None,
        norm: bool = True,
        bias: bool = True,
        *,
        residual: str = "identity",
        layers: int = 2,
        activation: str = "gelu",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """An inner link ``[..., features]`` to the same; by default the released shape (hidden = features, norms)."""
        width = features if hidden is None else hidden
        config = LinkConfig("inner", features, width, features, residual, norm, bias, layers, activation, eps)
        return cls(config, device=device, dtype=dtype)

    @classmethod
    def outer(
        cls,
        in_features: int,
        out_features: int,
        hidden: int | None = None,
        norm: bool = True,
        bias: bool = True,
        *,
        residual: str = "linear",
        layers: int = 2,
        activation: str = "gelu",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """An outer link ``[..., in] -> [..., out]``; by default the released shape (hidden = 2 out, norms)."""
        width = 2 * out_features if hidden is None else hidden
        config = LinkConfig("outer", in_features, width, out_features, residual, norm, bias, layers, activation, eps)
        return cls(config, device=device, dtype=dtype)

    @classmethod
    def from_upstream(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
        adapter_type: str | None = None,
    ) -> Self:
        """A link from the reference implementation's file, state dict or module; see `checkpoint.read_upstream`."""
        return cls._holding(*checkpoint.read_upstream(source, adapter_type))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> Self:
        """A link from a folder that `save_pretrained` wrote, or from a hub id of one."""
        return cls._holding(*checkpoint.read_link(source))

    @classmethod
    def _holding(cls, config: LinkConfig, state: Mapping[str, Tensor]) -> Self:
        """A link of this shape that holds copies of ``state``, in the state's dtype; ValueError names a wrong key."""
        link = cls(config, device="meta")
        _expect_like(link.state_dict(), state)
        copies = {key: value.detach().clone() for key, value in state.items()}
        link.load_state_dict(copies, strict=True, assign=True)
        return link

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``directory``, each replaced whole or not at all.

        Raises:
            ValueError: the layers were changed, so that `from_pretrained` would refuse what is written, or make another
                link of it: two eps, other shapes, other parameters. Nothing is written.
        """
        state = self.state_dict()
        if type(self).__init__ is RecursiveLink.__init__:  # a class that is made in another way knows its parameters
            _expect_like(type(self)(self.config, device="meta").state_dict(), state)
        checkpoint.write_link(directory, with_eps_of(self, self.config), state)

    @property
    def norm_out(self) -> nn.LayerNorm | None:
        """The output norm, whose gain is the scale of the rows that the link returns; None for a link without norms."""
        return getattr(self, NORM_NAMES[self.config.kind][1]) if self.config.norm else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        config = self.config
        name_in, name_out = NORM_NAMES[config.kind]
        out = self.proj1(getattr(self, name_in)(x) if config.norm else x)
        if config.layers == 2:
            out = self.proj2(F.gelu(out, approximate=ACTIVATIONS[config.activation]))
        if config.residual == "identity":
            out = x + out
        elif config.residual == "linear":
            out = out + self.residual_proj(x)
        return getattr(self, name_out)(out) if config.norm else out

    def extra_repr(self) -> str:
        config = self.config
        sizes = f"{config.in_features} -> {config.hidden_features} -> {config.out_features}"
        return f"{config.kind}, {sizes}, residual={config.residual}, norm={config.norm}, activation={config.activation}"
