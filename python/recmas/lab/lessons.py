"""Lessons for one relay agent: read a sheet, look the received value up, answer in the relay's format.

A lesson is one sheet and several independent turns. A turn is what stands between ``<in>`` and ``<out>``, and the
reply. The turns of a sheet share its forward pass: each attends to the sheet and to itself only and counts its
positions from the end of the sheet, so it sees exactly what it would see alone.

Half of the lessons fill the slot in the sender's rhythm (one embedding per token of the sender: the mean of the
receiver's own embeddings of the same characters), and every slot can get Gaussian noise. Both make the agent at home
with what a link will write there.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recmas.lab.agents import PROMPTS, SENDER
from recmas.lab.vocabulary import tokenizer_for
from recmas.lab.world import MAX_HOPS, World, draw_world
from recmas.prompts.renderer import PromptRenderer
from recmas.prompts.template import Slot, Template
from recmas.training.counterparts import aligned_tokens

PASSED_ON = 0.25
"""Share of the critic's and the solver's turns in which a finished word passes through."""
UNSCORED = -100


@dataclass(frozen=True)
class Lesson:
    """One batch of sheets with their turns, T positions each.

    Attributes:
        groups: int64 ``[sheets, T, 2]``, tokens whose mean embedding stands there (a single token stands twice).
        labels: int64 ``[sheets, T]``, the token that a position should predict, -100 where none.
        noise: fp32 ``[sheets, T]``, rms of the noise added there, relative to the embeddings' rms.
        values: bool ``[sheets, T]``, positions that predict the value itself.
        visible: bool ``[1, 1, T, T]``, what each position (second to last) attends to (last).
        positions: int64 ``[1, T]``.
    """

    groups: Tensor
    labels: Tensor
    noise: Tensor
    values: Tensor
    visible: Tensor
    positions: Tensor


class _Position(NamedTuple):
    group: tuple[int, int]
    label: int = UNSCORED
    noise: float = 0.0
    value: bool = False


class School:
    """Makes the lessons of one role; worlds and messages are drawn from (role, split, seed)."""

    def __init__(self, role: str, split: str, seed: int) -> None:
        self.role = role
        self.tokenizer = tokenizer_for(role)
        self._rng = random.Random(f"pretrain/{role}/{split}/{seed}")
        self._renderer = PromptRenderer(self.tokenizer, chat=False)
        prompts = PROMPTS[role]
        self._template = Template(prompts.get("later", prompts["first"]))
        sender = tokenizer_for(SENDER[role])

        @functools.cache
        def spelled(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        @functools.cache
        def spoken(text: str) -> list[tuple[int, int]]:
            groups, ids = aligned_tokens(sender, self.tokenizer, [text])
            return [(ids[0][group[0]], ids[0][group[-1]]) for group in groups[0]]

        self._spelled, self._spoken = spelled, spoken

    def lesson(self, sheets: int, turns: int, noise: float) -> Lesson:
        """A batch of ``sheets`` x ``turns`` turns, all in one rhythm, their noise drawn from 0 to ``noise``."""
        as_sender = self._rng.random() < 0.5
        lines: list[list[_Position]] = []
        sheet_tokens = 0
        for _ in range(sheets):
            world = draw_world(self._rng)
            before, slot, after = self._renderer.segments(
                self._template, {f"{self.role}_sheet": world.sheet(self.role, self._rng)}
            )
            if isinstance(before, Slot) or not isinstance(slot, Slot) or isinstance(after, Slot):
                raise TypeError(f"the {self.role}'s template must be a slot between two texts")
            sheet_tokens = len(before)
            line = [_Position((token, token)) for token in before]
            for _ in range(turns):
                line += self._turn(world, after, as_sender, noise)
            lines.append(line)
        return Lesson(
            torch.tensor([[position.group for position in line] for line in lines]),
            torch.tensor([[position.label for position in line] for line in lines]),
            torch.tensor([[position.noise for position in line] for line in lines]),
            torch.tensor([[position.value for position in line] for line in lines]),
            *turn_layout(sheet_tokens, turns, (len(line) - sheet_tokens) // turns),
        )

    def _turn(self, world: World, cue: list[int], as_sender: bool, noise: float) -> list[_Position]:
        text = self._message(world)
        written = self._spoken(text) if as_sender else [(token, token) for token in self._spelled(text)]
        reply = [*self._spelled(world.relay(self.role, text)), self.tokenizer.eos_token_id]
        level = self._rng.uniform(0.0, noise)
        slot = [_Position(group, noise=level) for group in written]
        # The last slot position also learns to name the value: without this label the look-up is found far later.
        slot[-1] = slot[-1]._replace(label=reply[1])
        said = [_Position((token, token)) for token in (*cue, *reply[:-1])]
        for offset, token in enumerate(reply):
            index = len(cue) - 1 + offset
            said[index] = said[index]._replace(label=token, value=0 < offset < len(reply) - 1)
        return slot + said

    def _message(self, world: World) -> str:
        rng = self._rng
        if self.role == "planner":
            return f"{rng.randint(0, MAX_HOPS)} {rng.choice(list(world.colour_of))}"
        if rng.random() < PASSED_ON:
            return f"0 {rng.choice(list(world.colour_of))}"
        keys = world.animal_of if self.role == "critic" else world.word_of
        return f"{rng.randint(0, MAX_HOPS - 1)} {rng.choice(list(keys))}"


@functools.cache
def turn_layout(sheet_tokens: int, turns: int, turn_tokens: int) -> tuple[Tensor, Tensor]:
    """Visibility ``[1, 1, T, T]`` and positions ``[1, T]`` of independent turns behind one sheet."""
    turn = torch.cat([torch.full((sheet_tokens,), -1), torch.arange(turns).repeat_interleave(turn_tokens)])
    index = torch.arange(len(turn))
    causal = index[:, None] >= index[None, :]
    visible = causal & ((turn[None, :] == -1) | (turn[:, None] == turn[None, :]))
    positions = torch.cat([torch.arange(sheet_tokens), sheet_tokens + torch.arange(turn_tokens).repeat(turns)])
    return visible[None, None], positions[None]
