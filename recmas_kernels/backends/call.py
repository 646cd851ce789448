"""`Call`: the facts about one op call that the choice of a backend depends on."""

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
