"""What a model's configuration says about the memory of a row: cache, activations and logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from recmas.engine.growing_cache import most_capacity

FEED_FORWARD = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
"""What configurations call the width of the feed-forward part; where none is given it is four times the model's."""


@dataclass(frozen=True)
class ModelBytes:
    """Bytes that a row of a batch takes in one model.

    Attributes:
        cache_per_token: keys and values of one position in all attention layers.
        state: recurrent states, whatever the length.
        activations_per_token: the most that one layer's intermediate results of a prefill take per position.
        mask_per_pair: attention mask, per pair of positions.
        logits: of one position.
    """

    cache_per_token: int
    state: int
    activations_per_token: int
    mask_per_pair: int
    logits: int

    def cache(self, positions: int) -> int:
        """A cache that has grown to so many positions, the room in its buffers included."""
        return most_capacity(positions) * self.cache_per_token + self.state

    def snapshot(self, positions: int) -> int:
        """What is kept of a prompt to begin later rounds with: at most all of it."""
        return positions * self.cache_per_token + self.state

    def work(self, positions: int) -> int:
        """What a prefill takes beside the cache."""
        return positions * (self.activations_per_token + positions * self.mask_per_pair) + self.logits


def model_bytes(config: Any, width: int) -> ModelBytes:
    """What a row takes in a model of a transformers configuration.

    Args:
        config: of a causal language model, or of a multimodal one around it.
        width: bytes of an element of the model's dtype.
    """
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    key, value = head, head
    if getattr(config, "qk_nope_head_dim", None):  # latent attention, expanded for every head: the most
        shared, key, value = heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    layers = DynamicCache(config=config).layers
    attention = sum(isinstance(layer, DynamicLayer) for layer in layers)
    state = sum(not isinstance(layer, DynamicLayer) for layer in layers) * _state(config, width)
    hidden, experts = config.hidden_size, getattr(config, "num_experts_per_tok", None) or 0
    feed = max(_feed_forward(config), experts * (getattr(config, "moe_intermediate_size", None) or 0))
    heads_out = heads * (key + value) + shared * (key + value)
    return ModelBytes(
        cache_per_token=attention * shared * (key + value) * width,
        state=state,
        # residual, its normed copy and their float32 forms, beside the larger of attention and feed-forward
        activations_per_token=hidden * (2 * width + 8) + max(3 * feed, heads_out) * width,
        mask_per_pair=width,
        logits=config.vocab_size * (width + 3 * 4),  # and float32 copies of what is sampled from
    )


def _feed_forward(config: Any) -> int:
    """Width of the feed-forward part; the widest layer's where they differ."""
    given = (getattr(config, name, None) for name in FEED_FORWARD)
    width = next((value for value in given if value), 4 * config.hidden_size)
    return max(width) if isinstance(width, list | tuple) else width


def _state(config: Any, width: int) -> int:
    """Convolution and recurrent state (float32) of a gated linear attention layer, per row."""
    if getattr(config, "linear_num_value_heads", None) is None:
        return 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    channels = (2 * keys + values) * config.linear_conv_kernel_dim
    return channels * width + 4 * values * config.linear_key_head_dim
