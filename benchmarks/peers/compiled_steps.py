"""torch.compile with freezing and max-autotune as a peer of an agent's steps, at fixed shapes.

The step is that of ``compile=True``; Inductor packs its weights and tunes each product, which takes minutes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recmas.agents.agent import Agent
from recmas.engine.continuation import Continuation
from recmas.engine.fixed_shapes import FixedShapeContinuation, unfit


class CompiledSteps:
    """A body's step and its head, compiled for one batch size and so many positions; for use without grad.

    Args:
        agent: whose layers are plain.
        past: a batch ``[B]`` that has read its prompt.
        columns: prompt and all steps.

    Raises:
        ValueError: the model cannot run at fixed shapes.
    """

    def __init__(self, agent: Agent, past: Continuation, columns: int) -> None:
        if reason := unfit(past):
            raise ValueError(f"no step at fixed shapes: {reason}")
        embeds = torch.zeros(
            len(past.mask), agent.hidden_size, dtype=agent.embed(torch.zeros(1, dtype=torch.int64)).dtype
        )
        agent.logits(embeds)  # looks at the model first, which is not to be compiled
        self._fixed = FixedShapeContinuation(past, len(past.mask), columns, compiled=True)
        self.logits = torch.compile(agent.logits, dynamic=False)
        self.load(past)
        options = torch._inductor.list_mode_options("max-autotune")
        # Inductor's settings at the first call count; freezing is none of the options of `torch.compile`.
        with torch._inductor.config.patch({**options, "freezing": True}):
            self.logits(self.feed(embeds[:, None]))

    def load(self, past: Continuation) -> None:
        """Continue another batch of the same size."""
        self._fixed.load(past)

    def feed(self, embeds: Tensor) -> Tensor:
        """Final-norm hidden states ``[B, d]`` after one more position ``[B, 1, d]``.

        Raises:
            ValueError: it has no column left.
        """
        if self._fixed.length == self._fixed.columns:
            raise ValueError(f"all {self._fixed.columns} columns are in use")
        hidden = self._fixed.step(embeds[:, 0])
        self._fixed.length += 1
        return hidden
