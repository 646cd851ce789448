"""`LinkConfig`, the shape of a link, and `RecursiveLink`, the eager module that every kernel is measured against."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

_CHOICES = {
    "kind": ("inner", "outer"),
    "residual": ("identity", "linear", "none"),
    "layers": (1, 2),
    "activation": ("gelu", "gelu_tanh"),
}
NORM_NAMES = {"inner": ("pre_ln", "post_ln"), "outer": ("ln_source", "ln_target")}


@dataclass(frozen=True)
class LinkConfig:
    """The shape of a RecursiveLink.

    Attributes:
        kind: "inner" (an agent to itself) or "outer" (to another agent); it decides the norms' parameter names.
        in_features: width of the latents that are read.
        hidden_features: width between the two projections; ignored by one-layer links.
        out_features: width of the space that is written into.
        residual: "identity" (in == out), "linear" (``residual_proj``) or "none".
        norm: LayerNorm before the first projection and after the sum.
        bias: biases in every projection (the norms always have one).
        layers: 2, or 1 for the ablation without ``proj2``.
        activation: "gelu" (exact erf) or "gelu_tanh".
        eps: LayerNorm epsilon.
    """

    kind: str
    in_features: int
    hidden_features: int
    out_features: int
    residual: str
    norm: bool = True
    bias: bool = True
    layers: int = 2
    activation: str = "gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(str, choices))}")
        for name in ("in_features", "hidden_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}, expected a whole number >= 0")
        if self.residual == "identity" and self.in_features != self.out_features:
            raise ValueError(
                f"residual='identity' needs in_features == out_features, got {self.in_features} and {self.out_features}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinkConfig:
        """A config from a JSON object; unknown or missing keys raise ValueError naming them."""
        known = {field: values[field] for field in cls.__dataclass_fields__ if field in values}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        try:
            return cls(**known)
        except TypeError as error:
            raise ValueError(f"missing key: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The config as a JSON object."""
        return asdict(self)


class RecursiveLink(nn.Module):
    """A RecursiveLink in plain torch, with the parameter names of the reference implementation.

    ``norm_out(r + proj2(gelu(proj1(norm_in(x)))))``, r the raw x, ``residual_proj(x)`` or nothing (arXiv 2604.25917,
    equations 3 and 4, with the released modules' LayerNorms). Initialised as `nn.Linear` and `nn.LayerNorm` are.

    Args:
        config: the link's shape.
        device: where the parameters live.
        dtype: their dtype; float32 by default, as masters.
    """

    def __init__(
        self, config: LinkConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
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
        from recmas_kernels import checkpoint

        return checkpoint.build(cls, *checkpoint.read_upstream(source, adapter_type))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> Self:
        """A link from a folder that `save_pretrained` wrote, or from a hub id of one."""
        from recmas_kernels import checkpoint

        return checkpoint.build(cls, *checkpoint.read_link(source))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``directory``, each replaced whole or not at all."""
        from recmas_kernels import checkpoint

        checkpoint.write_link(directory, self.config, self.state_dict())

    @property
    def norm_out(self) -> nn.LayerNorm | None:
        """The output norm, whose gain is the scale of what the link writes; None for a link without norms."""
        return getattr(self, NORM_NAMES[self.config.kind][1]) if self.config.norm else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        config = self.config
        name_in, name_out = NORM_NAMES[config.kind]
        out = self.proj1(getattr(self, name_in)(x) if config.norm else x)
        if config.layers == 2:
            out = self.proj2(F.gelu(out, approximate="tanh" if config.activation == "gelu_tanh" else "none"))
        if config.residual == "identity":
            out = x + out
        elif config.residual == "linear":
            out = out + self.residual_proj(x)
        return getattr(self, name_out)(out) if config.norm else out

    def extra_repr(self) -> str:
        config = self.config
        sizes = f"{config.in_features} -> {config.hidden_features} -> {config.out_features}"
        return f"{config.kind}, {sizes}, residual={config.residual}, norm={config.norm}, activation={config.activation}"
