"""Back through a latent rollout without keeping its steps.

The forward is the rollout of inference, without a graph: kept are its latents, and the keys and values of every
position. The backward goes through the steps from the last to the first. Each step is run again alone, on the keys and
values that stood before it, and passes gradients on to the latent it read and to those keys and values; at the end the
prompt is read again and takes what has gathered at its own. So m steps cost m more steps, and hold the activations of
one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from recmas.agents.agent import Agent
from recmas.engine.continuation import length_dependent, positions_of
from recmas.engine.growing_cache import ROOM, GrowingLayer, GrowingSlidingLayer
from recmas.engine.messages import Latents, Prompt, run_link


def think(agent: Agent, prompt: Prompt, steps: int, link: nn.Module, begun: DynamicCache | None = None) -> Latents:
    """`Agent.think` under gradients, which reach the prompt; the link must be frozen.

    Args:
        agent: thinks; its past must be keys and values (`can_repeat`).
        prompt: the batch of prompts.
        steps: m, at least 1.
        link: the agent's inner link.
        begun: holds the prompt's first columns, but not its last, already; None reads them all.
    """
    agent.check_context(prompt.mask.sum(dim=1).tolist(), steps - 1)
    return Latents(_Rollout.apply(prompt.embeds, prompt.mask, agent, steps, link, begun))


def can_repeat(agent: Agent, link: nn.Module) -> bool:
    """Whether `think` serves this agent and link: all of the past is keys and values, and no parameter is trained."""
    config = agent.decoder.config
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    trained = any(parameter.requires_grad for parameter in link.parameters())
    return not (kinds - {DynamicLayer, DynamicSlidingWindowLayer} or length_dependent(config) or trained)


class _Rollout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeds: Tensor, mask: Tensor, agent: Agent, steps: int, link: nn.Module, begun: DynamicCache | None
    ) -> Tensor:
        run = _Run(agent, torch.cat([mask, mask.new_ones(mask.shape[0], steps - 1)], dim=1), link, begun)
        cache = run.cache(_GrowingLayer, _GrowingSlidingLayer)
        states = [run.step(cache, embeds[:, run.held :])]
        for _ in range(steps - 1):
            states.append(run.step(cache, states[-1][:, None].to(embeds.dtype)))
        ctx.run = run
        ctx.added = [torch.cat(parts, dim=2) for layer in cache.layers for parts in zip(*layer.added, strict=True)]
        result = torch.stack(states, dim=1)
        ctx.save_for_backward(embeds, result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """``added`` and ``gathered``: keys and values of all layers, one after the other, and their gradients."""
        run, added = ctx.run, ctx.added
        embeds, states = ctx.saved_tensors
        read = embeds.shape[1] - run.held
        gathered = [torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in added]
        gradients = list(upstream.unbind(dim=1))

        def back(end: int, step: int, embeds: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
            """Through one step that read ``embeds`` after ``past``, and made what is added up to ``end``."""
            with torch.enable_grad():
                cache = run.cache(_RepeatedLayer, _RepeatedSlidingLayer, past)
                state = run.step(cache, embeds)
            new = [part for layer in cache.layers for part in layer.added[0]]
            first = end - embeds.shape[1]
            arrived = [part[:, :, first:end].to(kept.dtype) for part, kept in zip(gathered, new, strict=True)]
            return torch.autograd.grad([state, *new], [embeds, *past], [gradients[step], *arrived])

        for step in range(states.shape[1] - 1, 0, -1):
            end = read + step
            past = [part[:, :, : end - 1].detach().requires_grad_() for part in added]
            latent = states[:, step - 1 : step].detach().to(embeds.dtype).requires_grad_()
            first, *rest = back(end, step, latent, past)
            gradients[step - 1] = gradients[step - 1] + first[:, 0]
            for total, part in zip(gathered, rest, strict=True):
                total[:, :, : end - 1] += part
        whole = torch.zeros_like(embeds)
        (whole[:, run.held :],) = back(read, 0, embeds[:, run.held :].detach().requires_grad_(), [])
        return whole, None, None, None, None, None


class _Run:
    """Steps of one rollout.

    Args:
        agent: takes them.
        mask: int64 ``[B, T + m - 1]`` of prompt and latents.
        link: the inner link.
        begun: holds the first columns already; None holds none.

    Attributes:
        held: columns that ``begun`` holds.
    """

    def __init__(self, agent: Agent, mask: Tensor, link: nn.Module, begun: DynamicCache | None) -> None:
        self._decoder, self._mask, self._link, self._begun = agent.decoder, mask, link, begun
        self._positions = positions_of(mask)
        self.held = 0 if begun is None else begun.get_seq_length()

    def step(self, cache: DynamicCache, embeds: Tensor) -> Tensor:
        """The latent ``[B, d]`` after input embeddings ``[B, S, d]`` that stand behind what the cache holds."""
        start = cache.get_seq_length()
        end = start + embeds.shape[1]
        output = self._decoder(
            inputs_embeds=embeds,
            attention_mask=self._mask[:, :end],
            position_ids=self._positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        return run_link(self._link, output.last_hidden_state[:, -1])

    def cache(self, full: type, sliding: type, past: list[Tensor] | None = None) -> DynamicCache:
        """A cache of such layers that holds what was begun, and ``past`` (keys and values by layer) behind it."""
        cache = DynamicCache(config=self._decoder.config)
        for index, layer in enumerate(cache.layers):
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            cache.layers[index] = made = full() if window is None else sliding(window)
            begun = None if self._begun is None else self._begun.layers[index]
            keys, values = (
                [part for part in parts if part is not None]
                for parts in zip(
                    (None, None) if begun is None else (begun.keys, begun.values),
                    past[2 * index : 2 * index + 2] if past else (None, None),
                    strict=True,
                )
            )
            if keys:
                dropped = 0 if begun is None else begun.get_seq_length() - begun.keys.shape[2]
                made.begin(torch.cat(keys, dim=2), torch.cat(values, dim=2), dropped)
        return cache


class _Recording:
    """Keeps what is appended; `begin` takes what stands before that, of which `dropped` columns are not held."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.added: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any) -> Any:
        self.added.append((key_states, value_states))
        return super().update(key_states, value_states, *arguments, **options)  # type: ignore[misc]


class _GrowingLayer(_Recording, GrowingLayer):
    def begin(self, keys: Tensor, values: Tensor, dropped: int) -> None:
        self.hold(keys, values, ROOM)


class _GrowingSlidingLayer(_Recording, GrowingSlidingLayer):
    def begin(self, keys: Tensor, values: Tensor, dropped: int) -> None:
        self.hold(keys, values, ROOM)
        self.cumulative_length += dropped


class _RepeatedLayer(_Recording, DynamicLayer):
    def begin(self, keys: Tensor, values: Tensor, dropped: int) -> None:
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


class _RepeatedSlidingLayer(_Recording, DynamicSlidingWindowLayer):
    def begin(self, keys: Tensor, values: Tensor, dropped: int) -> None:
        self.lazy_initialization(keys, values)
        self.cumulative_length = dropped + keys.shape[2]
        held = min(self.cumulative_length, self.sliding_window - 1)
        self.keys, self.values = (part[:, :, part.shape[2] - held :] for part in (keys, values))
