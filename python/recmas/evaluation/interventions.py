"""The arms of an audit: ways of answering that leave all but one thing of a system as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recmas.answering.plan import OnMessage
from recmas.config.pattern import LinkKey, Visit
from recmas.config.system_json import edge_name
from recmas.engine.messages import Latents, Message, Prompt
from recmas.evaluation.untrained_links import passing, respun, shared_tokens
from recmas.prompts.rows import Fields
from recmas.recursive_mas import RecursiveMAS
from recmas.system.member import Member
from recmas_kernels import RecursiveLink

TRAINED = "trained"
SHUFFLED = "shuffled"
ARMS = {
    TRAINED: "the system as it is",
    "identity": "each link passes its input on, at the scale of the embeddings it writes among; between different "
    "widths, the least-squares map of the embeddings of tokens that both models spell alike",
    "random": "each weight matrix keeps its singular values, and gets random orthogonal bases",
    SHUFFLED: "every message is that of another question of the batch",
    "noise": "every latent that a receiver reads is Gaussian noise of the same norm",
    "zeros": "every latent that a receiver reads is zero",
    "round 1": "in every round, the messages of the first one",
    "no latents": "m = 0: every slot is empty",
    "text": "the agents write texts to each other",
}
"""By name, what an arm does."""
_CHANGES: dict[str, dict[str, Any]] = {"no latents": {"latent_steps": 0}, "text": {"mode": "text"}}

Change = Callable[[Tensor], Tensor]


class Overheard(RecursiveMAS):
    """A system that keeps the prompt from which the last answer of a batch was written.

    Attributes:
        final_prompt: that prompt.
        change: what becomes of latents on their way out of a link, or of several links that fill one slot together,
            into a prompt; None leaves them.
    """

    final_prompt: Prompt | None = None
    change: Change | None = None

    def member(self, role: str) -> Member:
        member = super().member(role)
        return member if self.change is None else _Changed(**vars(member), change=self.change)

    def prompt(self, visit: Visit, rows: Sequence[Fields], messages: Mapping[str, Message]) -> Prompt:
        prompt = super().prompt(visit, rows, messages)
        if visit.final:
            self.final_prompt = prompt
        return prompt


@dataclass(frozen=True, kw_only=True)
class _Changed(Member):
    """An agent whose slots hold what `change` makes of what would be in them."""

    change: Change

    def _slot_link(self, keys: Sequence[LinkKey]) -> nn.Module:
        return _Then(super()._slot_link(keys), self.change)


class _Then(nn.Module):
    """A link, and a change of what comes out of it."""

    def __init__(self, link: nn.Module, change: Change) -> None:
        super().__init__()
        self.link, self.change = link, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.link(x))


@dataclass(frozen=True)
class Arm:
    """An arm, ready to answer: a system, changes of `AnswerOptions`, and what happens to messages."""

    system: Overheard
    changes: Mapping[str, Any] = field(default_factory=dict)
    on_message: OnMessage | None = None


def why_left_out(name: str, system: RecursiveMAS, rounds: int) -> str:
    """Why this arm says nothing of this run; empty if it does."""
    if name == "round 1" and rounds == 1:
        return "there is one round only"
    if name == "identity":
        for key in system.outer_links:
            sender, receiver = (system.agents[role] for role in key[:2])
            if sender.hidden_size != receiver.hidden_size and not shared_tokens(sender, receiver)[0]:
                return f"{edge_name(key)}: the widths differ, and the vocabularies share no token"
    return ""


def arm(name: str, system: RecursiveMAS, seed: int) -> Arm:
    """The arm of this name.

    Args:
        name: of `ARMS`.
        system: what is audited, and left as it is; agents are shared, links where they are the trained ones.
        seed: of whatever is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    inner, outer = system.inner_links, system.outer_links
    if name == "identity":
        inner = {role: passing(system.agents[role], system.agents[role]) for role in inner}
        outer = {key: passing(system.agents[key[0]], system.agents[key[1]], outer=True) for key in outer}
    elif name == "random":
        inner = {role: respun(link, generator) for role, link in inner.items()}
        outer = {key: respun(link, generator) for key, link in outer.items()}
    heard = _with_links(system, inner, outer)
    heard.change = {"noise": _noise(generator), "zeros": torch.zeros_like}.get(name)
    return Arm(heard, _CHANGES.get(name, {}), _message(name, seed))


def _message(name: str, seed: int) -> OnMessage | None:
    if name == "round 1":
        return _first_round()
    return _shuffled(seed) if name == SHUFFLED else None


def _with_links(
    system: RecursiveMAS, inner: Mapping[str, RecursiveLink], outer: Mapping[LinkKey, RecursiveLink]
) -> Overheard:
    return Overheard(
        system.agents,
        inner,
        outer,
        system.pattern,
        settings=system.settings,
        defaults=system.defaults,
        edge_scores=system.edge_scores,
        offload=None if system.offloader is None else system.devices,
    )


def _noise(generator: torch.Generator) -> Change:
    def change(rows: Tensor) -> Tensor:
        drawn = torch.randn(rows.shape, generator=generator).to(rows)
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True) / torch.linalg.vector_norm(
            drawn, dim=-1, keepdim=True
        )
        return drawn * scale

    return change


def _shuffled(seed: int) -> OnMessage:
    """Each row of a batch gets the message of another one, at every visit that of the same other one."""

    def change(visit: Visit, message: Message) -> Message:
        assert isinstance(message, Latents)
        others = derangement(len(message.states), seed)
        return Latents(message.states[others], message.lengths)

    return change


def derangement(count: int, seed: int) -> list[int]:
    """For each of `count` places (two or more) another one; all places are on one random circle."""
    circle = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return [following[place] for place in range(count)]


def _first_round() -> OnMessage:
    first: dict[str, Message] = {}

    def change(visit: Visit, message: Message) -> Message:
        if visit.round == 1:
            first[visit.role] = message
        return first[visit.role]

    return change
