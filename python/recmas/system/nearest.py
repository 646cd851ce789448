"""What latents look like to their reader: the tokens of its vocabulary that point their way most."""

from __future__ import annotations

import torch
from torch import Tensor

from recmas.config.pattern import LinkKey
from recmas.engine.messages import run_link
from recmas.system.member import Member


@torch.no_grad()
def received(member: Member, key: LinkKey, latents: Tensor) -> Tensor:
    """Latents ``[m, d_sender]`` through an outer link to `member`: ``[m, d]`` float32."""
    return run_link(member.outer_links[key], latents.to(member.agent.device)).float()


@torch.no_grad()
def nearest_tokens(member: Member, key: LinkKey, latents: Tensor, count: int) -> list[dict[str, float]]:
    """Per latent ``[m, d_sender]``, the `count` tokens of the reader whose embeddings have the largest cosine with it.

    Args:
        member: the reader.
        key: of the link that the latents go through.
        latents: through the sender's inner link.
        count: of tokens.
    """
    table = torch.nn.functional.normalize(member.agent.model.get_input_embeddings().weight.float(), dim=-1)
    cosine = torch.nn.functional.normalize(received(member, key, latents), dim=-1) @ table.T
    best = cosine.topk(min(count, table.shape[0]), dim=-1)
    tokens = member.agent.tokenizer.convert_ids_to_tokens
    return [
        dict(zip(tokens(ids), values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
