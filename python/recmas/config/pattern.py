"""Which agent reads whose messages, and when: a pattern is its stages.

Every agent of a stage receives from every agent of the stage before; in later rounds the first stage receives from
the last one. The four patterns of the paper are constants of one class, and so is any graph of stages a user writes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from recmas.files.reading import shown

COMBINE = ("slots", "mean", "weighted")
EXCHANGE = ("stage", "all")

Edge = tuple[str, str]
LinkKey = Edge | tuple[str, str, int]
"""Whose outer link: an edge's, for all rounds, or for what is sent in one round (from 1)."""
MAX_ROUNDS, MAX_ROLES, MAX_NAME = 256, 64, 64
"""Far more than anybody runs, and little enough that no system that was downloaded can ask for the whole machine."""


class Visit(NamedTuple):
    """One agent at work once: it reads the messages of `senders`, and writes latents, or text when `final`."""

    round: int  # from 1
    stage: int  # from 0
    role: str
    senders: tuple[str, ...]
    sender_rounds: tuple[int, ...]  # round in which each sender wrote the message that is read
    final: bool


@dataclass(frozen=True)
class Pattern:
    """Stages of roles, in order.

    Args:
        stages: roles per stage; the last stage holds the one agent that writes the answer.
        combine: where several senders meet: "slots" (a slot each), "mean" of their vectors, or "weighted" (a softmax of
            one learned scalar per edge); the latter two meet in one joint slot ``{{from:a,b}}``.
        exchange: "stage" (the stage before) or "all" (from round 2 on also what every other agent wrote in the previous
            round).

    Raises:
        ValueError: empty stages, a role that occurs twice or is no plain name, more than one agent in the last stage.
    """

    stages: tuple[tuple[str, ...], ...]
    combine: str = "slots"
    exchange: str = "stage"

    def __post_init__(self) -> None:
        if isinstance(self.stages, str) or any(isinstance(stage, str) for stage in self.stages):
            raise ValueError(f"stages: {shown(self.stages)} has a string where a tuple of roles was expected")
        object.__setattr__(self, "stages", tuple(tuple(stage) for stage in self.stages))
        if not self.stages or not all(self.stages):
            raise ValueError(f"stages: {shown(self.stages)} has no stage or an empty one")
        if len(self.stages[-1]) != 1:
            raise ValueError(f"stages: the last stage is {shown(self.stages[-1])}, expected the one agent that answers")
        if len(self.roles) > MAX_ROLES:
            raise ValueError(f"stages: {len(self.roles)} roles, at most {MAX_ROLES} are possible")
        for role in self.roles:
            if not isinstance(role, str) or not role.replace("_", "a").replace("-", "a").isalnum():
                raise ValueError(f"stages: role {shown(role)} is not a name of letters, digits, '_' and '-'")
            if len(role) > MAX_NAME:
                raise ValueError(f"stages: role {role[:MAX_NAME]}... has more than {MAX_NAME} characters")
            if self.roles.count(role) > 1:
                raise ValueError(f"stages: role {role!r} occurs twice")
        if self.combine not in COMBINE:
            raise ValueError(f"combine: {shown(self.combine)} is not one of {', '.join(COMBINE)}")
        if self.exchange not in EXCHANGE:
            raise ValueError(f"exchange: {shown(self.exchange)} is not one of {', '.join(EXCHANGE)}")

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for stage in self.stages for role in stage)

    @property
    def last(self) -> str:
        """The agent that writes the answer."""
        return self.stages[-1][0]

    def stage_of(self, role: str) -> int:
        for index, stage in enumerate(self.stages):
            if role in stage:
                return index
        raise ValueError(f"unknown role {role!r}; the pattern has {', '.join(self.roles)}")

    def senders(self, role: str, round: int) -> tuple[str, ...]:
        """Roles whose messages `role` reads in `round` (from 1), in slot order."""
        stage = self.stage_of(role)
        if stage > 0:
            senders = self.stages[stage - 1]
        else:
            senders = self.stages[-1] if round > 1 else ()
        if self.exchange == "all" and round > 1:
            senders += tuple(other for other in self.roles if other != role and other not in senders)
        return senders

    def visits(self, rounds: int) -> Iterator[Visit]:
        """Every visit of a run of `rounds` rounds, in an order in which each message exists before it is read.

        No visit is wasted: each stage is read by the next one, the last stage of a round that is not the final one by
        the first stage of the next round.
        """
        check_rounds(rounds)
        return iter(_visits(self, rounds))

    def sent(self, source: str, target: str, round: int) -> int:
        """The round in which `source` wrote what `target` reads in `round`."""
        return round if self.stage_of(source) == self.stage_of(target) - 1 else round - 1

    def links_by_round(self, rounds: int) -> list[tuple[str, str, int]]:
        """Every (source, target, round) of a message of such a run; the round is the one in which it is sent."""
        sent = {
            (sender, visit.role, at): None
            for visit in self.visits(rounds)
            for sender, at in zip(visit.senders, visit.sender_rounds, strict=True)
        }
        return list(sent)

    def edges(self, rounds: int) -> set[Edge]:
        """Every (source, target) that a run of `rounds` rounds uses."""
        check_rounds(rounds)
        return {(source, visit.role) for visit in self.visits(min(rounds, 2)) for source in visit.senders}


@lru_cache(maxsize=16)  # of a thousand rows, each takes the same walk
def _visits(pattern: Pattern, rounds: int) -> list[Visit]:
    found = []
    for round in range(1, rounds + 1):
        for stage, roles in enumerate(pattern.stages):
            for role in roles:
                senders = pattern.senders(role, round)
                rounds_read = tuple(pattern.sent(sender, role, round) for sender in senders)
                found.append(Visit(round, stage, role, senders, rounds_read, round == rounds and role == pattern.last))
    return found


def link_key(links: Collection[LinkKey], source: str, target: str, sent: int) -> LinkKey:
    """The key of the link that maps what `source` sent to `target` in round `sent`: that round's own, or the edge's.

    Where `links` has neither, it is the one that is missing: of a round if the edge has links of other rounds.
    """
    edge, own = (source, target), (source, target, sent)
    if own in links:
        return own
    return own if edge not in links and any(key[:2] == edge for key in links) else edge


def check_rounds(rounds: int) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds: {rounds!r} is not a positive integer")
    if rounds > MAX_ROUNDS:
        raise ValueError(f"rounds: {rounds} is more than {MAX_ROUNDS}")


SEQUENTIAL = Pattern((("planner",), ("critic",), ("solver",)))
MIXTURE = Pattern((("math", "code", "science"), ("summarizer",)))
DISTILLATION = Pattern((("expert",), ("learner",)))
DELIBERATION = Pattern((("reflector",), ("toolcaller",)))

NAMED = {
    "sequential": SEQUENTIAL,
    "mixture": MIXTURE,
    "distillation": DISTILLATION,
    "deliberation": DELIBERATION,
}
