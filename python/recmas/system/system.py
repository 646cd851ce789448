"""`System`: agents, links and a pattern, and the walk of one batch through them, for inference and training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from recmas.agents.agent import Agent
from recmas.config.outline import Outline
from recmas.config.pattern import LinkKey, Pattern, Visit
from recmas.config.system_json import AgentSpec, Defaults
from recmas.devices.failure import named
from recmas.devices.offload import Offloader
from recmas.devices.placement import Devices, Placement, place
from recmas.engine.messages import Message, Prompt, select
from recmas.engine.model_state import ModelStates
from recmas.prompts.rows import Fields, check_fields, earlier
from recmas.prompts.template import Slot, Template
from recmas.system.default_prompts import default_settings
from recmas.system.member import Member, Prompts
from recmas.system.walk import Walk
from recmas.system.widths import check_widths, features
from recmas_kernels import FrozenLinear, RecursiveLink, packed

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Turn:
    """A visit under way: an agent's prompt, and the message that whoever runs the agent puts here.

    Attributes:
        visit: whose turn it is.
        prompt: of the rows that are on their way.
        message: of the same rows.
        stay: places of the rows that go on after this turn; None is all of them.
    """

    visit: Visit
    prompt: Prompt
    message: Message | None = None
    stay: Sequence[int] | None = None


class System:
    """Agents, links and a pattern that fit each other.

    Args:
        agents: one per role of the pattern; roles may share one `Agent`.
        inner_links: by role, ``d -> d``, for every agent that sends.
        outer_links: ``d_source -> d_target``, by (source, target), or by (source, target, round) where a round that is
            sent in has a link of its own.
        pattern: which agent reads whose messages.
        settings: prompt, chat and decoding by role; None takes `default_settings`.
        defaults: rounds and latent steps where a call names none.
        edge_scores: by the same keys, for ``combine="weighted"``: the scalars whose softmax weighs the senders.
        offload: devices that the agents work on, while their weights and links stay in host memory
            (`recmas.devices.offload`); None leaves them where they are.

    Attributes:
        states: what its models compute with, during a run (`recmas.engine.model_state`).

    Raises:
        ValueError: roles, widths, templates or slots that do not fit together; one line that names what is wrong.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        inner_links: Mapping[str, RecursiveLink],
        outer_links: Mapping[LinkKey, RecursiveLink],
        pattern: Pattern,
        *,
        settings: Mapping[str, AgentSpec] | None = None,
        defaults: Defaults | None = None,
        edge_scores: Mapping[LinkKey, nn.Parameter] | None = None,
        offload: Devices | None = None,
    ) -> None:
        for role in pattern.roles:
            if role not in agents:
                raise ValueError(f"agents: role {role!r} of the pattern has no agent")
        for role in [*agents, *inner_links, *(role for key in outer_links for role in key[:2])]:
            if role not in pattern.roles:
                raise ValueError(f"unknown role {role!r}; the pattern has {', '.join(pattern.roles)}")
        self.pattern = pattern
        self.agents = {role: agents[role] for role in pattern.roles}
        self.inner_links = dict(inner_links)
        self.outer_links: dict[LinkKey, RecursiveLink] = dict(outer_links)
        self.defaults = defaults or Defaults()
        self.settings = dict(
            settings or {role: default_settings(pattern, role, agents[role]) for role in pattern.roles}
        )
        self.edge_scores: dict[LinkKey, nn.Parameter] = dict(edge_scores or {})
        if pattern.combine == "weighted":
            for key in self.outer_links:
                self.edge_scores.setdefault(key, nn.Parameter(torch.zeros((), device=self.agents[key[1]].device)))
        self._check_widths()
        self._prompts = {
            role: Prompts(role, setting, self.agents[role].tokenizer, self.agents[role].vocabulary)
            for role, setting in self.settings.items()
        }
        self.check_run(1, links=False)
        self.states = ModelStates()
        self.offloader = None if offload is None else self._new_offloader(place(offload, pattern.roles))

    def to(self, device: Devices | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move (and cast) agents and links.

        Args:
            device: for all agents, or by role; None, and a role left out, stays where it is.
            dtype: None stays what it is.

        Raises:
            ValueError: an unknown role, a device that cannot be used, or two devices for roles that share a model.
        """
        placement = self.devices if device is None else place(device, self.pattern.roles, self.devices)
        owners: dict[int, str] = {}
        for role, agent in self.agents.items():
            first = owners.setdefault(id(agent.model), role)
            if self.offloader is None and placement[first] != placement[role]:
                raise ValueError(
                    f"device: {first!r} and {role!r} share one model, which cannot be on both {placement[first]} and "
                    f"{placement[role]}"
                )
        if self.offloader is None:
            places = placement
        else:
            self.offloader.unload()
            places = dict.fromkeys(placement, torch.device("cpu"))
        for role, agent in self.agents.items():
            agent.to(device=places[role], dtype=dtype)
        self._place_links(places, dtype)
        if self.offloader is not None:
            self.offloader = self._new_offloader(placement)
        return self

    @property
    def devices(self) -> Placement:
        """The device that each agent works on, by role."""
        if self.offloader is not None:
            return dict(self.offloader.placement)
        return {role: agent.device for role, agent in self.agents.items()}

    def load_weights(self, role: str) -> None:
        """Under offload: copy what `role` works with to its device."""
        if self.offloader is not None:
            self.offloader.load(role)

    def packed_links(self) -> AbstractContextManager[None]:
        """For callers that write no weights inside: the links' weights packed (`recmas_kernels.packed`).

        Under offload nothing is packed, since the weights that links work with do not stay.
        """
        if self.offloader is not None:
            return nullcontext()
        return packed(self.inner_links.values(), self.outer_links.values())

    def unload_weights(self) -> None:
        """At the end of a run: drop copies on devices, under offload, and what states hold of weights."""
        self.states.forget()  # who moves or replaces weights afterwards gets their memory back
        if self.offloader is not None:
            self.offloader.unload()

    def walk(self, rows: Sequence[Fields], rounds: int) -> Iterator[Turn]:
        """The visits of a run in the pattern's order, each with its prompt (`recmas.system.walk`).

        Whoever takes a `Turn` runs the agent and puts its message there before asking for the next one.

        Args:
            rows: one batch.
            rounds: number of rounds.
        """
        walk: Walk[Message] = Walk(self.pattern, rounds)
        while ready := walk.ready():
            visit = ready[0]
            sent = walk.begin(visit)
            with named(f"agent {visit.role!r}", self.devices[visit.role]):
                self.load_weights(visit.role)
                turn = Turn(visit, self.prompt(visit, rows, sent))
            yield turn
            if turn.message is None:
                raise RuntimeError(f"the turn of {visit.role!r} in round {visit.round} ended without a message")
            walk.end(visit, turn.message)
            if turn.stay is not None:
                rows = [rows[place] for place in turn.stay]
                if not rows:
                    return
                walk.change(partial(select, rows=turn.stay))

    def member(self, role: str) -> Member:
        """One agent with its links and prompts, as they are now."""
        outer = {key: link for key, link in self.outer_links.items() if key[1] == role}
        scores = None
        if self.pattern.combine == "weighted":
            scores = {key: self.edge_scores[key] for key in outer}
        return Member(role, self.agents[role], self._prompts[role], self.inner_links.get(role), outer, scores)

    def prompt(self, visit: Visit, rows: Sequence[Fields], messages: Mapping[str, Message]) -> Prompt:
        """Render and assemble the prompts of one visit.

        Args:
            visit: whose turn it is.
            rows: one batch.
            messages: by sender: texts (one per row) go into the template as text, `Latents` through the outer link.
        """
        return self.member(visit.role).prompt([visit] * len(rows), rows, messages)

    def segments(self, visit: Visit, row: Fields, texts: Mapping[str, str] | None = None) -> list[list[int] | Slot]:
        """Token ids and slots of one row's prompt; `texts` stand in the slots of their senders."""
        return self._prompts[visit.role].segments(visit.round, row, texts)

    def text_segments(self, role: str, text: str) -> list[list[int] | Slot]:
        """Token ids of any text as `role`'s prompt: in its chat template where it has one."""
        return self._prompts[role].text_segments(text)

    def prefix_ids(self, visit: Visit, rows: Sequence[Fields]) -> list[list[int]]:
        """Token ids that stand before the first slot of each row's prompt of one visit."""
        return self._prompts[visit.role].prefix_ids([visit.round] * len(rows), rows)

    def constant_ids(self, visit: Visit) -> list[int]:
        """Token ids that prompts of one visit begin with whatever their rows say (`Prompts.constant_ids`)."""
        return self._prompts[visit.role].constant_ids(visit.round)

    def template(self, role: str, round: int) -> Template:
        """The template that `role` uses in `round`."""
        return self._prompts[role].template(round)

    @property
    def outline(self) -> Outline:
        """The system without its models."""
        inner, outer = self.inner_links.keys(), self.outer_links.keys()
        return Outline(self.pattern, self.settings, self.defaults, inner, outer)

    def check_run(self, rounds: int, *, links: bool = True) -> None:
        """Raise ValueError, before any model runs, if a slot or (with `links`) a link for so many rounds is missing."""
        self.outline.check_run(rounds, links=links)

    def check_rows(self, rows: Sequence[Fields], rounds: int) -> None:
        """Raise ValueError, naming row number and field, if a row lacks a field that a template of the run names."""
        self.check_fields(rows, self.pattern.visits(min(rounds, 2)))
        for row in rows:
            if earlier(row):
                for prompts in self._prompts.values():
                    prompts.renderer.check_chat(row)

    def check_fields(self, rows: Sequence[Fields], visits: Iterable[Visit]) -> None:
        """`check_rows` for the templates of these visits alone."""
        readers = {field: visit.role for visit in visits for field in self.template(visit.role, visit.round).fields}
        for index, row in enumerate(rows):
            check_fields(row, index, readers)

    def steps_by_role(self, asked: int | Mapping[str, int] | None) -> dict[str, int]:
        """Latent steps of every agent (`recmas.config.system_json.steps_by_role`)."""
        return self.outline.steps_by_role(asked)

    def _new_offloader(self, placement: Placement) -> Offloader:
        for agent in self.agents.values():
            agent.unpack()  # copies on other devices read plain weights
        for role, agent in self.agents.items():
            if any(isinstance(part, FrozenLinear) and part.packed() is not None for part in agent.model.modules()):
                raise ValueError(
                    f"offload: the model of {role!r} is packed for somebody else, too: unpack it there first"
                )
        parts: dict[str, list[nn.Module]] = {role: [agent.model] for role, agent in self.agents.items()}
        for role, link in self.inner_links.items():
            parts[role].append(link)
        for key, outer in self.outer_links.items():
            parts[key[1]].append(outer)
        return Offloader(placement, parts)

    def _place_links(self, placement: Placement, dtype: torch.dtype | None) -> None:
        for role, link in self.inner_links.items():
            link.to(device=placement[role], dtype=dtype)
        for key, link in self.outer_links.items():
            link.to(device=placement[key[1]], dtype=dtype)
        for key, score in self.edge_scores.items():
            if score.device != placement[key[1]]:
                moved = score.detach().to(placement[key[1]])
                self.edge_scores[key] = nn.Parameter(moved, requires_grad=score.requires_grad)

    def _check_widths(self) -> None:
        check_widths(
            {role: agent.hidden_size for role, agent in self.agents.items()},
            {role: features(link) for role, link in self.inner_links.items()},
            {edge: features(link) for edge, link in self.outer_links.items()},
        )
