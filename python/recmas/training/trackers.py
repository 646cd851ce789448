"""Trackers of runs: TensorBoard, Weights & Biases and the others that Accelerate knows, fed with each step's record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

FOLDER = "tracked"
"""Of trackers that write files, beside the runs' folders."""
Log = Callable[[int, Mapping[str, Any]], None]


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


@contextmanager
def tracking(names: Sequence[str], run: str, output: Path | None, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Within, a run's trackers are started; each of them is finished, however it ends.

    Args:
        names: of trackers that `check_trackers` took.
        run: name of the run.
        output: folder of all runs; None where no tracker writes files.
        settings: of the run.

    Yields:
        What gives them the values that are known after so many steps: numbers by name, tables of them as ``name/key``,
        lists as ``name/1``.
    """
    plain = {key: value if _is_plain(value) else json.dumps(value) for key, value in settings.items()}
    started: list[Any] = []
    with ExitStack() as stack:
        for name in names:
            kind = _classes()[name]
            places = [str(output / FOLDER)] if kind.requires_logging_directory and output else []
            tracker = kind(run, *places)
            tracker.start()
            stack.callback(tracker.finish)
            tracker.store_init_configuration(plain)
            started.append(tracker)

        def log(step: int, values: Mapping[str, Any]) -> None:
            flat = dict(_flat("", values))
            for tracker in started:
                tracker.log(flat, step=step)

        yield log


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
