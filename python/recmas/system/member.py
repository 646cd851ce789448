"""`Member`: one agent of a system, with its links and prompts; all that its visits need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recmas.agents.agent import Agent
from recmas.agents.chat_template import ChatTemplate
from recmas.config.pattern import LinkKey, Visit, link_key
from recmas.config.system_json import AgentSpec
from recmas.engine.cache_snapshot import agreeing
from recmas.engine.messages import Latents, Message, Prompt
from recmas.prompts.renderer import PromptRenderer
from recmas.prompts.rows import Fields
from recmas.prompts.template import Slot, Template
from recmas.system.joint_link import JointLink, join
from recmas.system.prompt_assembly import assemble
from recmas_kernels import RecursiveLink

_ANY_TEXT = Template("{{text}}")


class Prompts:
    """The prompts of one agent: its templates, and the renderer that makes token ids of them."""

    def __init__(self, role: str, setting: AgentSpec, tokenizer: Any, vocabulary: int) -> None:
        self.role, self.setting = role, setting
        self.renderer = PromptRenderer(
            tokenizer,
            setting.chat,
            setting.system,
            name=f"agent {role!r}",
            apply=ChatTemplate(tokenizer),
            vocabulary=vocabulary,
        )
        self._templates = {
            text: Template(text) for text in (setting.prompt.first, setting.prompt.later) if text is not None
        }
        self._constants: dict[Template, list[int]] = {}

    def template(self, round: int) -> Template:
        """The template of `round`."""
        text = self.setting.prompt.at(round)
        if text not in self._templates:  # a setting may have been changed since
            self._templates[text] = Template(text)
        return self._templates[text]

    def segments(self, round: int, row: Fields, texts: Mapping[str, str] | None = None) -> list[list[int] | Slot]:
        """Token ids and slots of one row's prompt; `texts` stand in the slots of their senders."""
        return self.renderer.segments(self.template(round), row, texts or {})

    def text_segments(self, text: str) -> list[list[int] | Slot]:
        """Token ids of any text as this agent's prompt: in its chat template where it has one."""
        return self.renderer.segments(_ANY_TEXT, {"text": text})

    def prefix_ids(self, rounds: Sequence[int], rows: Sequence[Fields]) -> list[list[int]]:
        """Token ids that stand before the first slot of each row's prompt of its round."""
        found: list[list[int]] = []
        for round, row in zip(rounds, rows, strict=True):
            found.append([])
            for segment in self.segments(round, row):
                if isinstance(segment, Slot):
                    break
                found[-1] += segment
        return found

    def constant_ids(self, round: int) -> list[int]:
        """Token ids that all prompts of a round begin with whose rows hold no earlier messages.

        The token right before a field is left out, since what a row puts there may change it.
        """
        template = self.template(round)
        if template not in self._constants:
            rows = [dict.fromkeys(template.fields, text) for text in ("a", "7")]
            one, other = self.prefix_ids([round] * 2, rows)
            self._constants[template] = one[: agreeing(one, other)][:-1]
        return self._constants[template]


@dataclass(frozen=True)
class Member:
    """One agent of a system, with all that its visits need.

    Attributes:
        role: its name in the pattern.
        agent: the model.
        prompts: its prompts.
        inner_link: ``d -> d``; None where it sends no latents.
        outer_links: the links to it, by key.
        scores: of these links, by key, where their joint weights were learned; None takes their mean.
    """

    role: str
    agent: Agent
    prompts: Prompts
    inner_link: RecursiveLink | None
    outer_links: Mapping[LinkKey, RecursiveLink]
    scores: Mapping[LinkKey, torch.Tensor] | None = None

    def prompt(self, visits: Sequence[Visit], rows: Sequence[Fields], messages: Mapping[str, Message]) -> Prompt:
        """Render and assemble the prompts of one batch.

        Args:
            visits: of each row; all are visits of this agent, perhaps in different rounds.
            rows: the batch.
            messages: by sender: texts (one per row) go into the template as text, `Latents` through the outer link. A
                row whose visit reads no message of a sender has none of it: an empty text, or no latents.
        """
        texts = {role: message for role, message in messages.items() if not isinstance(message, Latents)}
        segments = [
            self.prompts.segments(
                visit.round, row, {role: text[index] for role, text in texts.items() if role in visit.senders}
            )
            for index, (visit, row) in enumerate(zip(visits, rows, strict=True))
        ]
        latents: dict[tuple[str, ...], Latents] = {}
        links: dict[tuple[str, ...], list[nn.Module | None]] = {}
        for template in {visit.round: self.prompts.template(visit.round) for visit in visits}.values():
            for slot in template.slots:
                if slot.senders not in latents and all(role not in texts for role in slot.senders):
                    sent = [messages[role] for role in slot.senders]
                    latents[slot.senders] = join([m.to(self.agent.device) for m in sent if isinstance(m, Latents)])
                    links[slot.senders] = self._slot_links(slot.senders, visits)
        agent = self.agent
        return assemble(agent.embed, segments, latents, links, pad_id=agent.pad_id, device=agent.device)

    def link_key(self, sender: str, visit: Visit) -> LinkKey:
        """The key of the link from `sender` to this agent in one of its visits."""
        return link_key(self.outer_links, sender, self.role, visit.sender_rounds[visit.senders.index(sender)])

    def _slot_links(self, senders: Sequence[str], visits: Sequence[Visit]) -> list[nn.Module | None]:
        """What latents of these senders go through into their slot, by row; rows with equal keys share one module."""
        made: dict[tuple[LinkKey, ...], nn.Module] = {}
        links: list[nn.Module | None] = []
        for visit in visits:
            if not set(senders) <= set(visit.senders):
                links.append(None)
                continue
            keys = tuple(self.link_key(sender, visit) for sender in senders)
            if keys not in made:
                made[keys] = self._slot_link(keys)
            links.append(made[keys])
        return links

    def _slot_link(self, keys: Sequence[LinkKey]) -> nn.Module:
        links = [self.outer_links[key] for key in keys]
        if len(links) == 1:
            return links[0]
        if self.scores is None:
            weights = torch.full((len(links),), 1 / len(links), device=self.agent.device)
        else:
            weights = torch.stack([self.scores[key] for key in keys]).softmax(dim=0).to(self.agent.device)
        return JointLink(links, [link.config.in_features for link in links], weights)
