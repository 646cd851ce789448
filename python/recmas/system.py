"""`RecursiveMAS`: agents, links and a pattern, and the one walk through them that inference and training share."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recmas import running, storage
from recmas.agent import Agent
from recmas.chats import earlier
from recmas.offload import Lender
from recmas.pattern import Edge, Pattern, Visit
from recmas.placement import Devices, Placement, place
from recmas.prompts import PromptRenderer, Slot, Template
from recmas.running import Answer, Answers, Message
from recmas.spec import AgentSpec, Defaults, PromptSpec, SystemSpec, edge_name
from recmas.splice import JointLink, Latents, Prompt, join, splice
from recmas.tools import Tool, Toolbox
from recmas_kernels import FusedRecursiveLink, RecursiveLink

Row = Mapping[str, object]


class RecursiveMAS:
    """A recursive multi-agent system.

    Args:
        agents: one per role of the pattern; roles may share one `Agent`.
        inner_links: by role, ``d -> d``, for every agent that sends.
        outer_links: by (source, target), ``d_source -> d_target``.
        pattern: who talks to whom.
        settings: prompt, chat and decoding by role; None takes `default_settings`.
        defaults: rounds and latent steps where a call names none.
        edge_scores: by (source, target), for ``combine="weighted"``: the scalars whose softmax weighs the senders.
        offload: devices that the agents visit, while their weights and links rest in host memory (`recmas.offload`);
            None leaves them where they are.

    Raises:
        ValueError: roles, widths, templates or slots that do not fit together; one line that names the culprit.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        inner_links: Mapping[str, RecursiveLink],
        outer_links: Mapping[Edge, RecursiveLink],
        pattern: Pattern,
        *,
        settings: Mapping[str, AgentSpec] | None = None,
        defaults: Defaults | None = None,
        edge_scores: Mapping[Edge, nn.Parameter] | None = None,
        offload: Devices | None = None,
    ) -> None:
        for role in pattern.roles:
            if role not in agents:
                raise ValueError(f"agents: role {role!r} of the pattern has no agent")
        for role in [*agents, *inner_links, *(role for edge in outer_links for role in edge)]:
            if role not in pattern.roles:
                raise ValueError(f"unknown role {role!r}; the pattern has {', '.join(pattern.roles)}")
        self.pattern = pattern
        self.agents = {role: agents[role] for role in pattern.roles}
        self.inner_links, self.outer_links = dict(inner_links), dict(outer_links)
        self.defaults = defaults or Defaults()
        self.settings = dict(
            settings or {role: default_settings(pattern, role, agents[role]) for role in pattern.roles}
        )
        self.edge_scores: dict[Edge, nn.Parameter] = dict(edge_scores or {})
        if pattern.combine == "weighted":
            for edge in self.outer_links:
                self.edge_scores.setdefault(edge, nn.Parameter(torch.zeros((), device=self.agents[edge[1]].device)))
        self._check_widths()
        self._renderers: dict[str, PromptRenderer] = {}
        self._templates: dict[str, Template] = {}
        for role, setting in self.settings.items():
            tokenizer = self.agents[role].tokenizer
            self._renderers[role] = PromptRenderer(tokenizer, setting.chat, setting.system, name=f"agent {role!r}")
            for text in (setting.prompt.first, setting.prompt.later):
                if text is not None:
                    self._templates[text] = Template(text)
        self._check_templates(1)
        self._lender = None if offload is None else self._new_lender(place(offload, pattern.roles))

    @classmethod
    def create(
        cls,
        models: Mapping[str, str | os.PathLike[str] | Agent],
        pattern: Pattern,
        *,
        link_scale: str = "embedding",
        prompts: Mapping[str, PromptSpec] | None = None,
        rounds: int = 3,
        latent_steps: int = 32,
        device: Devices = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        seed: int | None = None,
        compile: bool = False,
    ) -> RecursiveMAS:
        """A system of given models with fresh links of the released shape, float32.

        Args:
            models: folder, hub id or `Agent` by role; roles that name one model, on one device, share it.
            pattern: who talks to whom.
            link_scale: "embedding" sets each link's output norm gain to the rms of the input embeddings it writes
                among (its own agent's for an inner link, the receiver's for an outer one); "none" leaves it at 1.
            prompts: templates by role; others get `default_settings`.
            rounds: the system's default; links are made for every edge it uses.
            latent_steps: the system's default.
            device: of the agents loaded here, for all or by role (`recmas.placement`); an `Agent` stays where it is.
            dtype: of the agents loaded here; "auto" is the checkpoint's.
            trust_remote_code: for transformers.
            seed: of the links; None draws from torch's global generator.
            compile: as for `Agent`, of the agents loaded here.
        """
        if link_scale not in ("embedding", "none"):
            raise ValueError(f"link_scale: {link_scale!r} is neither 'embedding' nor 'none'")
        if latent_steps < 0:
            raise ValueError(f"latent_steps: {latent_steps} is negative")
        edges = sorted(pattern.edges(rounds))
        for role in pattern.roles:
            if role not in models:
                raise ValueError(f"models: role {role!r} of the pattern has no model")
        sources = {role: (os.fspath(model), dtype) for role, model in models.items() if not isinstance(model, Agent)}
        loaded = storage.load_agents(sources, place(device, pattern.roles), trust_remote_code)
        for agent in loaded.values():
            agent.rollouts.compiled = compile
        agents = {role: model if isinstance(model, Agent) else loaded[role] for role, model in models.items()}
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            width = {role: agent.hidden_size for role, agent in agents.items()}
            senders = [role for role in pattern.roles if any(role == source for source, _ in edges)]
            inner = {role: FusedRecursiveLink.inner(width[role]) for role in senders}
            outer = {edge: FusedRecursiveLink.outer(width[edge[0]], width[edge[1]]) for edge in edges}
        if link_scale == "embedding":
            for receiver, link in [*inner.items(), *((edge[1], link) for edge, link in outer.items())]:
                assert link.norm_out is not None
                nn.init.constant_(link.norm_out.weight, agents[receiver].embedding_rms())
        settings = {role: default_settings(pattern, role, agents[role]) for role in pattern.roles}
        for role, prompt in (prompts or {}).items():
            if role not in settings:
                raise ValueError(f"prompts: unknown role {role!r}; the pattern has {', '.join(pattern.roles)}")
            settings[role].prompt = prompt
        for role, setting in settings.items():
            setting.dtype = dtype if not isinstance(models[role], Agent) else "auto"
        mas = cls(agents, inner, outer, pattern, settings=settings, defaults=Defaults(rounds, latent_steps))
        mas._place_links(mas.devices, None)
        return mas

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: Devices = "cpu",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        *,
        offload: bool = False,
        compile: bool = False,
    ) -> RecursiveMAS:
        """A system from its folder.

        Args:
            folder: holds ``system.json``. Roles that name one model, with one dtype and on one device, share it.
            device: for all agents, or by role; roles left out are on the CPU. Links live with their agents
                (`recmas.placement`).
            dtype: of agents and links; None loads agents as the system says and links as float32 masters.
            trust_remote_code: for transformers.
            offload: keep weights in host memory and bring each agent's to its device for its visits alone, so that a
                device holds one agent at a time. For answering; training refuses it.
            compile: as for `Agent`.

        Raises:
            ValueError: a file that is missing, damaged or does not fit; one line naming it.
        """
        mas = storage.load(cls, Path(folder), device, dtype, trust_remote_code, offload)
        for agent in mas.agents.values():
            agent.rollouts.compiled = compile
        return mas

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the system into `folder`; nothing half-written ever replaces a good file.

        Agents that came from a local folder, or were built in memory, are written under ``agents/<role>/``.
        """
        storage.save(self, Path(folder))

    def to(self, device: Devices | None = None, dtype: torch.dtype | None = None) -> RecursiveMAS:
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
            if self._lender is None and placement[first] != placement[role]:
                raise ValueError(
                    f"device: {first!r} and {role!r} share one model, which cannot be on both {placement[first]} and "
                    f"{placement[role]}"
                )
        if self._lender is None:
            homes = placement
        else:
            self._lender.rest()
            homes = dict.fromkeys(placement, torch.device("cpu"))
        for role, agent in self.agents.items():
            agent.to(device=homes[role], dtype=dtype)
        self._place_links(homes, dtype)
        if self._lender is not None:
            self._lender = self._new_lender(placement)
        return self

    @property
    def devices(self) -> Placement:
        """The device that each agent works on, by role."""
        if self._lender is not None:
            return dict(self._lender.placement)
        return {role: agent.device for role, agent in self.agents.items()}

    @property
    def lender(self) -> Lender | None:
        """What brings agents to their devices; None where they are there for good."""
        return self._lender

    def bring(self, role: str) -> None:
        """Weights that `role` works with are on its device, if they are not there for good."""
        if self._lender is not None:
            self._lender.bring(role)

    def rest(self) -> None:
        """Weights that are lent to a device go home; nothing where none are."""
        if self._lender is not None:
            self._lender.rest()

    def answer(
        self,
        rows: Iterable[running.Row],
        *,
        mode: str = "latent",
        rounds: int | None = None,
        latent_steps: int | Mapping[str, int] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        trace: bool = False,
        prefix_reuse: bool = True,
        tools: Toolbox | Sequence[Tool] = (),
        on_message: Callable[[Visit, Message], Message] | None = None,
        on_text: Callable[[int, str], object] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Answers:
        """Answer questions; results in the order of the rows.

        Args:
            rows: a question each, a mapping with the fields that the templates name, or a chat: a list of messages
                whose last one is the question (`recmas.chats`).
            mode: "latent", or "text": the recursive text system, same agents, templates and rounds, text in the slots.
            rounds: None is the system's default.
            latent_steps: for all agents, or by role; None is the system's own.
            max_new_tokens: per text; None (here and in the next two) is each agent's own setting.
            temperature: 0 is greedy.
            top_p: nucleus.
            seed: of sampling; a row's result depends on it, on its number and on nothing else.
            batch_size: rows at once, of similar length; None is 32. "auto" takes as many as an estimate says that the
                free memory of the devices holds (`recmas.memory`), and fewer if that runs out all the same: it begins
                that batch again, so `on_message` and `tools` may be called twice for a row.
            trace: keep every handoff in `Answer.handoffs`.
            prefix_reuse: read what a prompt has in common with an earlier one of the same batch and agent only once
                (`recmas.prefix`); the same answers but for rounding. `Answers.reading` counts what it saved.
            tools: what the last agent may call while it writes its answer (`recmas.tools`); none by default.
            on_message: may replace each message before it is sent (to zero, shuffle or patch latents).
            on_text: called with the number of a row and the next piece of its answer, as it is written.
            progress: called with the number of rows after each visit of an agent (less than 0 takes some back).

        Raises:
            ValueError: wrong arguments, a field that a row lacks, missing links, or a prompt that is too long for an
                agent whatever texts it hears; before any model runs.
        """
        plan = running.Plan(
            self,
            mode=mode,
            rounds=rounds,
            latent_steps=latent_steps,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            trace=trace,
            prefix_reuse=prefix_reuse,
            tools=tools,
            on_message=on_message,
            on_text=on_text,
            progress=progress,
        )
        return running.answer(plan, rows, batch_size)

    def stream(self, row: running.Row, **options: Any) -> Generator[str, None, Answer]:
        """Answer one question piece by piece: an iterator over the answer's text as the last agent writes it.

        The pieces join to the answer's `text`; the `Answer` itself is the iterator's return value (``yield from``).

        Args:
            row: as one of `answer`'s.
            options: `answer`'s, but for `batch_size`.

        Raises:
            ValueError: as `answer`, at once.
        """
        return running.stream(running.Plan(self, **options), row)

    def walk(self, rows: Sequence[Row], rounds: int, speak: Callable[[Visit, Prompt], Message]) -> Message:
        """Visit the agents in the pattern's order: prompt each from what it hears, pass on what `speak` returns.

        Args:
            rows: one batch.
            rounds: number of rounds.
            speak: message of an agent for its prompt: `Latents`, or a text per row.

        Returns:
            The message of the final visit.
        """
        messages: dict[tuple[str, int], Message] = {}
        spoken: Message = []
        for visit in self.pattern.visits(rounds):
            heard = {sender: messages[sender, when] for sender, when in zip(visit.senders, visit.heard, strict=True)}
            self.bring(visit.role)
            spoken = messages[visit.role, visit.round] = speak(visit, self.prompt(visit, rows, heard))
        return spoken

    def prompt(self, visit: Visit, rows: Sequence[Row], messages: Mapping[str, Message]) -> Prompt:
        """Render and splice the prompts of one visit.

        Args:
            visit: whose turn it is.
            rows: one batch.
            messages: by sender: texts (one per row) go into the template as text, `Latents` through the outer link.
        """
        agent, template = self.agents[visit.role], self.template(visit.role, visit.round)
        texts = {role: message for role, message in messages.items() if not isinstance(message, Latents)}
        segments = [
            self.segments(visit, row, {role: text[index] for role, text in texts.items()})
            for index, row in enumerate(rows)
        ]
        latents: dict[tuple[str, ...], Latents] = {}
        links: dict[tuple[str, ...], nn.Module] = {}
        for slot in template.slots:
            if all(role not in texts for role in slot.senders):
                heard = [messages[role] for role in slot.senders]
                latents[slot.senders] = join([m.to(agent.device) for m in heard if isinstance(m, Latents)])
                links[slot.senders] = self._slot_link(slot, visit.role)
        return splice(agent.embed, segments, latents, links, pad_id=agent.pad_id, device=agent.device)

    def segments(self, visit: Visit, row: Row, texts: Mapping[str, str] | None = None) -> list[list[int] | Slot]:
        """Token ids and slots of one row's prompt; `texts` stand in the slots of their senders."""
        return self._renderers[visit.role].segments(self.template(visit.role, visit.round), row, texts or {})

    def prefix(self, visit: Visit, rows: Sequence[Row]) -> list[list[int]]:
        """Token ids that stand before the first slot of each row's prompt of one visit."""
        found: list[list[int]] = []
        for row in rows:
            found.append([])
            for segment in self.segments(visit, row):
                if isinstance(segment, Slot):
                    break
                found[-1] += segment
        return found

    def template(self, role: str, round: int) -> Template:
        """The template that `role` uses in `round`."""
        return self._templates[self.settings[role].prompt.at(round)]

    def check_run(self, rounds: int, *, links: bool = True) -> None:
        """Raise ValueError, before any model runs, if a slot or (with `links`) a link for so many rounds is missing."""
        edges = self.pattern.edges(rounds)
        if links and (missing := sorted(edge_name(edge) for edge in edges - self.outer_links.keys())):
            raise ValueError(f"rounds={rounds} needs outer links that the system lacks: {', '.join(missing)}")
        if links and (mute := sorted({source for source, _ in edges} - self.inner_links.keys())):
            raise ValueError(f"rounds={rounds} needs inner links that the system lacks: {', '.join(mute)}")
        self._check_templates(rounds)

    def check_rows(self, rows: Sequence[Row], rounds: int) -> None:
        """Raise ValueError, naming row number and field, if a row lacks a field that a template of the run names."""
        readers = {
            field: visit.role
            for visit in self.pattern.visits(min(rounds, 2))
            for field in self.template(visit.role, visit.round).fields
        }
        for index, row in enumerate(rows):
            for field, role in readers.items():
                if field not in row:
                    raise ValueError(
                        f"row {index}: no field {field!r}, which agent {role!r} reads; it has {', '.join(sorted(row))}"
                    )
            if earlier(row):
                for renderer in self._renderers.values():
                    renderer.check_chat(row)

    def spec(self) -> SystemSpec:
        """What ``system.json`` says, with the paths that `storage` gives to the parts."""
        return storage.describe(self)

    def _slot_link(self, slot: Slot, target: str) -> nn.Module:
        edges = [(source, target) for source in slot.senders]
        links = [self.outer_links[edge] for edge in edges]
        if len(links) == 1:
            return links[0]
        if self.pattern.combine == "weighted":
            scores = torch.stack([self.edge_scores[edge] for edge in edges])
            weights = scores.softmax(dim=0).to(self.agents[target].device)
        else:
            weights = torch.full((len(edges),), 1 / len(edges), device=self.agents[target].device)
        return JointLink(links, [self.agents[source].hidden_size for source in slot.senders], weights)

    def _new_lender(self, placement: Placement) -> Lender:
        parts: dict[str, list[nn.Module]] = {role: [agent.model] for role, agent in self.agents.items()}
        for role, link in self.inner_links.items():
            parts[role].append(link)
        for (_, receiver), outer in self.outer_links.items():
            parts[receiver].append(outer)
        for agent in self.agents.values():
            agent.rollouts.off = "weights are on the device for visits only"
        return Lender(placement, parts)

    def _place_links(self, placement: Placement, dtype: torch.dtype | None) -> None:
        for role, link in self.inner_links.items():
            link.to(device=placement[role], dtype=dtype)
        for (_, receiver), link in self.outer_links.items():
            link.to(device=placement[receiver], dtype=dtype)
        for edge, score in self.edge_scores.items():
            if score.device != placement[edge[1]]:
                moved = score.detach().to(placement[edge[1]])
                self.edge_scores[edge] = nn.Parameter(moved, requires_grad=score.requires_grad)

    def _check_templates(self, rounds: int) -> None:
        joint = self.pattern.combine != "slots"
        for visit in self.pattern.visits(min(rounds, 2)):
            template = self.template(visit.role, visit.round)
            template.check_senders(visit.senders, joint, f"agent {visit.role!r}, round {visit.round}")

    def _check_widths(self) -> None:
        width = {role: agent.hidden_size for role, agent in self.agents.items()}
        named = [(f"inner link of {role!r}", link, role, role) for role, link in self.inner_links.items()]
        named += [(f"outer link {edge_name(edge)}", link, *edge) for edge, link in self.outer_links.items()]
        for name, link, source, target in named:
            found = (link.config.in_features, link.config.out_features)
            if found != (width[source], width[target]):
                raise ValueError(
                    f"{name} maps {found[0]} to {found[1]} features, the models need {width[source]} to {width[target]}"
                )


def default_settings(pattern: Pattern, role: str, agent: Agent) -> AgentSpec:
    """Plain prompts for any pattern: the question, the notes of whoever is heard, and a cue."""

    def text(round: int) -> str:
        senders = pattern.senders(role, round)
        slots = [senders] if senders and pattern.combine != "slots" else [(sender,) for sender in senders]
        notes = "".join(f"Notes of the {' and the '.join(names)}: {Slot(names)}\n" for names in slots)
        cue = "Answer:" if role == pattern.last else f"Notes of the {role}:"
        return f"Question: {{{{question}}}}\n{notes}{cue}"

    first, later = text(1), text(2)
    prompt = PromptSpec(first if first != later else None, later)
    chat = bool(getattr(agent.tokenizer, "chat_template", None))
    return AgentSpec(model=agent.source or "", prompt=prompt, chat=chat)
