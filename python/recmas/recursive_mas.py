"""`RecursiveMAS`, the face of the package: make, load, save and ask a recursive multi-agent system."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recmas.agents.agent import Agent
from recmas.agents.loading import read_dtype
from recmas.answering.answers import Answer, Answers
from recmas.answering.options import AnswerOptions
from recmas.answering.plan import OnAnswers, OnMessage, Plan
from recmas.answering.run import Question, answer, check, stream
from recmas.config.parts import Trust
from recmas.config.pattern import LinkKey, Pattern
from recmas.config.system_json import Defaults, PromptSpec, SystemSpec
from recmas.devices.placement import Devices, place
from recmas.system.default_prompts import default_settings
from recmas.system.fingerprint import digest
from recmas.system.folder import describe, save
from recmas.system.loading import load, load_agents
from recmas.system.system import System
from recmas_kernels import FusedRecursiveLink

if TYPE_CHECKING:
    from typing_extensions import Self


class RecursiveMAS(System):
    """A recursive multi-agent system.

    Args:
        agents: one per role of the pattern; roles may share one `Agent`.
        inner_links: by role, ``d -> d``, for every agent that sends.
        outer_links: ``d_source -> d_target``, by (source, target), or by (source, target, round) where a round that is
            sent in has a link of its own.
        pattern: which agent reads whose messages.
        settings: prompt, chat and decoding by role; None makes plain prompts.
        defaults: rounds and latent steps where a call names none.
        edge_scores: by the same keys, for ``combine="weighted"``: the scalars whose softmax weighs the senders.
        offload: devices that the agents work on, while their weights and links stay in host memory; None leaves them
            where they are.

    Raises:
        ValueError: roles, widths, templates or slots that do not fit together; one line that names what is wrong.
    """

    @classmethod
    def create(
        cls,
        models: Mapping[str, str | os.PathLike[str] | Agent],
        pattern: Pattern,
        *,
        links: bool = True,
        link_scale: str = "embedding",
        prompts: Mapping[str, PromptSpec] | None = None,
        rounds: int = 3,
        latent_steps: int = 32,
        links_per_round: bool = False,
        device: Devices = "cpu",
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        seed: int | None = None,
        compile: bool = False,
        accelerate: bool = True,
    ) -> Self:
        """A system of given models with fresh links of the released shape, float32.

        Args:
            models: folder, hub id or `Agent` by role; roles that name one model, on one device, share it.
            pattern: which agent reads whose messages.
            links: False makes none, for agents that exchange texts only.
            link_scale: "embedding" sets each link's output norm gain to the rms of the input embeddings it writes
                among (its own agent's for an inner link, the receiver's for an outer one); "none" leaves it at 1.
            prompts: templates by role; others get `default_settings`.
            rounds: the system's default; links are made for every edge it uses.
            latent_steps: the system's default.
            links_per_round: an outer link of its own for each round in which an edge's messages are sent; False makes
                one per edge, shared by all rounds.
            device: of the agents loaded here, for all or by role (`recmas.devices.placement`); an `Agent` stays where
                it is.
            dtype: of the agents loaded here; "auto" is the checkpoint's.
            trust_remote_code: for transformers.
            seed: of the links; None draws from torch's global generator.
            compile: as for `Agent`, of the agents loaded here.
            accelerate: as for `Agent`, of the agents loaded here.

        Raises:
            ValueError: an unknown role, setting or dtype, or a model that cannot be loaded; one line that names it.
        """
        if link_scale not in ("embedding", "none"):
            raise ValueError(f"link_scale: {link_scale!r} is neither 'embedding' nor 'none'")
        defaults, wanted = Defaults(rounds, latent_steps), read_dtype(dtype)
        for what, by_role in (("models", models), ("prompts", prompts or {})):
            for role in by_role:
                if role not in pattern.roles:
                    raise ValueError(f"{what}: unknown role {role!r}; the pattern has {', '.join(pattern.roles)}")
        for role, prompt in (prompts or {}).items():
            if not isinstance(prompt, PromptSpec):
                raise ValueError(f"prompts: that of {role!r} is a {type(prompt).__name__}, expected a PromptSpec")
        edges = pattern.edges(rounds) if links else set()
        for role in pattern.roles:
            if role not in models:
                raise ValueError(f"models: role {role!r} of the pattern has no model")
        sources = {
            role: (os.fspath(model), wanted or "auto") for role, model in models.items() if not isinstance(model, Agent)
        }
        loaded = load_agents(sources, place(device, pattern.roles), trust_remote_code, compile, accelerate)
        agents = {role: model if isinstance(model, Agent) else loaded[role] for role, model in models.items()}
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            width = {role: agent.hidden_size for role, agent in agents.items()}
            senders = [role for role in pattern.roles if any(role == source for source, _ in edges)]
            inner = {role: FusedRecursiveLink.inner(width[role]) for role in senders}
            keys: list[LinkKey] = sorted(pattern.links_by_round(rounds) if links and links_per_round else edges)
            outer = {key: FusedRecursiveLink.outer(width[key[0]], width[key[1]]) for key in keys}
        if link_scale == "embedding":
            for receiver, link in [*inner.items(), *((key[1], link) for key, link in outer.items())]:
                assert link.norm_out is not None
                nn.init.constant_(link.norm_out.weight, agents[receiver].embedding_rms())
        settings = {role: default_settings(pattern, role, agents[role]) for role in pattern.roles}
        for role, prompt in (prompts or {}).items():
            settings[role].prompt = prompt
        for role, setting in settings.items():
            if wanted is not None and not isinstance(models[role], Agent):
                setting.dtype = str(wanted).removeprefix("torch.")
        mas = cls(agents, inner, outer, pattern, settings=settings, defaults=defaults)
        mas._place_links(mas.devices, None)
        return mas

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: Devices = "cpu",
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        *,
        offload: bool = False,
        compile: bool = False,
        accelerate: bool = True,
        allow_outside: bool = False,
        allow_hub: bool = False,
    ) -> Self:
        """A system from its folder, which is data: what it may lead to is said here, and not there.

        Args:
            folder: holds ``system.json``. Roles that name one model, with one dtype and on one device, share it.
            device: for all agents, or by role; roles left out are on the CPU. Links are with their agents
                (`recmas.devices.placement`).
            dtype: of agents and links; None, and "auto", loads agents as the system says and links as float32 masters.
            trust_remote_code: for transformers.
            offload: keep weights in host memory and copy each agent's to its device for its visits alone, so that a
                device holds one agent at a time. For answering; training refuses it.
            compile: as for `Agent`.
            accelerate: as for `Agent`; under offload nothing is accelerated.
            allow_outside: load models and links from other folders, too, where the system names any.
            allow_hub: load models from the hub, too, where the system names any; else the hub is never asked.

        Raises:
            ValueError: a file that is missing, damaged, too large or does not fit, or that the folder may not lead to;
                one line naming it.
        """
        trust = Trust(allow_outside, allow_hub)
        return load(
            cls, Path(folder), device, read_dtype(dtype), trust_remote_code, offload, compile, accelerate, trust
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the system into `folder`; one that is there is replaced whole, or stays whole if this is cut short.

        Agents that came from a local folder, or were built in memory, are written under ``agents/<role>/``.
        """
        save(self, Path(folder))

    def spec(self) -> SystemSpec:
        """What ``system.json`` says, with the paths that `save_pretrained` gives to the parts."""
        return describe(self)

    def fingerprint(self) -> str:
        """What decides the system's answers, as a digest (`recmas.system.fingerprint`)."""
        return digest(self)

    def check(self, rows: Iterable[Question], options: AnswerOptions) -> None:
        """Raise what `answer` would raise before any model runs."""
        check(Plan(self, options), rows)

    def answer(
        self,
        rows: Iterable[Question],
        options: AnswerOptions | None = None,
        *,
        on_message: OnMessage | None = None,
        on_text: Callable[[int, str], object] | None = None,
        on_answers: OnAnswers | None = None,
        skip: Collection[int] = (),
        progress: Callable[[int], object] | None = None,
        **changes: Any,
    ) -> Answers:
        """Answer questions; results in the order of the rows.

        Callbacks may change agents: load or replace weights, add hooks, switch adapters. Prompts that are read later
        are read with what an agent is then. Steps of fused optimisers, writes through ``.data``, and what is no part
        of the model, are seen only where `prefix_reuse` is off (`recmas.engine.model_state`): who trains agents here
        switches it off. Links must stay as they are until it returns.

        A batch begins again without the rows that have become too long, and in halves where memory ran out under
        ``batch_size="auto"``: texts are written, `on_message` is called and tools are run once more.

        Args:
            rows: a question each, a mapping with the fields that the templates name, or a chat: a list of messages
                whose last one is the question (`recmas.prompts.rows`).
            options: how; None is `AnswerOptions` with its defaults.
            on_message: may replace each message before it is sent (to zero, shuffle or patch latents).
            on_text: called with the number of a row and the next piece of its answer, as it is written.
            on_answers: called with the numbers of a batch's rows and their answers, in this order, when they are done.
            skip: numbers of rows whose answers are known: batches of only such rows are left out, and answers there
                stay empty. So what is left of a run that was cut short is answered as it would have been.
            progress: called with the number of rows after each visit of an agent (less than 0 takes some back).
            changes: fields of `AnswerOptions`, in place of those of `options`: ``answer(rows, rounds=2, seed=1)``.

        Raises:
            ValueError: wrong options, a field that a row lacks, missing links, or a prompt that is too long for an
                agent whatever texts it reads; before any model runs.
            RowsFailedError: at the end, if texts that agents wrote, or longer messages that `on_message` put in place,
                made prompts of some rows too long; the others are answered. At once where `on_text` was shown text of
                their batch, as it is of rows that settle: then neither this batch nor those to come have answers.
            TypeError: a change that is no option.
        """
        chosen = AnswerOptions.of(options, **changes)
        plan = Plan(
            self,
            chosen,
            on_message=on_message,
            on_text=on_text,
            on_answers=on_answers,
            skip=skip,
            progress=progress,
        )
        return answer(plan, rows)

    def stream(
        self,
        row: Question,
        options: AnswerOptions | None = None,
        *,
        on_message: OnMessage | None = None,
        on_text: Callable[[int, str], object] | None = None,
        progress: Callable[[int], object] | None = None,
        **changes: Any,
    ) -> Generator[str, None, Answer]:
        """Answer one question piece by piece: an iterator over the answer's text as the last agent writes it.

        The pieces join to the answer's `text`; the `Answer` itself is the iterator's return value (``yield from``).
        Arguments and errors are those of `answer`, but for `batch_size`; everything is checked at once.
        """
        if "batch_size" in changes:
            raise TypeError("batch_size: a stream answers one row; answer() takes several")
        chosen = AnswerOptions.of(options, **changes)
        return stream(Plan(self, chosen, on_message=on_message, on_text=on_text, progress=progress), row)
