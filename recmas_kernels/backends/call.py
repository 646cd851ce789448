"""The facts about one op call that the choice of a backend depends on: `Call`, and how torch multiplies float32."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """One call of an op. Sizes count elements; ``hidden_features`` is 0 for the ops that are no link's."""

    op: str
    device: str
    dtype: torch.dtype
    tokens: int
    in_features: int
    hidden_features: int
    out_features: int
    training: bool


def float32_products() -> str:
    """How torch multiplies float32 on a CPU: "none" and "ieee" as float32, "bf16" and "tf32" with less precision."""
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision
