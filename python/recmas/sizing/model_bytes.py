"""What a model's configuration says about the memory of a row: cache, activations and logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

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
    heads = _field(config, "num_attention_heads")
    shared = _field(config, "num_key_value_heads") or heads
    head = _field(config, "head_dim") or (config.hidden_size // heads if heads else 0)
    key, value = head, head
    if _field(config, "qk_nope_head_dim"):  # latent attention, expanded for every head: the most
        shared, key = heads, _field(config, "qk_nope_head_dim") + _field(config, "qk_rope_head_dim")
        value = _field(config, "v_head_dim")
    layers = DynamicCache(config=config).layers
    attention = sum(isinstance(layer, DynamicLayer) for layer in layers)
    state = sum(isinstance(layer, LinearAttentionLayer) for layer in layers) * _state(config, width)
    hidden, experts = config.hidden_size, _field(config, "num_experts_per_tok")
    feed = max(_feed_forward(config), experts * _field(config, "moe_intermediate_size"))
    heads_out = heads * (key + value) + shared * (key + value)
    return ModelBytes(
        cache_per_token=attention * shared * (key + value) * width,
        state=state,
        # residual, its normed copy and their float32 forms, beside the larger of attention and feed-forward
        activations_per_token=hidden * (2 * width + 8) + max(3 * feed, heads_out) * width,
        mask_per_pair=width,
        logits=config.vocab_size * (width + 3 * 4),  # and float32 copies of what is sampled from
    )


def _field(config: Any, *names: str) -> int:
    """The first of these fields that is given, 0 if none is; the largest where layers differ."""
    for name in names:
        try:
            found = getattr(config, name, None)
        except RuntimeError:  # transformers' answer where the layers of one model differ
            layers = (config.per_layer_config[layer] for layer in range(config.num_hidden_layers))
            found = [getattr(layer, name, None) for layer in layers]
        listed = found if isinstance(found, list | tuple) else [found]
        if numbers := [number for number in listed if isinstance(number, int)]:
            return max(numbers)
    return 0


def _feed_forward(config: Any) -> int:
    """Width of the feed-forward part; the widest layer's where they differ."""
    return _field(config, *FEED_FORWARD) or 4 * int(config.hidden_size)


def _state(config: Any, width: int) -> int:
    """Convolution and recurrent state (float32) of a recurrent layer, per row: gated linear attention, or Mamba's."""
    if _field(config, "linear_num_value_heads"):
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        channels = (2 * keys + values) * config.linear_conv_kernel_dim
        return channels * width + 4 * values * config.linear_key_head_dim
    entries = _field(config, "mamba_d_state", "state_size", "ssm_state_size")
    if not entries:
        return 0
    inner = _field(config, "mamba_d_ssm") or _field(config, "mamba_expand", "expand") * config.hidden_size
    groups = _field(config, "mamba_n_groups", "n_groups", "mamba_ngroups") or 1
    convolved = (inner + 2 * groups * entries) * _field(config, "mamba_d_conv", "conv_kernel")
    return convolved * width + 4 * inner * entries
