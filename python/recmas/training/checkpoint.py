"""Checkpoints of a run: safetensors files whose names hold the step and the beginning of their sha256.

A checkpoint is in place, whole and on the disk, before an older one is removed; the newest and the one before it stay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from recmas.files import replacing
from recmas.files.reading import inside, sha256

_NAME = re.compile(r"checkpoint-(\d+)-([0-9a-f]{16})\.safetensors")
_KEPT = 2
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter."""


def checkpoints(folder: Path) -> list[Path]:
    """From the newest to the oldest."""
    found = [path for path in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


@dataclass(frozen=True)
class Checkpoint:
    """What is stored: tensors by name, finished steps, the run's settings."""

    path: Path
    tensors: dict[str, Tensor]
    step: int
    settings: dict[str, Any]

    def check(self, parameters: Mapping[str, nn.Parameter], settings: Mapping[str, Any]) -> None:
        """Raise ValueError if this is of other settings, or of other parameters."""
        for key, value in settings.items():
            if self.settings.get(key) != value:
                found = self.settings.get(key)
                raise ValueError(f"{self.path}: was made with {key} = {found!r}, this run has {value!r}")
        stored = {name.partition(".")[2] for name in self.tensors if name.startswith("parameter.")}
        if other := sorted(stored ^ parameters.keys()):
            raise ValueError(f"{self.path}: trains other parameters than this run ({other[0]} is in one of them only)")
        for key, parameter in parameters.items():
            for kind in ("parameter", "exp_avg", "exp_avg_sq"):
                value = self.tensors.get(f"{kind}.{key}", parameter)
                if value.shape != parameter.shape:
                    found, expected = list(value.shape), list(parameter.shape)
                    raise ValueError(f"{self.path}: {kind}.{key} has shape {found}, expected {expected}")

    def restore(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Put parameters, the optimiser's moments and the random states back."""
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(self.tensors[f"parameter.{key}"])
                if f"step.{key}" in self.tensors:
                    moments = {name: self.tensors[f"{name}.{key}"] for name in _MOMENTS}
                    optimizer.state[parameter] = {
                        name: value if name == "step" else value.to(parameter.device) for name, value in moments.items()
                    }
        torch.set_rng_state(self.tensors["rng"])
        if torch.cuda.is_available() and (states := [v for k, v in self.tensors.items() if k.startswith("cuda_rng.")]):
            torch.cuda.set_rng_state_all(states)


def save(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    step: int,
) -> Path:
    """Write a checkpoint into `folder`, then remove all but it and the newest older one."""
    tensors = {f"parameter.{key}": parameter.detach() for key, parameter in parameters.items()}
    for key, parameter in parameters.items():
        tensors |= {f"{name}.{key}": value for name, value in optimizer.state.get(parameter, {}).items()}
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"cuda_rng.{index:03d}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    content = to_bytes(
        {name: value.cpu().contiguous() for name, value in tensors.items()},
        # One entry: safetensors writes several in an order that differs from call to call, and the name is a digest.
        metadata={"run": json.dumps({"step": step, "settings": settings})},
    )
    path = folder / f"checkpoint-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    with replacing(path) as file:
        file.write(content)
    sweep(folder, path)
    return path


def sweep(folder: Path, newest: Path) -> None:
    """Remove all but `newest` and the one before it, also what a process left that was killed while it did so."""
    others = [other for other in checkpoints(folder) if other != newest]
    kept = [other for other in others if _step_of(other) < _step_of(newest)][: _KEPT - 1]
    for other in others:
        if other not in kept:
            other.unlink()


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, None if there is none.

    Raises:
        ValueError: a damaged file, which names the older one; a file of an earlier version.
    """
    found = checkpoints(folder)
    if not found:
        if (folder / "checkpoint.pt").exists():
            raise ValueError(f"{folder / 'checkpoint.pt'}: was made by an earlier version, which must go on with it")
        return None
    path = found[0]
    advice = f"delete it to go on from {found[1].name}" if found[1:] else "there is no older one"
    inside(folder, path.name, str(folder))
    match = _NAME.fullmatch(path.name)
    assert match is not None
    if not sha256(path).startswith(match.group(2)):
        raise ValueError(f"{path}: is damaged, its sha256 is not the one in its name; {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            run = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Checkpoint(path, tensors, int(run["step"]), dict(run["settings"]))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error}); {advice}") from None
