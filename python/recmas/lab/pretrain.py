"""Pretraining of one agent of the lab on its lessons, from random weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recmas.lab.agents import fresh_model, widen
from recmas.lab.lessons import UNSCORED, Lesson, School
from recmas.lab.tasks import LIST, RELAY, Task
from recmas.lab.world import ROLES


@dataclass(frozen=True)
class PretrainSettings:
    """How an agent is pretrained.

    Attributes:
        sheets: of a batch.
        turns: of a sheet.
        asked: of a sheet where its turns share one message, instead.
        slot_noise: largest rms of the noise on a slot, relative to the embeddings'.
        reply_noise: share of a slot's noise that its reply gets, too.
        solved: share of right values (moving average, with noise) that starts the cooldown.
        cooldown: steps of linear decay to zero.
        max_steps: steps in all, if the task is not solved before.
    """

    sheets: int = 32
    turns: int = 8
    asked: int = 6
    slot_noise: float = 0.5
    reply_noise: float = 0.0
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    solved: float = 0.99
    cooldown: int = 300
    max_steps: int = 3000


SETTINGS = {RELAY.name: PretrainSettings(), LIST.name: PretrainSettings(sheets=24, turns=1, reply_noise=0.5)}
"""By task; a list is ten look-ups in one turn."""


def pretrain(
    task: Task, role: str, seed: int, settings: PretrainSettings, *, progress: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, float]]:
    """Train one agent from scratch (fp32, CPU, with as many threads as torch has).

    Returns:
        The model in eval mode, its tokenizer, and ``steps`` and ``accuracy``: the share of value tokens predicted right
        in validation worlds, without noise.
    """
    school = School(task, role, "train", seed)
    turns = settings.asked if role in task.one_message else settings.turns
    model = fresh_model(role, school.tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    right, stop = 0.0, settings.max_steps
    model.train()
    line = ROLES.index(role)
    hidden = None if progress else True  # None: where stderr is not a terminal
    for step in tqdm(itertools.count(), f"pretrain {role}", unit="step", position=line, disable=hidden):
        if step >= stop:
            break
        remaining = min(1.0, (stop - step) / settings.cooldown)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min((step + 1) / settings.warmup_steps, remaining)
        lesson = school.lesson(settings.sheets, turns, settings.slot_noise, settings.reply_noise)
        logits, labels, values = _predictions(model, lesson, generator)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.9 * right + 0.1 * _share_right(logits, labels, values)
        if right > settings.solved:
            stop = min(stop, step + 1 + settings.cooldown)
    model.eval().requires_grad_(False)
    exam = School(task, role, "validation", seed).lesson(256, turns, noise=0.0)
    with torch.no_grad():
        accuracy = _share_right(*_predictions(model, exam, generator))
    if task.vocabulary is not None:
        widen(model, task.vocabulary, seed)
    return model, school.tokenizer, {"steps": step, "accuracy": accuracy}


def _predictions(model: PreTrainedModel, lesson: Lesson, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[n, vocabulary]`` at the labelled positions, their labels ``[n]`` and which predict a value ``[n]``."""
    table = model.get_input_embeddings().weight
    embeds = F.embedding(lesson.groups, table).mean(dim=2)
    rms = table.detach().square().mean().sqrt()
    noise = torch.randn(embeds.shape, generator=generator) * (rms * lesson.noise)[..., None]
    hidden = model.base_model(
        inputs_embeds=embeds + noise,
        attention_mask=lesson.visible,
        position_ids=lesson.positions.expand(len(embeds), -1),
        use_cache=False,
    ).last_hidden_state
    scored = lesson.labels != UNSCORED
    return model.get_output_embeddings()(hidden[scored]), lesson.labels[scored], lesson.values[scored]


def _share_right(logits: Tensor, labels: Tensor, values: Tensor) -> float:
    return (logits.argmax(dim=-1) == labels)[values].float().mean().item()
