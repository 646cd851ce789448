"""What a run shows while it goes on: a bar with loss, tokens per second, memory and the time that is left."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from recmas.sizing.report import size

Shown = bool | Literal["always"]
"""Bars where stderr is a terminal, nowhere, or wherever stderr goes."""
SECONDS = 10.0
"""Between two updates of a bar that is not on a terminal."""


class Meter:
    """Counts the tokens of a step as they are read: positions of prompts and texts, and latent steps."""

    def __init__(self) -> None:
        self._counted: list[int | Tensor] = []

    def add(self, tokens: int | Tensor) -> None:
        """So many more; an integer scalar on any device is not waited for."""
        self._counted.append(tokens)

    def take(self) -> int:
        """All since the last call."""
        total, self._counted = sum(map(int, self._counted)), []
        return total


class Bar:
    """A bar of one run's steps.

    Args:
        total: steps of the run.
        done: of them, by an earlier process.
        name: of the run.
        shown: where.
        devices: whose memory is shown.
    """

    def __init__(self, total: int, done: int, name: str, shown: Shown, devices: Iterable[torch.device]) -> None:
        self._devices = list(dict.fromkeys(devices))
        self._tokens, self._began = 0, time.perf_counter()
        self._bar = bar(shown, total=total, initial=done, desc=name, unit="step")

    def update(self, loss: float, norm: float, tokens: int) -> None:
        """After one more step of so many tokens."""
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._began)
        told = {"loss": f"{loss:.4f}", "grad": f"{norm:.3g}", "tokens/s": f"{rate:,.0f}"}
        self._bar.set_postfix(told | {"memory": size(peak_memory(self._devices))}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def bar(shown: Shown, **options: Any) -> tqdm[Any]:
    """A tqdm bar that is shown so; off a terminal it is updated seldom, a line each."""
    terminal = sys.stderr.isatty()
    hidden = not shown or (shown is True and not terminal)
    # Elsewhere no bar stands below another one: codes that move a cursor would go into a log.
    position = None if terminal else 0
    return tqdm(disable=hidden, mininterval=0.1 if terminal else SECONDS, position=position, **options)


def peak_memory(devices: Iterable[torch.device]) -> int:
    """The most bytes so far: of tensors on CUDA devices, else of this process in the host's memory."""
    cuda = [device for device in devices if device.type == "cuda"]
    if cuda:
        return sum(torch.cuda.max_memory_allocated(device) for device in cuda)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
