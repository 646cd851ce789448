"""Decoder layers as models have them, in plain torch, and variants of the formula that look alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.kernels.rms_norms import Norm


@dataclass
class Sizes:
    features: int = 48
    heads: int = 4
    key_heads: int = 2
    head: int = 16
    hidden: int = 80


def halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2, dim=-1)


class Attention(nn.Module):
    def __init__(self, sizes: Sizes, bias: bool, head_norms: bool, offset: float) -> None:
        super().__init__()
        self.head_dim, self.scaling, self.layer_idx = sizes.head, sizes.head**-0.5, 0
        width, keys = sizes.heads * sizes.head, sizes.key_heads * sizes.head
        self.q_proj = nn.Linear(sizes.features, width, bias=bias)
        self.k_proj = nn.Linear(sizes.features, keys, bias=bias)
        self.v_proj = nn.Linear(sizes.features, keys, bias=bias)
        self.o_proj = nn.Linear(width, sizes.features, bias=bias)
        if head_norms:
            self.q_norm, self.k_norm = Norm(sizes.head, offset), Norm(sizes.head, offset)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = halves(x)
        return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]

    def heads(self, linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def scores(self, scores: Tensor) -> Tensor:
        return scores

    def forward(self, x: Tensor, turned: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        q, k, v = (self.heads(linear, x) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if "q_norm" in self._modules:
            q, k = self.q_norm(q), self.k_norm(k)
        k, v = cache.update(self.turn(k, *turned), v, self.layer_idx)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        scores = self.scores(self.turn(q, *turned) @ k.transpose(2, 3) * self.scaling)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.float().softmax(dim=-1)
        if mask is not None:
            weights = weights.where(mask.any(-1, True), 0.0)
        return self.o_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, sizes: Sizes, activation: nn.Module, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.features, sizes.hidden, bias=bias)
        self.up_proj = nn.Linear(sizes.features, sizes.hidden, bias=bias)
        self.down_proj = nn.Linear(sizes.hidden, sizes.features, bias=bias)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Llama's; with ``more_norms`` Gemma's."""

    attention: type[Attention] = Attention

    def __init__(
        self,
        sizes: Sizes | None = None,
        *,
        bias: bool = False,
        head_norms: bool = False,
        more_norms: bool = False,
        offset: float = 0.0,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        sizes = sizes or Sizes()
        self.self_attn = self.attention(sizes, bias, head_norms, offset)
        self.mlp = FeedForward(sizes, activation or nn.SiLU(), bias)
        self.input_layernorm = Norm(sizes.features, offset)
        self.post_attention_layernorm = Norm(sizes.features, offset)
        if more_norms:
            self.pre_feedforward_layernorm = Norm(sizes.features, offset)
            self.post_feedforward_layernorm = Norm(sizes.features, offset)
        self.requires_grad_(False).eval()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x = hidden_states
        added = self.self_attn(self.input_layernorm(x), position_embeddings, attention_mask, past_key_values)
        if "pre_feedforward_layernorm" not in self._modules:
            x = x + added
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(added)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Cache:
    """Of one layer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.updates = keys, values, 0

    def update(self, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        self.updates += 1
        self.keys, self.values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        return self.keys, self.values


@dataclass
class Step:
    """One position of some rows."""

    x: Tensor
    turned: tuple[Tensor, Tensor]
    mask: Tensor | None
    keys: Tensor
    values: Tensor

    @classmethod
    def random(cls, rows: int, before: int, masked: bool, sizes: Sizes | None = None, seed: int = 1) -> Step:
        sizes = sizes or Sizes()
        generator = torch.Generator().manual_seed(seed)
        keys, values = torch.randn(2, rows, sizes.key_heads, before, sizes.head, generator=generator)
        mask = torch.rand(rows, 1, 1, before + 1, generator=generator) < 0.6 if masked else None
        if mask is not None:
            mask[..., -1] = True
        turned = torch.randn(2, rows, 1, sizes.head, generator=generator)
        return cls(
            torch.randn(rows, 1, sizes.features, generator=generator), (turned[0], turned[1]), mask, keys, values
        )

    def to(self, dtype: torch.dtype) -> Step:
        cos, sin = self.turned
        made = [tensor.to(dtype) for tensor in (self.x, cos, sin, self.keys, self.values)]
        return Step(made[0], (made[1], made[2]), self.mask, made[3], made[4])

    def run(self, layer: nn.Module, **more: Any) -> tuple[Tensor, Cache]:
        """The layer's result, and its cache after it."""
        cache = Cache(self.keys, self.values)
        given = {"attention_mask": self.mask, "position_embeddings": self.turned, "past_key_values": cache}
        return layer(self.x, **{**given, "use_cache": True, **more}), cache


class Capped(Attention):
    def scores(self, scores: Tensor) -> Tensor:
        return 50 * torch.tanh(scores / 50)


class TurnedInPairs(Attention):
    """Neighbouring features turn together."""

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos[:, None] + turned * sin[:, None]


class PartlyTurned(Attention):
    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((super().turn(x[..., :half], cos[..., :half], sin[..., :half]), x[..., half:]), dim=-1)


def variant(attention: type[Attention]) -> type[Layer]:
    return type("Variant", (Layer,), {"attention": attention})


class Parallel(Layer):
    """Attention and feed-forward part side by side."""

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        x, turned = hidden_states, given["position_embeddings"]
        added = self.self_attn(self.input_layernorm(x), turned, given["attention_mask"], given["past_key_values"])
        return x + added + self.mlp(self.post_attention_layernorm(x))


class Scaled(Layer):
    """What is added is multiplied."""

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        return hidden_states + 0.5 * (super().forward(hidden_states, **given) - hidden_states)


class InTuple(Layer):
    def forward(self, hidden_states: Tensor, **given: Any) -> Any:
        return (super().forward(hidden_states, **given),)


class ByIndex(Attention):
    def scores(self, scores: Tensor) -> Tensor:
        return scores * (1 + self.layer_idx)


class OtherIndex(Attention):
    def forward(self, x: Tensor, turned: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        held = cache.update
        cache.update = lambda keys, values, index: held(keys, values, index + 1)
        return super().forward(x, turned, mask, cache)


class OfType(Attention):
    """Another rule for 16 bits."""

    def scores(self, scores: Tensor) -> Tensor:
        return scores if scores.dtype is torch.float32 else 0.5 * scores


class ByPosition(Layer):
    """Far positions are scaled."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor | None = None, **given: Any) -> Tensor:
        y = super().forward(hidden_states, **given)
        return y if position_ids is None else y * (1 + (position_ids[..., None] // 100_000))


OTHERS = {
    "other index": variant(OtherIndex),
    "by position": ByPosition,
    "capped scores": variant(Capped),
    "turned in pairs": variant(TurnedInPairs),
    "partly turned": variant(PartlyTurned),
    "parallel": Parallel,
    "scaled": Scaled,
    "in a tuple": InTuple,
}


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "tanh": nn.GELU(approximate="tanh")}
