"""`Outline`: a system without its models: enough to check and plan a run. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from recmas.config.pattern import LinkKey, Pattern, link_key
from recmas.config.system_json import AgentSpec, Defaults, SystemSpec, edge_name, steps_by_role
from recmas.prompts.template import Template


@dataclass(frozen=True)
class Outline:
    """What a run can be checked against before any model is there.

    Attributes:
        pattern: of the system.
        settings: prompt, chat and decoding by role.
        defaults: rounds and latent steps where a call names none.
        inner: roles that have an inner link.
        outer: edges, or edges in one round, that have an outer link.
    """

    pattern: Pattern
    settings: Mapping[str, AgentSpec]
    defaults: Defaults
    inner: Set[str]
    outer: Set[LinkKey]

    @classmethod
    def of(cls, spec: SystemSpec) -> Outline:
        """The outline of a system on disk."""
        inner = {role for role, agent in spec.agents.items() if agent.inner_link is not None}
        return cls(spec.pattern, spec.agents, spec.defaults, inner, set(spec.outer_links))

    def check_run(self, rounds: int, *, links: bool = True) -> None:
        """Raise ValueError if a slot or (with `links`) a link for so many rounds is missing."""
        needed = self.links_needed(rounds)
        if links and (missing := sorted(edge_name(key) for key in needed if key not in self.outer)):
            raise ValueError(f"rounds={rounds} needs outer links that the system lacks: {', '.join(missing)}")
        if links and (without := sorted({key[0] for key in needed} - self.inner)):
            raise ValueError(f"rounds={rounds} needs inner links that the system lacks: {', '.join(without)}")
        joint = self.pattern.combine != "slots"
        for visit in self.pattern.visits(min(rounds, 2)):
            template = Template(self.settings[visit.role].prompt.at(visit.round))
            template.check_senders(visit.senders, joint, f"agent {visit.role!r}, round {visit.round}")

    def links_needed(self, rounds: int) -> list[LinkKey]:
        """Keys of the outer links that so many rounds go through, lacking ones too, in order of their first use."""
        by_round = any(len(key) == 3 for key in self.outer)
        sent = self.pattern.links_by_round(rounds if by_round else min(rounds, 2))
        return list(dict.fromkeys(link_key(self.outer, *one) for one in sent))

    def steps_by_role(self, asked: int | Mapping[str, int] | None) -> dict[str, int]:
        """Latent steps of every agent (`recmas.config.system_json.steps_by_role`)."""
        return steps_by_role(self.settings, self.defaults, asked)
