"""General links between real models: trained on word lists and messages of the known half, never on questions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recmas import Agent, RecursiveMAS
from recmas.engine.messages import run_link
from recmas.lab import gym
from recmas.lab.copies import common_words, copies
from recmas.lab.notes import held_back, notes_system, texts
from recmas.training import InnerConfig, WarmupConfig, train_inner, train_warmup
from recmas.training.counterparts import aligned_tokens
from recmas.training.inner import inner_loss
from recmas.training.pairs import speak, utterances
from recmas.training.warmup import warmup_loss
from recmas_kernels import FusedRecursiveLink

NOTES = "notes"
"""The task that links are trained beside; others are those of `recmas.lab.gym`."""
EDGE = ("reader", "solver")
TRAINED, WATCHED, HELD_OUT = 0, 1, 2
"""Seeds of the texts: to train on, the same for all links; to choose the best step by; to judge links by."""
HELD = 16
"""Rows that links are judged by."""


def train_links(
    agents: Mapping[str, Agent], seed: int, lists: int, steps: int, cache: Path
) -> tuple[RecursiveMAS, dict[str, Any]]:
    """The notes system of a reader and a solver with general links, and the record of their training.

    Args:
        agents: by role.
        seed: of the links as they are drawn, and of the order of the texts; the texts are the same for every seed.
        lists: word lists to train on; a fourth as many messages beside them.
        steps: of each link.
        cache: folder of the reader's pairs.
    """
    system = notes_system(agents, seed)
    words = common_words(list(agents.values()), held_back())
    rows = [*copies(words, TRAINED, lists), *texts(TRAINED, lists // 4)]
    started = time.perf_counter()
    shared: dict[str, Any] = {"steps": steps, "learning_rate": 5e-4, "link_init": "ridge", "seed": seed}
    given: dict[str, Any] = {"validation": copies(words, WATCHED, HELD), "cache": cache, "progress": False}
    train_inner(system, rows, InnerConfig(**shared), **given)
    train_warmup(system, rows, WarmupConfig(**shared), **given)
    record = {"stage": "general", "seed": seed, "lists": lists, "messages": lists // 4, "steps": steps}
    record |= {"words": len(words), "seconds": time.perf_counter() - started}
    return system, record | {"held out": held_out(system, words)}


def held_out(system: RecursiveMAS, words: Sequence[str]) -> dict[str, dict[str, float]]:
    """What `judged` says of texts that no link was trained on, by kind of text."""
    kinds = {
        "word lists": copies(words, HELD_OUT, HELD),
        "messages, known": texts(HELD_OUT, HELD),
        "messages, unknown": texts(HELD_OUT, HELD, "unknown"),
    }
    return {kind: judged(system, rows) for kind, rows in kinds.items()}


@torch.no_grad()
def judged(system: RecursiveMAS, rows: list[dict[str, object]]) -> dict[str, float]:
    """Cosines of both links' outputs with their targets, and how often the nearest embedding is the very token.

    The outer link is asked for words that are one token of the solver's vocabulary. "reader's head" is how often the
    reader itself finds the token in the states that its link reads: what a link could reach.
    """
    reader, solver = (system.agents[role] for role in EDGE)
    pairs = speak(reader, utterances(system, "reader", rows, 1))
    latents = run_link(system.inner_links["reader"], pairs.hidden)
    groups, ids = aligned_tokens(reader.tokenizer, solver.tokenizer, pairs.texts)
    wanted: list[int] = []
    for members, own, length in zip(groups, ids, pairs.lengths, strict=True):
        padded = [*members, *[[]] * length][:length]
        wanted += [own[found[0]] if len(found) == 1 else -1 for found in padded]
    single = torch.tensor(wanted) >= 0
    sent = run_link(system.outer_links[EDGE], latents[single])
    said = torch.cat([reader.logits(part).argmax(dim=-1) for part in pairs.hidden.split(64)])
    return {
        "reader's head": (said == pairs.ids).float().mean().item(),
        "inner cosine": 1 - inner_loss(system, "reader", rows).item(),
        "outer cosine": 1 - warmup_loss(system, EDGE, rows).item(),
        "inner nearest": (nearest(reader, latents) == pairs.ids).float().mean().item(),
        "outer nearest": (nearest(solver, sent) == torch.tensor(wanted)[single]).float().mean().item(),
    }


def nearest(agent: Agent, rows: torch.Tensor) -> torch.Tensor:
    """Of each row ``[n, d]``, the id of the token whose embedding has the largest cosine with it."""
    table = torch.nn.functional.normalize(agent.model.get_input_embeddings().weight.float(), dim=-1)
    return torch.cat([(part.float() @ table.T).argmax(dim=-1) for part in rows.split(256)])


def save_links(system: RecursiveMAS, folder: Path) -> None:
    """The links alone; models stay where they are."""
    system.inner_links["reader"].save_pretrained(folder / "inner")
    system.outer_links[EDGE].save_pretrained(folder / "outer")


def load_links(agents: Mapping[str, Agent], folder: Path, task: str = NOTES) -> RecursiveMAS:
    """The system of a task with the links of `save_links`, in float32 however they are stored.

    Raises:
        ValueError: there are no links in this folder, or they are of other widths than the agents.
    """
    if not (folder / "outer").is_dir():
        raise ValueError(f"{folder}: no links there")
    system = notes_system(agents, prompts=None if task == NOTES else gym.prompts(task))
    reader, solver = (system.agents[role].hidden_size for role in EDGE)
    made = {name: FusedRecursiveLink.from_pretrained(folder / name).float() for name in ("inner", "outer")}
    for name, widths in (("inner", (reader, reader)), ("outer", (reader, solver))):
        config = made[name].config
        if (config.in_features, config.out_features) != widths:
            found = f"{config.in_features} to {config.out_features}"
            raise ValueError(f"{folder / name}: from {found} features, the models need {widths[0]} to {widths[1]}")
    system.inner_links["reader"], system.outer_links[EDGE] = made["inner"], made["outer"]
    return system
