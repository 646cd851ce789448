"""The whole lab from nothing: three agents are pretrained, linked, and written as an ordinary system folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from recmas.agents.agent import Agent
from recmas.files import write_atomically
from recmas.files.json_lines import to_lines
from recmas.lab import links as link_training
from recmas.lab import pretrain as pretraining
from recmas.lab.agents import relay_system
from recmas.lab.grid import grid
from recmas.lab.links import LinkSettings, train_links
from recmas.lab.pretrain import PretrainSettings, pretrain
from recmas.lab.tasks import RELAY, Task, task_of
from recmas.lab.world import ROLES
from recmas.recursive_mas import RecursiveMAS
from recmas.system.folder import check_place
from recmas_kernels import __version__

RECORD, QUESTIONS = "lab.json", "questions.jsonl"
VALIDATION_SEED = 7
EXAMPLES = 96


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a build; ``validation`` is the number of questions per cell that links are chosen by."""

    pretrain: PretrainSettings
    links: LinkSettings
    validation: int = 512

    @classmethod
    def of(cls, task: Task) -> BuildSettings:
        """The task's own."""
        return cls(pretraining.SETTINGS[task.name], link_training.SETTINGS[task.name])


def build(
    folder: str | os.PathLike[str],
    seed: int = 1,
    *,
    task: Task = RELAY,
    link_seed: int | None = None,
    agents: str | os.PathLike[str] | None = None,
    jobs: int = 2,
    settings: BuildSettings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Build a task's system into ``folder``: an ordinary system in half precision, example questions and a record.

    Args:
        folder: new, or an earlier system that is replaced.
        seed: of the agents, their lessons, the links and their questions.
        task: that the agents are to do together.
        link_seed: of links and their questions where it should differ from ``seed``.
        agents: folder of a built lab whose agents are linked anew; None pretrains them.
        jobs: agents pretrained at once, in processes of one thread each; 1 pretrains in this process.
        settings: of all stages; None takes the task's own.
        progress: show bars.

    Returns:
        The record, as written to ``lab.json``: seeds, settings, commit, versions and what every stage reached.
    """
    settings = settings or BuildSettings.of(task)
    place = Path(folder)
    check_place(place)
    earlier = None if agents is None else _earlier(Path(agents), task)
    record: dict[str, Any] = {
        "task": task.name,
        "seed": seed,
        "link_seed": seed if link_seed is None else link_seed,
        "validation_seed": VALIDATION_SEED,
        "commit": _commit(),
        "versions": {"recmas": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "settings": json.loads(json.dumps(asdict(settings))),
    }
    with tempfile.TemporaryDirectory() as temporary:
        if agents is None or earlier is None:
            homes = Path(temporary)
            record["pretraining"] = pretrain_all(homes, task, seed, jobs, settings.pretrain, progress=progress)
        else:
            homes = Path(agents) / "agents"
            record["pretraining"] = earlier["pretraining"]
        members = {role: Agent.from_pretrained(homes / role, torch.float32, name=role) for role in ROLES}
        system = relay_system(members, record["link_seed"], task)
        record["links"] = train_links(
            system,
            task,
            record["link_seed"],
            lambda candidate: validation_accuracy(candidate, settings.validation),
            settings.links,
            progress=progress,
        )
        system.to(dtype=torch.float16).save_pretrained(place)
    write_rows(place / QUESTIONS, task.questions("test", seed, task.hops, EXAMPLES))
    record["validation_accuracy"] = validation_accuracy(RecursiveMAS.from_pretrained(place), settings.validation)
    write_atomically(place / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def validation_accuracy(system: RecursiveMAS, count: int) -> float:
    """Mean latent accuracy over the cells with enough rounds, hops to the most hops there are, on validation worlds."""
    every = task_of(system).hops
    cells = []
    for hops in every:
        enough = range(hops, max(every) + 1)
        cells += grid(
            system, VALIDATION_SEED, count, hops=[hops], rounds=enough, methods=["latent"], split="validation"
        )
    return sum(cell.accuracy for cell in cells) / len(cells)


def pretrain_all(
    folder: Path, task: Task, seed: int, jobs: int, settings: PretrainSettings, *, progress: bool
) -> dict[str, dict[str, float]]:
    """Pretrain every agent into ``folder/<role>``; what each reached, by role."""
    work = [(task, role, folder, seed, settings, progress) for role in ROLES]
    if jobs == 1:
        return dict(zip(ROLES, map(_pretrain_into, work), strict=True))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return dict(zip(ROLES, pool.map(_pretrain_into, work), strict=True))


def _pretrain_into(job: tuple[Task, str, Path, int, PretrainSettings, bool]) -> dict[str, float]:
    task, role, folder, seed, settings, progress = job
    model, tokenizer, reached = pretrain(task, role, seed, settings, progress=progress)
    model.save_pretrained(folder / role)
    tokenizer.save_pretrained(folder / role)
    return reached


def _earlier(lab: Path, task: Task) -> dict[str, Any]:
    """The record of a built lab of this task; labs of before there were tasks are the relay's."""
    if not (lab / RECORD).is_file():
        raise ValueError(f"agents: {lab} is no built lab, it has no {RECORD}")
    record: dict[str, Any] = json.loads((lab / RECORD).read_text())
    if (of := record.get("task", RELAY.name)) != task.name:
        raise ValueError(f"agents: {lab} is a lab of the task {of!r}, not of {task.name!r}")
    return record


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows as JSON lines."""
    write_atomically(path, to_lines(rows))


def _commit() -> str | None:
    """The commit of the source tree this file belongs to, None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
