"""Table 4 in small: links of one, two and three layers, with and without their residual, for link seeds of their own.

All links of a system, inner and outer ones, are of one kind; norms, widths and training are the same for all. Each kind
is asked after the short alignment of `benchmarks.relay.stages`, and after an outer stage on top of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.relay.asked import BATCH, asked, heading, right
from benchmarks.relay.stages import RATE, agents, align, answer, scaled
from recmas import Agent, RecursiveMAS
from recmas.lab.agents import relay_system
from recmas.lab.threads import one_thread
from recmas_kernels import FusedRecursiveLink, LinkConfig

ROUNDS = 3
TRAINED = ("aligned", "aligned, then answers")
"""What a kind is asked after."""


class Kind(NamedTuple):
    """A link's layers, and whether a residual joins them."""

    layers: int
    residual: bool


KINDS = {
    f"{'residual + ' if residual else ''}{layers} layer{'s' if layers > 1 else ''}": Kind(layers, residual)
    for layers in (1, 2, 3)
    for residual in (False, True)
}
"""The paper's table has those of one and two layers."""


def measure(
    count: int, link_seed: int, scale: float, kinds: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell per kind and training: which questions were right in three rounds, and the links' parameters.

    Raises:
        ValueError: a kind that is not in `KINDS`.
    """
    for name in kinds:
        if name not in KINDS:
            raise ValueError(f"links: {name!r} is none of {', '.join(KINDS)}")
    rows, steps, cells, members = asked(count), scaled(scale), [], agents()

    def note(system: RecursiveMAS, name: str, trained: str) -> None:
        answers = system.answer(rows, rounds=ROUNDS, batch_size=BATCH)
        links = [*system.inner_links.values(), *system.outer_links.values()]
        size = sum(parameter.numel() for link in links for parameter in link.parameters())
        cell = {"link_seed": link_seed, "links": name, "trained": trained, "parameters": size}
        cells.append({**cell, "correct": right(answers, rows)})

    with one_thread():
        for name in kinds:
            system = linked(members, KINDS[name], link_seed)
            align(system, link_seed, steps)
            note(system, name, TRAINED[0])
            answer(system, link_seed, steps, (1, 2, 3))
            note(system, name, TRAINED[1])
    return heading(count) | {"rounds": ROUNDS, "steps": steps, "learning_rate": RATE}, cells


def linked(members: Mapping[str, Agent], kind: Kind, seed: int) -> RecursiveMAS:
    """The relay's agents with fresh links of this kind, whose outputs are scaled as those of a new system are."""
    system = relay_system(members, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        system.inner_links = {role: _of(kind, link) for role, link in system.inner_links.items()}
        system.outer_links = {edge: _of(kind, link) for edge, link in system.outer_links.items()}
    return system


def _of(kind: Kind, released: Any) -> FusedRecursiveLink:
    """A fresh link of this kind in the place of a released one. All but those of two layers run as plain torch."""
    shape: LinkConfig = replace(
        released.config, layers=min(kind.layers, 2), residual=released.config.residual if kind.residual else "none"
    )
    link = FusedRecursiveLink(shape)
    if kind.layers == 3:
        width = shape.hidden_features
        link.proj1 = nn.Sequential(link.proj1, nn.GELU(), nn.Linear(width, width))
    assert link.norm_out is not None
    link.norm_out.load_state_dict(released.norm_out.state_dict())
    return link
