"""Trackers of runs: TensorBoard, Weights & Biases and the others that Accelerate knows, fed with each step's record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

FOLDER = "tracked"
"""Of trackers that write files, beside the runs' folders."""


def check_trackers(names: Sequence[str], output: Path | None) -> None:
    """Raise where these trackers cannot be used.

    Raises:
        ValueError: an unknown tracker, one whose package is not installed, or one that writes files where a run has no
            folder.
        ImportError: accelerate is not installed.
    """
    if not names:
        return
    known = _classes()
    from accelerate.tracking import get_available_trackers

    there = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"tracker: {name!r} is not one of {', '.join(known)}")
        if name not in there:
            raise ValueError(f"tracker: {name!r} is not installed (pip install {name})")
        if known[name].requires_logging_directory and output is None:
            raise ValueError(f"tracker: {name!r} writes files, so the training needs an output folder")


class Trackers:
    """The trackers of one run; a context that ends them.

    Args:
        names: of trackers that `check_trackers` took.
        run: name of the run.
        output: folder of all runs; None where no tracker writes files.
        settings: of the run.
    """

    def __init__(self, names: Sequence[str], run: str, output: Path | None, settings: Mapping[str, Any]) -> None:
        self._names, self._run, self._output, self._settings = names, run, output, settings
        self._started: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> Trackers:
        plain = {key: value if _is_plain(value) else json.dumps(value) for key, value in self._settings.items()}
        for name in self._names:
            kind = _classes()[name]
            places = [str(self._output / FOLDER)] if kind.requires_logging_directory and self._output else []
            tracker = kind(self._run, *places)
            tracker.start()
            self._stack.callback(tracker.finish)
            tracker.store_init_configuration(plain)
            self._started.append(tracker)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """What is known after ``step`` steps: numbers by name, tables of them as ``name/key``, lists as ``name/1``."""
        flat = dict(_flat("", values))
        for tracker in self._started:
            tracker.log(flat, step=step)


def _flat(name: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, value
    inner = value if isinstance(value, Mapping) else dict(enumerate(value, 1)) if isinstance(value, list) else {}
    for key, part in inner.items():
        yield from _flat(f"{name}/{key}".lstrip("/"), part)


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _classes() -> dict[str, Any]:
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError:
        raise ImportError("trackers need accelerate: pip install 'recmas-kernels[train]'") from None
    return {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
