"""Tokens by steps: each fed to the decoder, and the next one chosen by the LM head, on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from recmas.agents.model import FrozenModel
from recmas.agents.sampling import Sampler, choose
from recmas.engine.continuation import Past
from recmas.engine.fixed_shapes import FixedShapeContinuation
from recmas.engine.stepper import Running, Stepper

LOOK = 8
FIRST = 256
"""Steps that a batch finds room for at first: most texts end long before the last token that they may have, and every
step attends over all columns of the bucket."""


class TokenSteps(Protocol):
    """What a batch is written with.

    Attributes:
        look: steps that it can go on by itself.
    """

    look: int

    def feed(self, fed: Sequence[Sequence[int]], drawing: Collection[int], steps: int) -> list[list[int]]:
        """Tokens of every row after these: `steps` lists, each step's token is fed before the next is chosen.

        -1 where logits are not finite. Tokens of rows not in `drawing` mean nothing.

        Args:
            fed: per row as many tokens.
            drawing: the rows that use their random streams.
            steps: 1 to `look`.
        """
        ...


@contextmanager
def token_steps(
    model: FrozenModel,
    past: Past,
    sampler: Sampler,
    stepper: Stepper,
    steps: int,
    most: int,
    weights_stay: bool,
) -> Iterator[TokenSteps]:
    """How the batch whose prompt `past` has read goes on.

    Args:
        model: writes.
        past: of the prompt.
        sampler: chooses.
        stepper: runs the steps.
        steps: that rows may take without replies.
        most: that they may take with them.
        weights_stay: as for `Stepper.begin`.
    """
    greedy = sampler.temperature == 0
    look = stepper.look or (LOOK if past.mask.is_cuda else 1)
    name = ("greedy" if greedy else "sampled", look)

    def make(on: FixedShapeContinuation) -> TokenStep:
        return TokenStep(on, model, look, greedy)

    first = min(steps, FIRST)
    with stepper.begin(past, first, name, make, most=most, weights_stay=weights_stay) as run:
        yield _Growing(model, past, sampler) if run is None else _Fixed(run, sampler, look)


class TokenStep:
    """One token fed and the next one chosen, in place.

    Args:
        continuation: makes the step.
        model: embeds tokens, and makes logits of hidden states.
        look: steps between two looks of the host.
        greedy: takes the most likely token.

    Attributes:
        tokens: int64 ``[rows]``, fed by the next step.
        uniform: ``[look, rows]``, drawn for the steps until the next look.
        chosen: int64 ``[look, rows]``, of the steps since the last look.
        place: int64 ``[1]``, steps since the last look.
        settings: temperature and top_p.
        modules: as for `recmas.engine.buckets.Program`.
    """

    def __init__(self, continuation: FixedShapeContinuation, model: FrozenModel, look: int, greedy: bool) -> None:
        self._continuation, self._model, self._greedy = continuation, model, greedy
        device, rows = model.device, continuation.rows
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(look, rows, device=device)
        self.chosen = torch.zeros(look, rows, dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.settings = torch.ones(2, device=device)
        self.modules = (model.model,)

    def reset(self) -> None:
        self.place.zero_()

    def __call__(self) -> None:
        hidden = self._continuation.step(self._model.embed(self.tokens[:, None])[:, 0])
        logits = self._model.logits(hidden)
        if self._greedy:
            chosen = choose(logits)
        else:
            uniform = self.uniform.index_select(0, self.place)[0]
            chosen = choose(logits, uniform, self.settings[0], self.settings[1])
        self.chosen.index_copy_(0, self.place, chosen[None])
        self.tokens.copy_(chosen.clamp(min=0))
        self.place.add_(1)


class _Growing:
    """On a `Past` as it is; the host looks after every step."""

    look = 1

    def __init__(self, model: FrozenModel, past: Past, sampler: Sampler) -> None:
        self._model, self._past, self._sampler = model, past, sampler

    def feed(self, fed: Sequence[Sequence[int]], drawing: Collection[int], steps: int) -> list[list[int]]:
        hidden = self._past.feed(self._model.embed(torch.tensor(fed, device=self._model.device)))
        (uniform,) = self._sampler.draw(drawing)
        chosen: list[int] = self._sampler.choose(self._model.logits(hidden), uniform).tolist()
        return [chosen]


class _Fixed:
    """In a bucket; the host looks after `look` steps."""

    def __init__(self, run: Running[TokenStep], sampler: Sampler, look: int) -> None:
        self._run, self._sampler, self.look = run, sampler, look

    def feed(self, fed: Sequence[Sequence[int]], drawing: Collection[int], steps: int) -> list[list[int]]:
        width, batch = len(fed[0]), len(fed)
        self._run.reserve(width + steps - 1)
        program = self._run.program
        program.settings.copy_(torch.tensor([self._sampler.temperature, self._sampler.top_p]))
        program.uniform[:steps, :batch].copy_(self._sampler.draw(drawing, steps))
        for column in torch.tensor(fed).T:
            program.tokens[:batch].copy_(column)
            program.place.zero_()
            self._run()
        for _ in range(steps - 1):
            self._run()
        chosen: list[list[int]] = program.chosen[:steps, :batch].tolist()
        return chosen
