"""Lessons for one agent of the lab: read a sheet, look the received values up, answer in the task's format.

A lesson is one sheet and several independent turns. A turn is what stands between ``<in>`` and ``<out>``, and the
reply. The turns of a sheet share its forward pass: each attends to the sheet and to itself only and counts its
positions from the end of the sheet, so it sees exactly what it would see alone. Where all turns share one message, it
is part of what they share.

Half of the lessons fill the slot in the sender's rhythm (one embedding per token of the sender: the mean of the
receiver's own embeddings of the same characters), and every slot can get Gaussian noise. Both make the agent at home
with what a link will write there.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recmas.lab.tasks import Task
from recmas.lab.vocabulary import tokenizer_for
from recmas.lab.world import Turn, draw_world
from recmas.prompts.renderer import PromptRenderer
from recmas.prompts.template import Slot, Template
from recmas.training.counterparts import aligned_tokens

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
    """Makes the lessons of one role of a task; worlds and messages are drawn from (role, split, seed)."""

    def __init__(self, task: Task, role: str, split: str, seed: int) -> None:
        self.role, self.tokenizer = role, tokenizer_for(role, task.marks)
        self._turns, self._one_message = task.turns, role in task.one_message
        self._rng = random.Random(f"pretrain/{role}/{split}/{seed}")
        self._unvalued = {self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(list(task.marks))}
        prompts = task.prompts[role]
        text = prompts.get("later", prompts["first"])
        template = Template(text.replace("{{question}}", "{{from:question}}"))  # it stands where a message would
        renderer = PromptRenderer(self.tokenizer, chat=False)
        (sender,) = template.senders
        source = self.tokenizer if sender == "question" else tokenizer_for(sender, task.marks)

        def around(fields: Mapping[str, str]) -> tuple[list[int], list[int]]:
            before, slot, after = renderer.segments(template, {**dict.fromkeys(template.fields, ""), **fields})
            if isinstance(before, Slot) or not isinstance(slot, Slot) or isinstance(after, Slot):
                raise TypeError(f"the {role}'s template must be a slot between two texts")
            return before, after

        @functools.cache
        def cue(fields: tuple[tuple[str, str], ...]) -> list[int]:
            return around(dict(fields))[1]

        @functools.cache
        def spelled(word: str) -> list[int]:
            return list(self.tokenizer(word, add_special_tokens=False)["input_ids"])

        @functools.cache
        def spoken(word: str) -> list[tuple[int, int]]:
            groups, ids = aligned_tokens(source, self.tokenizer, [word])
            return [(ids[0][group[0]], ids[0][group[-1]]) for group in groups[0]]

        self._around, self._cue, self._spelled, self._spoken = around, cue, spelled, spoken

    def lesson(self, sheets: int, turns: int, noise: float, reply_noise: float = 0.0) -> Lesson:
        """A batch of ``sheets`` x ``turns`` turns, all in one rhythm.

        Their noise is drawn from 0 to ``noise``; ``reply_noise`` is the share of it that replies get, too.
        """
        as_sender = self._rng.random() < 0.5
        lines: list[list[_Position]] = []
        shared = 0
        for _ in range(sheets):
            world = draw_world(self._rng)
            before, _ = self._around({f"{self.role}_sheet": world.sheet(self.role, self._rng)})
            line = [_Position((token, token)) for token in before]
            shared = len(line)
            for number, turn in enumerate(itertools.islice(self._turns(self.role, world, self._rng), turns)):
                level = self._rng.uniform(0.0, noise)
                if number == 0 or not self._one_message:
                    line += self._slot(turn, as_sender, level)
                if number == 0 and self._one_message:
                    shared = len(line)
                line += self._reply(turn, reply_noise * level)
            lines.append(line)
        return Lesson(
            torch.tensor([[position.group for position in line] for line in lines]),
            torch.tensor([[position.label for position in line] for line in lines]),
            torch.tensor([[position.noise for position in line] for line in lines]),
            torch.tensor([[position.value for position in line] for line in lines]),
            *turn_layout(shared, turns, (len(line) - shared) // turns),
        )

    def _slot(self, turn: Turn, as_sender: bool, level: float) -> list[_Position]:
        slot: list[_Position] = []
        for word, found in zip(turn.message.split(), turn.found, strict=True):
            written = self._spoken(word) if as_sender else [(token, token) for token in self._spelled(word)]
            slot += [_Position(group, noise=level) for group in written]
            if found is not None:  # without this label the look-up is found far later
                slot[-1] = slot[-1]._replace(label=self._spelled(found)[0])
        return slot

    def _reply(self, turn: Turn, level: float) -> list[_Position]:
        reply = [token for word in turn.reply.split() for token in self._spelled(word)]
        cue = self._cue(tuple(turn.fields.items()))
        said = [_Position((token, token)) for token in cue]
        said += [_Position((token, token), noise=level) for token in reply]
        for index, token in enumerate([*reply, self.tokenizer.eos_token_id], len(cue) - 1):
            said[index] = said[index]._replace(label=token, value=token not in self._unvalued)
        return said


@functools.cache
def turn_layout(sheet_tokens: int, turns: int, turn_tokens: int) -> tuple[Tensor, Tensor]:
    """Visibility ``[1, 1, T, T]`` and positions ``[1, T]`` of independent turns behind one sheet."""
    turn = torch.cat([torch.full((sheet_tokens,), -1), torch.arange(turns).repeat_interleave(turn_tokens)])
    index = torch.arange(len(turn))
    causal = index[:, None] >= index[None, :]
    visible = causal & ((turn[None, :] == -1) | (turn[:, None] == turn[None, :]))
    positions = torch.cat([torch.arange(sheet_tokens), sheet_tokens + torch.arange(turn_tokens).repeat(turns)])
    return visible[None, None], positions[None]
