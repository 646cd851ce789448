"""The reference implementation's latent rollout, as an algorithm: what the cached one is measured against.

Every latent step runs the whole sequence again without a cache, keeps the hidden states of all layers, computes the
logits of the last position and concatenates embeddings and mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def reference_rollout(model: Any, link: Callable[[Tensor], Tensor], embeds: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Final-norm hidden states ``[B, steps, d]`` of the last positions, each fed back through ``link``.

    Args:
        model: a transformers causal language model.
        link: the inner link, ``[B, d] -> [B, d]``; runs ``steps`` times, the last time for nothing.
        embeds: prompt ``[B, T, d]``.
        mask: int64 ``[B, T]``.
        steps: m >= 1.
    """
    states = []
    for _ in range(steps):
        output = model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, output_hidden_states=True, logits_to_keep=1
        )
        states.append(output.hidden_states[-1][:, -1])
        embeds = torch.cat([embeds, link(states[-1])[:, None].to(embeds.dtype)], dim=1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    return torch.stack(states, dim=1)
