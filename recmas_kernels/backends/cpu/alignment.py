"""The alignment loss and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from recmas_kernels import reference
from recmas_kernels.backends.cpu import readable
from recmas_kernels.backends.cpu.module import DEVICE, isa_in_use, kernels


def alignment_fwd(
    pred: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    mask: Tensor | None,
    cosine_weight: float,
    mse_weight: float,
    embed_scale: float,
) -> tuple[Tensor, Tensor]:
    """``(loss fp32 scalar, gradient [T, d] in pred's dtype)``; see the formula in ``reference.alignment_fwd``."""
    tokens, features = pred.shape
    loss = torch.zeros((), dtype=torch.float32, device=DEVICE)
    grad = torch.empty(tokens, features, dtype=pred.dtype, device=DEVICE)
    if grad.numel() == 0:
        return loss, grad
    rows, table = readable.rows(pred), readable.rows(target)
    ids = None if token_ids is None else token_ids.contiguous()
    weights = None if mask is None else mask.to(torch.float32).contiguous()
    settings = (isa_in_use(), torch.get_num_threads())
    kernels().alignment(*settings, rows, table, ids, weights, cosine_weight, mse_weight, embed_scale, loss, grad)
    return loss, grad


def alignment_bwd(grad: Tensor, dloss: Tensor) -> Tensor:
    """See `recmas_kernels.reference.alignment_bwd`; where a loss is the end, dloss is 1 and there is nothing to do."""
    return grad if dloss.item() == 1 else reference.alignment_bwd(grad, dloss)
