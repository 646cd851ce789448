"""What a training would do, told before it begins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from recmas.config.system_json import edge_name
from recmas.prompts.rows import Fields
from recmas.sizing.report import size
from recmas.system.system import System
from recmas.training.config import ALWAYS_TOLD, LoopConfig, OuterConfig, changed_settings, settings_of
from recmas.training.outer import trained_edges
from recmas.training.trial import step_seconds


class Part(NamedTuple):
    """A stage ("inner", "warmup", "outer"), its settings, its rows, the roles or edges (None takes all), and its cache.

    ``cached`` is as for `step_seconds`.
    """

    stage: str
    config: LoopConfig
    rows: Sequence[Fields]
    keys: Sequence[Any] | None = None
    cached: str | None = None


def plan(system: System, parts: Sequence[Part]) -> dict[str, Any]:
    """Each run of the step loop, and the bytes that are held beside activations: of weights, gradients and moments.

    A step of each run is taken to tell its seconds, so that links are no more what they were.
    """
    runs: list[dict[str, Any]] = []
    held: list[int] = []
    for part in parts:
        trained = _trained(system, part)
        seconds = step_seconds(system, part.rows, part.config, part.keys, part.cached)
        runs += [_run(key, trained[key], part, seconds[key]) for key in trained]
        at_once: dict[Any, int] = defaultdict(int)  # links that read the same agent's pairs are trained in turn
        for key, parameters in trained.items():
            at_once[key[0] if isinstance(key, tuple) else key] += _copies(part.config) * _bytes(parameters)
        held += at_once.values()
    links = [*system.inner_links.values(), *system.outer_links.values()]
    models = {id(agent.model): agent.model for agent in system.agents.values()}
    return {
        "runs": runs,
        "memory": {
            "models": _bytes(p for model in models.values() for p in model.parameters()),
            "links": _bytes(p for link in links for p in link.parameters()),
            "gradients_and_moments": max(held),
        },
    }


def table(planned: dict[str, Any]) -> str:
    """A plan for people."""
    width = max(len(run["run"]) for run in planned["runs"])
    lines = [
        f"{run['run']:<{width}}  {run['parameters']:>13,} parameters  {run['steps']:>6,} steps of "
        f"{run['rows_per_step']} of {run['rows']:,} rows, {run['epochs']:g} epochs, rate {run['learning_rate']:g}, "
        f"{run['seconds_per_step']:.2g} s per step"
        + "".join(f", {name} {_told(value)}" for name, value in run["settings"].items())
        for run in planned["runs"]
    ]
    held = ", ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in planned["memory"].items())
    measured = "seconds per step are measured here, those of the second of two steps"
    return "\n".join([*lines, f"memory beside activations: {held}", measured])


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _run(key: Any, trained: list[Tensor], part: Part, seconds: float) -> dict[str, Any]:
    config, changed = part.config, changed_settings(settings_of(part.config))
    return {
        "run": "outer links" if part.stage == "outer" else f"{part.stage} {_name(key)}",
        "parameters": sum(p.numel() for p in trained),
        "steps": config.steps,
        "seconds_per_step": seconds,
        "rows": len(part.rows),
        "rows_per_step": (taken := config.accumulation * config.batch_size),
        "epochs": round(config.steps * taken / len(part.rows), 2),
        "learning_rate": config.learning_rate,
        "settings": {name: value for name, value in changed.items() if name not in ALWAYS_TOLD},
    }


def _name(key: Any) -> str:
    return key if isinstance(key, str) else edge_name(key)


def _copies(config: LoopConfig) -> int:
    """Of the trained parameters: two moments, gradients, and one of each round's where these are told apart."""
    return 3 + (config.most_rounds if isinstance(config, OuterConfig) and config.round_norms else 0)


def _trained(system: System, part: Part) -> dict[Any, list[Tensor]]:
    """What a part's runs train, by role or edge; of the outer stage, by "outer"."""
    if isinstance(part.config, OuterConfig):
        edges = trained_edges(system, part.config, part.keys)
        trained: list[Tensor] = [p for edge in edges for p in system.outer_links[edge].parameters()]
        return {"outer": trained + [system.edge_scores[edge] for edge in edges if edge in system.edge_scores]}
    links: Any = system.inner_links if part.stage == "inner" else system.outer_links
    return {key: list(links[key].parameters()) for key in (links if part.keys is None else part.keys)}


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
