"""The alignment loss as one writes it in torch, and ours with the same arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recmas_kernels import alignment_loss

MSE_WEIGHT = 0.1


def eager_loss(pred: Tensor, table: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    """The loss in plain torch, computed in float32 (in float64 for float64 rows).

    Args:
        pred: ``[T, d]``.
        table: embedding table ``[V, d]``, whose rows ``token_ids`` are the targets.
        token_ids: int64 ``[T]``.
        mask: bool ``[T]``, the rows that count.
    """
    wide = torch.float64 if pred.dtype is torch.float64 else torch.float32
    rows, target = pred.to(wide), table[token_ids].to(wide)
    row_loss = 1 - F.cosine_similarity(rows, target, dim=-1) + MSE_WEIGHT * (rows - target).square().mean(-1)
    return (row_loss * mask).sum() / mask.sum()


def fused_loss(pred: Tensor, table: Tensor, token_ids: Tensor, mask: Tensor) -> Tensor:
    """`recmas_kernels.alignment_loss` on the arguments of `eager_loss`."""
    return alignment_loss(pred, table, token_ids=token_ids, mask=mask, mse_weight=MSE_WEIGHT)
