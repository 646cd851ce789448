"""`LinkConfig`, the shape of a RecursiveLink, and the values that its fields may take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

RESIDUALS = ("identity", "linear", "none")
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's name of the approximation: "none" is the exact erf
NORM_NAMES = {"inner": ("pre_ln", "post_ln"), "outer": ("ln_source", "ln_target")}  # by kind: input, output norm
_CHOICES: dict[str, tuple[Any, ...]] = {
    "kind": tuple(NORM_NAMES),
    "residual": RESIDUALS,
    "layers": (1, 2),
    "activation": tuple(ACTIVATIONS),
}


@dataclass(frozen=True)
class LinkConfig:
    """The shape of a RecursiveLink.

    Attributes:
        kind: "inner" (an agent to itself) or "outer" (one agent to another); it decides the norms' parameter names.
        in_features: width of the latents that the link reads.
        hidden_features: width between the two projections; ignored by one-layer links.
        out_features: width of the rows that the link returns.
        residual: "identity" (in_features == out_features), "linear" (``residual_proj``) or "none".
        norm: LayerNorm before the first projection and after the sum.
        bias: biases in every projection (the norms always have one).
        layers: 2, or 1 for the ablation without ``proj2``.
        activation: "gelu" (exact erf) or "gelu_tanh".
        eps: LayerNorm epsilon.

    Raises:
        ValueError: a field has a value that no link has; the message names the field.
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
            value = getattr(self, name)
            if not isinstance(value, type(choices[0])) or isinstance(value, bool) or value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}")
        for name in ("in_features", "hidden_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}, expected a whole number >= 0")
        for name in ("norm", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not 0 <= self.eps < math.inf:
            raise ValueError(f"eps is {self.eps!r}, expected a finite number >= 0")
        if self.residual == "identity" and self.in_features != self.out_features:
            raise ValueError(
                f"residual='identity' needs in_features == out_features, got {self.in_features} and {self.out_features}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinkConfig:
        """A config from a JSON object; unknown or missing keys raise ValueError naming them."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        for field in fields(cls):
            if field.name not in known and field.default is MISSING:
                raise ValueError(f"missing key {field.name!r}")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The config as a JSON object."""
        return asdict(self)
