"""``system.json``: what a system on disk says about itself. No torch here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from recmas.config.checked import Checked, without_none
from recmas.config.pattern import MAX_ROUNDS, LinkKey, Pattern, check_rounds
from recmas.dtypes import DTYPES
from recmas.files import write_atomically
from recmas.files.reading import parse_json, read_json, shown

FILE_NAME = "system.json"
FORMAT = 1
MAX_STEPS, MAX_TOKENS, MAX_TEMPLATE = 1 << 16, 1 << 20, 1 << 20
"""Latent steps of a message, tokens of a text, characters of a template: a downloaded system cannot ask for more."""

_EDGE = re.compile(r"(.+?)->([^@]+)(?:@([1-9][0-9]{0,2}))?")
MAX_REPLICAS, MAX_CPUS = 256, 1024
"""Processes of one agent, and cores or threads of each."""

LEAST_TEMPERATURE = 1e-6
"""Logits divided by less may be more than float32 holds."""


@dataclass
class PromptSpec:
    """Templates of one agent: `first` serves round 1 where given, `later` the other rounds; one alone serves all."""

    first: str | None = None
    later: str | None = None

    def at(self, round: int) -> str:
        chosen = self.first if round == 1 else self.later
        return chosen if chosen is not None else self.first or self.later or ""


@dataclass
class Decoding:
    """How an agent writes text: temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise ValueError(f"max_new_tokens: {self.max_new_tokens!r} is not an integer")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} is negative")
        if self.max_new_tokens > MAX_TOKENS:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} is more than {MAX_TOKENS}")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name}: {value!r} is not a number")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} is not a finite number >= 0")
        if 0.0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature: {self.temperature} is less than {LEAST_TEMPERATURE}; 0 is greedy")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p} is not in (0, 1]")


@dataclass(frozen=True)
class PlacementSpec:
    """Where an agent's processes go in a cluster (`recmas.distributed`); a single process takes no notice of it.

    Attributes:
        replicas: processes that share the agent's work.
        cpus: cores that each is given; 0 asks for none.
        threads: that each computes with; 0 takes one per core that it is given, else as many as the process that starts
            it has.
        gpus: devices that each is given, at most one; 0 computes on the CPU.
        resources: other resources of the cluster that each takes, by name.
    """

    replicas: int = 1
    cpus: int = 0
    threads: int = 0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise ValueError(f"replicas: {self.replicas} is not between 1 and {MAX_REPLICAS}")
        for name in ("cpus", "threads"):
            if not 0 <= getattr(self, name) <= MAX_CPUS:
                raise ValueError(f"{name}: {getattr(self, name)} is not between 0 and {MAX_CPUS}")
        if not 0.0 <= self.gpus <= 1.0:
            raise ValueError(f"gpus: {self.gpus} is not between 0 and 1, the one device that a process can use")
        for name, count in self.resources.items():
            if isinstance(count, bool) or not isinstance(count, int | float) or not 0.0 < count < float("inf"):
                raise ValueError(f"resources.{name}: {shown(count)} is not a number above 0")
            if name in ("CPU", "GPU"):
                raise ValueError(f"resources.{name}: is asked for as {name.lower()}s")

    @property
    def asked(self) -> dict[str, float]:
        """What each process takes of the cluster, by the cluster's names; empty where it takes nothing."""
        counts = {"CPU": float(self.cpus), "GPU": self.gpus, **self.resources}
        return {name: float(count) for name, count in counts.items() if count}


@dataclass
class AgentSpec:
    """One agent: `model` is a hub id or a folder (relative to the system's), `inner_link` a folder of the system."""

    model: str
    prompt: PromptSpec
    dtype: str = "auto"
    inner_link: str | None = None
    latent_steps: int | None = None  # None: the system's default
    chat: bool = True
    system: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    placement: PlacementSpec = field(default_factory=PlacementSpec)


@dataclass
class Defaults:
    """Rounds, and latent steps of agents without a number of their own, where a call names none."""

    rounds: int = 1
    latent_steps: int = 32

    def __post_init__(self) -> None:
        check_rounds(self.rounds)
        check_steps(self.latent_steps)


@dataclass
class SystemSpec:
    """A whole system: agents by role, and folders of outer links by (source, target) or (source, target, round).

    Attributes:
        edge_scores: file of the learned weights of joint slots; None where the pattern has none, or says not where.
        sha256: of files' contents, by their path relative to the system's folder; files that are not named are not
            compared.
    """

    pattern: Pattern
    agents: dict[str, AgentSpec]
    outer_links: dict[LinkKey, str] = field(default_factory=dict)
    defaults: Defaults = field(default_factory=Defaults)
    edge_scores: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)


def steps_by_role(
    settings: Mapping[str, AgentSpec], defaults: Defaults, asked: int | Mapping[str, int] | None
) -> dict[str, int]:
    """Latent steps of every agent: what is asked for, for all or by role, else its own, else the system's default.

    Raises:
        ValueError: an unknown role, or a number of steps that is no integer >= 0.
    """
    steps = {}
    for role, agent in settings.items():
        steps[role] = defaults.latent_steps if agent.latent_steps is None else agent.latent_steps
    if isinstance(asked, Mapping):
        for role in asked:
            if role not in steps:
                raise ValueError(f"latent_steps: unknown role {role!r}; the pattern has {', '.join(steps)}")
        steps.update(asked)
    elif asked is not None:
        steps = dict.fromkeys(steps, asked)
    for role, count in steps.items():
        check_steps(count, f" for {role!r}")
    return steps


def check_steps(count: object, whose: str = "") -> None:
    """Raise ValueError unless this can be a number of latent steps."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"latent_steps: {count!r}{whose} is not an integer >= 0")
    if count > MAX_STEPS:
        raise ValueError(f"latent_steps: {count}{whose} is more than {MAX_STEPS}")


def edge_name(edge: LinkKey) -> str:
    """``source->target``, with ``@round`` where the link is that of one round."""
    return f"{edge[0]}->{edge[1]}" + "".join(f"@{round}" for round in edge[2:])


def read_edge(name: str) -> LinkKey:
    """What `edge_name` wrote.

    Raises:
        ValueError: it is not of that form.
    """
    match = _EDGE.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not of the form source->target or source->target@round")
    source, target, round = match.groups()
    if int(round or 1) > MAX_ROUNDS:
        raise ValueError(f"{name!r} is the link of a round after {MAX_ROUNDS}")
    return (source, target) if round is None else (source, target, int(round))


def read_spec(folder: str | os.PathLike[str]) -> SystemSpec:
    """Read `folder`/system.json.

    Raises:
        ValueError: file missing, not JSON, of another format, or with an unknown, missing or wrongly typed key; one
            line naming file and key.
    """
    path = Path(folder) / FILE_NAME
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {Path(folder)} is not a system") from None
    except NotADirectoryError:
        raise ValueError(f"{Path(folder)}: is a file, expected the folder of a system") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return _Reader(path).system(content)


def write_spec(folder: str | os.PathLike[str], spec: SystemSpec) -> None:
    """Write `folder`/system.json atomically; None values are left out.

    Raises:
        ValueError: as `spec_text`; nothing is written.
    """
    write_atomically(Path(folder) / FILE_NAME, spec_text(folder, spec))


def spec_text(folder: str | os.PathLike[str], spec: SystemSpec) -> str:
    """What `folder`/system.json is to hold.

    Raises:
        ValueError: `read_spec` would not take it, as settings may be that were changed in memory.
    """
    agents = {}
    for role, agent in spec.agents.items():
        described = {
            "model": agent.model,
            "dtype": agent.dtype,
            "inner_link": agent.inner_link,
            "latent_steps": agent.latent_steps,
            "chat": agent.chat,
            "system": agent.system,
            "prompt": without_none(vars(agent.prompt)),
            "decoding": vars(agent.decoding),
            "placement": _changed(agent.placement, PlacementSpec()),
        }
        agents[role] = without_none(described)
    pattern = spec.pattern
    content = {
        "format": FORMAT,
        "pattern": {
            "stages": [list(stage) for stage in pattern.stages],
            "combine": pattern.combine,
            "exchange": pattern.exchange,
        },
        "agents": agents,
        "outer_links": {edge_name(edge): path for edge, path in spec.outer_links.items()},
        "defaults": vars(spec.defaults),
        "edge_scores": spec.edge_scores,
        "sha256": spec.sha256 or None,
    }
    text = json.dumps(without_none(content), indent=2, ensure_ascii=False, default=repr) + "\n"
    _Reader(Path(folder) / FILE_NAME).system(parse_json(text))
    return text


def _changed(part: Any, standard: Any) -> dict[str, Any] | None:
    """The fields that differ from the standard ones, None if none does."""
    return {name: value for name, value in vars(part).items() if value != getattr(standard, name)} or None


class _Reader(Checked):
    """What the objects of a ``system.json`` become."""

    def system(self, content: Any) -> SystemSpec:
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise self.fail("format", f"{shown(content['format'])} is not {FORMAT}, the format this version reads")
        required = {"format": int, "pattern": dict, "agents": dict}
        optional = {"outer_links": dict, "defaults": dict, "edge_scores": str, "sha256": dict}
        table = self.table(content, "", required, optional)
        pattern = self.pattern(table["pattern"])
        agents = {role: self.agent(agent, f"agents.{role}") for role, agent in without_none(table["agents"]).items()}
        for role in agents:
            if role not in pattern.roles:
                raise self.fail(f"agents.{role}", f"unknown role, the pattern has {', '.join(pattern.roles)}")
        for role in pattern.roles:
            if role not in agents:
                raise self.fail(f"agents.{role}", "missing key")
        links: dict[LinkKey, str] = {}
        for name, folder in table.get("outer_links", {}).items():
            edge = self.build(f"outer_links.{name}", read_edge, name)
            if not agents.keys() >= set(edge[:2]):
                raise self.fail(f"outer_links.{name}", "is not of the form source->target with roles of the pattern")
            links[edge] = self.name(folder, f"outer_links.{name}")
        counts = self.table(table.get("defaults", {}), "defaults", {}, {"rounds": int, "latent_steps": int})
        self.between(counts, "rounds", 1, MAX_ROUNDS, "defaults")
        self.between(counts, "latent_steps", 0, MAX_STEPS, "defaults")
        digests = {
            self.name(name, "sha256"): self.typed(digest, str, f"sha256.{name}")
            for name, digest in table.get("sha256", {}).items()
        }
        if "edge_scores" in table:
            self.name(table["edge_scores"], "edge_scores")
        return SystemSpec(pattern, agents, links, Defaults(**counts), table.get("edge_scores"), digests)

    def pattern(self, content: Any) -> Pattern:
        table = self.table(content, "pattern", {"stages": list}, {"combine": str, "exchange": str})
        for stage in table["stages"]:
            self.typed(stage, list, "pattern.stages")
        return self.build("pattern", Pattern, **table)

    def agent(self, content: Any, key: str) -> AgentSpec:
        optional = {
            "dtype": str,
            "inner_link": str,
            "latent_steps": int,
            "chat": bool,
            "system": str,
            "decoding": dict,
            "placement": dict,
        }
        table = self.table(content, key, {"model": str, "prompt": dict}, optional)
        if table.get("dtype", "auto") not in DTYPES:
            raise self.fail(f"{key}.dtype", f"{shown(table['dtype'])} is not one of {', '.join(DTYPES)}")
        self.between(table, "latent_steps", 0, MAX_STEPS, key)
        for name in ("model", "inner_link"):
            if name in table:
                self.name(table[name], f"{key}.{name}")
        prompt = self.table(table["prompt"], f"{key}.prompt", {}, {"first": str, "later": str})
        if not prompt:
            raise self.fail(f"{key}.prompt", "has neither first nor later")
        for name, text in [
            *((f"prompt.{name}", text) for name, text in prompt.items()),
            ("system", table.get("system")),
        ]:
            if text is not None and len(text) > MAX_TEMPLATE:
                raise self.fail(f"{key}.{name}", f"has {len(text)} characters, at most {MAX_TEMPLATE} are read")
        table["prompt"] = PromptSpec(**prompt)
        kinds = {"max_new_tokens": int, "temperature": float, "top_p": float}
        decoding = self.table(table.get("decoding", {}), f"{key}.decoding", {}, kinds)
        table["decoding"] = self.build(f"{key}.decoding", Decoding, **decoding)
        kinds = {"replicas": int, "cpus": int, "threads": int, "gpus": float, "resources": dict}
        placement = self.table(table.get("placement", {}), f"{key}.placement", {}, kinds)
        table["placement"] = self.build(f"{key}.placement", PlacementSpec, **placement)
        return AgentSpec(**table)
