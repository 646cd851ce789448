"""What the two kernels make of a decoder layer's parts, whatever its cache returns."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels.backends.cpu import decoder
from recmas_kernels.decoder.parts import PLAIN_ACTIVATIONS, Packed, Parts


def run(
    parts: Parts, packed: Packed, x: Tensor, turned: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
) -> Tensor:
    """What a layer makes of ``x [B, 1, d]``; its cache has grown by one position."""
    queries, keys, values = decoder.layer_inputs(parts.sizes, parts.scale, x, packed.inputs, *turned)
    keys, values = cache.update(keys, values, parts.index)
    return _rest(parts, packed, x, queries, keys, values, mask)


def run_in_room(
    parts: Parts,
    packed: Packed,
    x: Tensor,
    turned: tuple[Tensor, Tensor],
    mask: Tensor | None,
    room: tuple[Tensor, Tensor],
) -> Tensor:
    """The same with keys and values ``[B, key heads, T, D]`` of all positions, whose last is still to be written."""
    queries, *made = decoder.layer_inputs(parts.sizes, parts.scale, x, packed.inputs, *turned)
    for states, last in zip(room, made, strict=True):
        states[:, :, -1:] = last
    return _rest(parts, packed, x, queries, *room, mask)


def _rest(
    parts: Parts, packed: Packed, x: Tensor, queries: Tensor, keys: Any, values: Any, mask: Tensor | None
) -> Tensor:
    if parts.reads(x, keys, values, mask):
        return decoder.layer_output(parts.sizes + parts.feed, x, queries, keys, values, mask, packed.output)
    # In plain torch, for what a cache returns that the kernels cannot read.
    _, _, _, out, gate, up, down = parts.linears.values()
    after, before, last = (nn.Identity() if named is None else named[1] for named in parts.norms[3:])
    activation = PLAIN_ACTIVATIONS[decoder.ACTIVATIONS[parts.feed[1]]]
    attended = F.scaled_dot_product_attention(
        queries[:, :, None].to(x.dtype), keys, values, attn_mask=mask, scale=1.0, enable_gqa=True
    )
    x = x + after(out(attended.transpose(1, 2).flatten(2)))
    rows = before(x)
    return x + last(down(activation(gate(rows)) * up(rows)))
