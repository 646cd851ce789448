"""The one step loop of all training stages: optimiser, schedule, clipping, log, checkpoint and exact resume.

A stage hands over the parameters it trains and a loss, a pure function of (batch index, step) and of the parameters.
A run that is stopped and resumed then gives the bits of an uninterrupted one.

The output folder holds ``log.jsonl`` (one line per step: step, loss, grad_norm, learning_rate, seconds) and
``checkpoint.pt`` (parameters, optimiser, step, random state, settings), replaced as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from recmas.files import replacing, write_atomically
from recmas.training.config import LoopConfig

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One line of the log; ``step`` counts finished steps, so the first is 1."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """What a loop did: finished steps in all, and their records; of a resumed run, the earlier steps' from its log."""

    steps: int
    records: list[StepRecord] = field(repr=False)

    @property
    def loss(self) -> float:
        """Mean loss over the last tenth of the steps."""
        last = self.records[-max(1, len(self.records) // 10) :]
        return sum(record.loss for record in last) / len(last) if last else math.nan


Loss = Callable[[int, int], "torch.Tensor | Iterable[torch.Tensor]"]
OnStep = Callable[[StepRecord], "bool | None"]


def train(
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    config: LoopConfig,
    *,
    name: str,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Train ``parameters`` in place.

    Args:
        parameters: fp32 (or fp64) masters by name; the names are the keys of the checkpoint.
        loss: ``loss(batch index, step)``, a scalar, or parts that add up to it, each made when it is asked for; the
            batch index counts from 0 over all steps and accumulations.
        config: settings of the loop and of the stage; they are stored and compared on resume.
        name: of this run, shown beside the progress bar.
        output: folder for the log and checkpoints; None keeps neither.
        resume: continue from the folder's checkpoint if it has one.
        progress: show a bar where stderr is a terminal.
        on_step: called after each step; a true answer ends the run there (a checkpoint is written).

    Raises:
        ValueError: nothing to train, a parameter in half precision, a folder that already holds a run (a checkpoint or
            a logged step) although ``resume`` is off, or a checkpoint of other settings or parameters.
        FloatingPointError: loss or gradient is not finite; names the step. The parameters keep their last good values.
    """
    _check(parameters)
    optimizer = _optimizer(parameters, config)
    folder = None if output is None else Path(output)
    step, records = (0, []) if folder is None else _open(folder, parameters, optimizer, config, resume)
    began = time.perf_counter()
    bar = tqdm(total=config.steps, initial=step, desc=name, disable=None if progress else True, unit="step")
    try:
        while step < config.steps:
            value, norm = _step(parameters, optimizer, loss, config, step)
            step += 1
            records.append(StepRecord(step, value, norm, config.rate(step - 1), time.perf_counter() - began))
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", grad=f"{norm:.3g}", refresh=False)
            if folder is not None:
                with open(folder / LOG, "a", encoding="utf-8") as log:
                    log.write(_line(records[-1]))
            stop = on_step is not None and bool(on_step(records[-1]))
            due = config.checkpoint_every > 0 and step % config.checkpoint_every == 0
            if folder is not None and (stop or due or step == config.steps):
                _save(folder / CHECKPOINT, parameters, optimizer, config, step)
            if stop:
                break
    finally:
        bar.close()
        for parameter in parameters.values():
            parameter.grad = None
    return TrainingResult(step, records)


def _step(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    config: LoopConfig,
    step: int,
) -> tuple[float, float]:
    """One optimiser step; the mean loss and the gradient's norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in range(config.accumulation):
        made = loss(step * config.accumulation + part, step)
        for piece in [made] if isinstance(made, torch.Tensor) else made:
            value = piece / config.accumulation
            value.backward()
            total += value.item()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(f"step {step + 1}: loss {total}, gradient norm {norm}; lower the learning rate")
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    optimizer.step()
    return total, norm


def _check(parameters: Mapping[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("parameters: there are none to train")
    for key, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{key}: trained parameters must be float32 masters, got {parameter.dtype}")
        if not parameter.requires_grad:
            raise ValueError(f"{key}: a trained parameter must require grad")


def _optimizer(parameters: Mapping[str, nn.Parameter], config: LoopConfig) -> torch.optim.AdamW:
    decayed = [p for p in parameters.values() if p.ndim > 1]
    plain = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def _settings(config: LoopConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return json.loads(json.dumps({"stage": type(config).__name__, **dataclasses.asdict(config)}))


def _open(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    resume: bool,
) -> tuple[int, list[StepRecord]]:
    """Make the folder ready; the number of steps that its checkpoint, if any, has finished, and their records."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / CHECKPOINT, folder / LOG
    if not resume and (checkpoint.exists() or next(_logged(log), None) is not None):
        raise ValueError(
            f"{folder}: already holds a training run; go on with it (--resume, resume=True) "
            "or choose another folder (--output, output=FOLDER)"
        )
    step = _load(checkpoint, parameters, optimizer, config) if checkpoint.exists() else 0
    records = [record for record in _logged(log) if record.step <= step]
    write_atomically(log, "".join(map(_line, records)))
    return step, records


def _logged(log: Path) -> Iterator[StepRecord]:
    """Records of the log, but for a last line that a crash cut short."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                yield StepRecord(**json.loads(line))
            except (ValueError, TypeError):
                raise ValueError(f"{log}, line {number}: not a record of a training step") from None


def _line(record: StepRecord) -> str:
    return json.dumps(dataclasses.asdict(record)) + "\n"


def _save(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    step: int,
) -> None:
    state = {
        "settings": _settings(config),
        "step": step,
        "parameters": {key: p.detach() for key, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with replacing(path) as file:
        torch.save(state, file)


def _load(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, config: LoopConfig
) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored, settings = state["parameters"], state["settings"]
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error
    for key, value in _settings(config).items():
        if settings.get(key) != value:
            raise ValueError(f"{path}: was made with {key} = {settings.get(key)!r}, this run has {value!r}")
    if stored.keys() != parameters.keys():
        other = sorted(stored.keys() ^ parameters.keys())
        raise ValueError(f"{path}: trains other parameters than this run ({other[0]} is in one of them only)")
    for key, parameter in parameters.items():
        if stored[key].shape != parameter.shape:
            found, expected = list(stored[key].shape), list(parameter.shape)
            raise ValueError(f"{path}: {key} has shape {found}, expected {expected}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(stored[key])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return int(state["step"])
