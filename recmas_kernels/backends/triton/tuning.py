"""The tuner's results: kept in memory and, per device name and source fingerprint, in a file.

Nothing is ever timed unless RECMAS_TUNE=1; without it the tables of `plan` hold, and a file written by an earlier
tuned run on the same kind of device, from the same sources, is followed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import torch

from recmas_kernels.backends import settings
from recmas_kernels.files import replace_file

Option = TypeVar("Option")

_answers: dict[int | None, tuple[Path, dict[str, str]]] = {}  # by device index
_recalled: dict[tuple[object, ...], str | None] = {}  # spares a call the wording of its question


def wanted(device: torch.device) -> bool:
    """Whether this call may be timed: RECMAS_TUNE=1, on a GPU, and not while a CUDA graph records it."""
    if not settings.tunes() or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


def bucket(tokens: int) -> int:
    """The power of two at or above ``tokens``."""
    return 1 << max(0, tokens - 1).bit_length()


@cache
def fingerprint() -> str:
    """Twelve digits that change with any source file of these kernels and with triton's version."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def path(name: str) -> Path:
    """Where the answers for devices called ``name`` are kept."""
    safe = "".join(c if c.isalnum() else "-" for c in name)
    return settings.tune_folder() / f"{safe}-{fingerprint()}.json"


def _load(where: Path) -> dict[str, str]:
    try:
        answers = json.loads(where.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RuntimeError(f"cannot read the tuning file {where} ({error}); without it the defaults hold") from error
    return {str(key): str(value) for key, value in answers.items()}


def _answers_for(device: torch.device) -> tuple[Path, dict[str, str]]:
    if device.index not in _answers:
        where = path(torch.cuda.get_device_name(device.index))
        _answers[device.index] = where, _load(where)
    return _answers[device.index]


def recall(kind: str, key: Sequence[object], device: torch.device) -> str | None:
    """The tuned answer to question ``kind`` for ``key``, or None."""
    if device.type != "cuda":
        return None
    place = (kind, device.index, *key)
    if place not in _recalled:
        _recalled[place] = _answers_for(device)[1].get(_question(kind, key))
    return _recalled[place]


def _question(kind: str, key: Sequence[object]) -> str:
    return " ".join([kind, *map(str, key)])


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of ``run`` on the current device, caches flushed between runs; infinite if it does not fit."""
    import triton
    from triton.runtime.errors import OutOfResources

    try:
        return float(triton.testing.do_bench(run, return_mode="median"))
    except OutOfResources:
        return math.inf


def choose(
    kind: str,
    key: Sequence[object],
    device: torch.device,
    options: Sequence[Option],
    attempt: Callable[[Option], object],
) -> Option:
    """The tuned option, or the first one. With RECMAS_TUNE=1 a question without an answer is timed and remembered."""
    named = {str(option): option for option in options}
    known = recall(kind, key, device)
    if known in named:
        return named[known]
    if not wanted(device):
        return options[0]
    times = {name: milliseconds(partial(attempt, option)) for name, option in named.items()}
    best = min(times, key=lambda name: times[name])
    where, answers = _answers_for(device)
    place = (kind, device.index, *key)
    answers[_question(kind, key)] = _recalled[place] = best
    _write(where, answers)
    return named[best]


def _write(where: Path, answers: dict[str, str]) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    replace_file(where, json.dumps(answers, indent=1, sort_keys=True).encode())
