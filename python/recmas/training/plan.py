"""What a training would do, told before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from recmas.config.system_json import edge_name
from recmas.sizing.report import size
from recmas.system.system import System
from recmas.training.config import ALWAYS_TOLD, LoopConfig, OuterConfig, changed_settings, settings_of
from recmas.training.outer import trained_edges


class Part(NamedTuple):
    """A stage ("inner", "warmup", "outer"), its settings, the rows it has, and the roles or edges; None takes all."""

    stage: str
    config: LoopConfig
    rows: int
    keys: Sequence[Any] | None = None


def plan(system: System, parts: Sequence[Part]) -> dict[str, Any]:
    """Each run of the step loop, and the bytes that are held beside activations: of weights, gradients and moments."""
    runs = [_run(name, trained, part) for part in parts for name, trained in _trained(system, part)]
    links = [*system.inner_links.values(), *system.outer_links.values()]
    models = {id(agent.model): agent.model for agent in system.agents.values()}
    return {
        "runs": [{key: value for key, value in run.items() if key != "held"} for run in runs],
        "memory": {
            "models": _bytes(p for model in models.values() for p in model.parameters()),
            "links": _bytes(p for link in links for p in link.parameters()),
            "gradients_and_moments": max(run["held"] for run in runs),  # of one run after the other
        },
    }


def table(planned: dict[str, Any]) -> str:
    """A plan for people."""
    width = max(len(run["run"]) for run in planned["runs"])
    lines = [
        f"{run['run']:<{width}}  {run['parameters']:>13,} parameters  {run['steps']:>6,} steps of "
        f"{run['rows_per_step']} of {run['rows']:,} rows, {run['epochs']:g} epochs, rate {run['learning_rate']:g}"
        + "".join(f", {name} {_told(value)}" for name, value in run["settings"].items())
        for run in planned["runs"]
    ]
    held = ", ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in planned["memory"].items())
    return "\n".join([*lines, f"memory beside activations: {held}"])


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _run(name: str, trained: list[Tensor], part: Part) -> dict[str, Any]:
    config, gradients, changed = part.config, 1, changed_settings(settings_of(part.config))
    if isinstance(config, OuterConfig) and config.round_norms:
        gradients += config.most_rounds  # each round's own, and their sum
    return {
        "run": name,
        "parameters": sum(p.numel() for p in trained),
        "held": (gradients + 2) * _bytes(trained),
        "steps": config.steps,
        "rows": part.rows,
        "rows_per_step": (taken := config.accumulation * config.batch_size),
        "epochs": round(config.steps * taken / part.rows, 2),
        "learning_rate": config.learning_rate,
        "settings": {name: value for name, value in changed.items() if name not in ALWAYS_TOLD},
    }


def _trained(system: System, part: Part) -> list[tuple[str, list[Tensor]]]:
    """The names of a part's runs, and what they train."""
    if isinstance(part.config, OuterConfig):
        edges = trained_edges(system, part.config, part.keys)
        trained: list[Tensor] = [p for edge in edges for p in system.outer_links[edge].parameters()]
        return [("outer links", trained + [system.edge_scores[edge] for edge in edges if edge in system.edge_scores])]
    links: Any = system.inner_links if part.stage == "inner" else system.outer_links
    return [
        (f"{part.stage} {key if isinstance(key, str) else edge_name(key)}", list(links[key].parameters()))
        for key in (links if part.keys is None else part.keys)
    ]


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
