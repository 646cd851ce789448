"""`Outline`: a system without its models: enough to check and plan a run. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from recmas.config.pattern import Edge, Pattern
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
        outer: edges that have an outer link.
    """

    pattern: Pattern
    settings: Mapping[str, AgentSpec]
    defaults: Defaults
    inner: Set[str]
    outer: Set[Edge]

    @classmethod
    def of(cls, spec: SystemSpec) -> Outline:
        """The outline of a system on disk."""
        inner = {role for role, agent in spec.agents.items() if agent.inner_link is not None}
        return cls(spec.pattern, spec.agents, spec.defaults, inner, set(spec.outer_links))

    def check_run(self, rounds: int, *, links: bool = True) -> None:
        """Raise ValueError if a slot or (with `links`) a link for so many rounds is missing."""
        edges = self.pattern.edges(rounds)
        if links and (missing := sorted(edge_name(edge) for edge in edges - self.outer)):
            raise ValueError(f"rounds={rounds} needs outer links that the system lacks: {', '.join(missing)}")
        if links and (without := sorted({source for source, _ in edges} - self.inner)):
            raise ValueError(f"rounds={rounds} needs inner links that the system lacks: {', '.join(without)}")
        joint = self.pattern.combine != "slots"
        for visit in self.pattern.visits(min(rounds, 2)):
            template = Template(self.settings[visit.role].prompt.at(visit.round))
            template.check_senders(visit.senders, joint, f"agent {visit.role!r}, round {visit.round}")

    def steps_by_role(self, asked: int | Mapping[str, int] | None) -> dict[str, int]:
        """Latent steps of every agent (`recmas.config.system_json.steps_by_role`)."""
        return steps_by_role(self.settings, self.defaults, asked)
