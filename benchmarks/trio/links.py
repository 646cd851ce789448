"""General links between real models: trained on word lists and messages of the known half, never on questions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recmas import Agent, RecursiveMAS
from recmas.engine.messages import run_link
from recmas.lab.copies import common_words, copies
from recmas.lab.notes import held_back, notes_system, texts
from recmas.training import InnerConfig, WarmupConfig, train_inner, train_warmup
from recmas.training.counterparts import aligned_tokens
from recmas.training.inner import inner_loss
from recmas.training.pairs import speak, utterances
from recmas.training.warmup import warmup_loss
from recmas_kernels import FusedRecursiveLink

EDGE = ("reader", "solver")
HELD = 16
"""Rows that links are judged by."""


def train_links(
    agents: Mapping[str, Agent], seed: int, lists: int, steps: int, cache: Path
) -> tuple[RecursiveMAS, dict[str, Any]]:
    """The notes system of a reader and a solver with general links, and the record of their training.

    Args:
        agents: by role.
        seed: of links, texts and their order.
        lists: word lists to train on; half as many messages beside them.
        steps: of each link.
        cache: folder of the reader's pairs.
    """
    system = notes_system(agents, seed)
    words = common_words(list(agents.values()), held_back())
    rows = [*copies(words, seed, lists), *texts(seed, lists // 2)]
    held = copies(words, seed + 1, HELD)
    started = time.perf_counter()
    shared: dict[str, Any] = {"steps": steps, "learning_rate": 5e-4, "link_init": "ridge", "seed": seed}
    given: dict[str, Any] = {"validation": held, "cache": cache, "progress": False}
    train_inner(system, rows, InnerConfig(**shared), **given)
    train_warmup(system, rows, WarmupConfig(**shared), **given)
    record = {"seed": seed, "lists": lists, "messages": lists // 2, "steps": steps, "words": len(words)}
    record["seconds"] = time.perf_counter() - started
    kinds = {"word lists": held, "known": texts(seed + 1, HELD), "unknown": texts(seed + 1, HELD, "unknown")}
    record["held out"] = {kind: judged(system, rows) for kind, rows in kinds.items()}
    return system, record


@torch.no_grad()
def judged(system: RecursiveMAS, rows: list[dict[str, object]]) -> dict[str, float]:
    """Cosines of both links' outputs with their targets, and how often the nearest embedding is the very token.

    The outer link is asked for words that are one token of the solver's vocabulary.
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
    return {
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


def load_links(agents: Mapping[str, Agent], folder: Path) -> RecursiveMAS:
    """The notes system with the links of `save_links`."""
    system = notes_system(agents)
    system.inner_links["reader"] = FusedRecursiveLink.from_pretrained(folder / "inner")
    system.outer_links[EDGE] = FusedRecursiveLink.from_pretrained(folder / "outer")
    return system
