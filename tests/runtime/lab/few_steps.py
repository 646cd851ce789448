"""Labs that are built in seconds and know nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from recmas.lab.build import BuildSettings, build
from recmas.lab.tasks import LIST, Task


def few_steps(task: Task) -> BuildSettings:
    """A step or two of every stage."""
    own = BuildSettings.of(task)
    stages = {name: replace(stage, steps=1, batch_size=4) for name, stage in vars(own.links).items() if stage}
    pretraining = replace(own.pretrain, sheets=2, turns=2, asked=2, cooldown=1, max_steps=2)
    return BuildSettings(pretraining, replace(own.links, **stages), validation=4)


def list_lab(folder: Path, link_seed: int = 3) -> Path:
    """A lab of lists, of 600 tokens, in ``folder``."""
    task = replace(LIST, vocabulary=600)
    build(folder, 3, task=task, link_seed=link_seed, jobs=1, settings=few_steps(task), progress=False)
    return folder
