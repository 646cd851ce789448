"""Validation of a run: what the links reach on other data, the best of them kept, and an end where nothing gets better.

The best parameters so far are in memory and, where a run has a folder, in its ``best.safetensors``; a run that ends
leaves them in the links. All else follows from the run's log, so that a resumed run stops where the whole one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from recmas.files import replacing
from recmas.training.config import LoopConfig
from recmas.training.processes import processes

BEST = "best.safetensors"


class Validation:
    """Watches one run.

    Args:
        measure: the loss on other data, without gradients; None watches nothing.
        parameters: that are trained.
        config: of the run.
        folder: of the run; None keeps the best in memory alone.
        found: what was found after which steps, in a run that is resumed.
        measures: whether this process calls ``measure``; the value is that of the one that writes.

    Raises:
        ValueError: the best of the steps that were done cannot be read.
    """

    def __init__(
        self,
        measure: Callable[[], float] | None,
        parameters: Mapping[str, nn.Parameter],
        config: LoopConfig,
        folder: Path | None,
        found: Mapping[int, float],
        measures: bool,
    ) -> None:
        self._measures = measures
        self._measure, self._parameters, self._config = measure, parameters, config
        self._path = None if folder is None else folder / BEST
        self._since, self._lowest = 0, math.inf
        self._best: dict[str, torch.Tensor] = {}
        best = None
        for step, value in found.items():
            if self._count(value):
                best = step
        if best is not None and self._path is not None:
            self._best = _read(self._path, best, parameters)

    @property
    def exhausted(self) -> bool:
        """Whether so many measurements in a row brought nothing better that the run should end."""
        return self._config.patience is not None and self._since >= self._config.patience

    def after(self, step: int) -> float | None:
        """What is measured after ``step`` steps, if anything; the best parameters are kept."""
        last = step == self._config.steps
        if self._measure is None or not (last or step % self._config.validate_every == 0):
            return None
        together = processes()
        with torch.no_grad():
            own = self._measure() if self._measures else 0.0
        (value,) = together.sums([own if together.writes else 0.0])
        if self._count(value):
            self._best = {key: parameter.detach().clone() for key, parameter in self._parameters.items()}
            if self._path is not None and together.writes:
                stored = {key: value.cpu().contiguous() for key, value in self._best.items()}
                with replacing(self._path) as file:
                    file.write(to_bytes(stored, metadata={"step": str(step)}))
        return value

    def restore(self) -> None:
        """Put the best parameters, if any were found, back in place."""
        with torch.no_grad():
            for key, value in self._best.items():
                self._parameters[key].copy_(value)

    def _count(self, value: float) -> bool:
        better = value < self._lowest
        self._since = 0 if better else self._since + 1
        self._lowest = min(self._lowest, value) if better else self._lowest
        return better


def _read(path: Path, step: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The best parameters, of ``step``; none where those of a later step are there, which the run reaches once more."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = int((file.metadata() or {}).get("step", -1))
            if stored > step:
                return {}
            best = {key: file.get_tensor(key) for key in parameters}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); it holds the best links of the run's log") from None
    if stored != step or any(best[key].shape != value.shape for key, value in parameters.items()):
        raise ValueError(f"{path}: does not hold the links of step {step}, which the run's log calls the best")
    return best
