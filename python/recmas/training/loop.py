"""The one step loop of all training stages: optimiser, schedule, clipping, log, checkpoint and exact resume.

A stage hands over the parameters it trains and a loss, a pure function of (batch index, step) and of the parameters.
A run that is stopped and resumed then gives the bits of an uninterrupted one.

The output folder holds the log (`recmas.training.step_log`) and the two newest checkpoints
(`recmas.training.checkpoint`). A signal that asks the process to end is held back until the step is done and a
checkpoint is written.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from recmas.devices.failure import named
from recmas.files.locks import one_writer
from recmas.files.reading import inside
from recmas.files.signals import Pending, held_back
from recmas.training import checkpoint
from recmas.training.config import LoopConfig, settings_of
from recmas.training.processes import Processes, processes
from recmas.training.progress import Bar, Meter, Shown
from recmas.training.round_norms import RoundNorms
from recmas.training.step_log import LOG, StepRecord, TrainingResult, append_record, logged, write_records
from recmas.training.trackers import check_trackers, tracking
from recmas.training.validation import Validation

Loss = Callable[[int, int], "torch.Tensor | Iterable[torch.Tensor]"]
OnStart = Callable[[], "bool | None"]
OnStep = Callable[[StepRecord], "bool | None"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        parameters: fp32 (or fp64) masters by name, trained in place; the names are the keys of the checkpoint.
        loss: ``loss(batch index, step)``, a scalar, or parts that add up to it, each made when it is asked for; the
            batch index counts from 0 over all steps and accumulations.
        config: settings of the loop and of the stage; they are stored and compared on resume.
        name: of this run, shown beside the progress bar.
        output: folder for the log and checkpoints; None keeps neither.
        resume: continue from the folder's checkpoint if it has one.
        progress: show a bar where stderr is a terminal; "always" wherever it goes.
        trackers: names that `recmas.training.trackers` knows, for the steps' records; they are kept beside the output.
        meter: what the loss counts a step's tokens with.
        on_step: called after each step; a true answer ends the run there (a checkpoint is written).
        validate: the loss on other data; a run that ends by itself leaves the best parameters it found.
        validated_by_all: all processes call ``validate``, which needs them all; else the one that writes does.
        round_norms: called after a step's backward; makes gradients of some parameters, and returns what goes into the
            log.
    """

    parameters: Mapping[str, nn.Parameter]
    loss: Loss
    config: LoopConfig
    _: KW_ONLY
    name: str
    output: str | os.PathLike[str] | None = None
    resume: bool = False
    progress: Shown = True
    trackers: Sequence[str] = ()
    meter: Meter = field(default_factory=Meter)
    on_step: OnStep | None = None
    validate: Callable[[], float] | None = None
    validated_by_all: bool = False
    round_norms: RoundNorms | None = None

    @property
    def folder(self) -> Path | None:
        return None if self.output is None else Path(self.output)


def train(parameters: Mapping[str, nn.Parameter], loss: Loss, config: LoopConfig, **options: Any) -> TrainingResult:
    """One `Run`, whose other attributes are ``options``; raises what `train_in_turn` and `results_of` raise."""
    return results_of(train_in_turn({"": Run(parameters, loss, config, **options)}))[""]


def results_of(outcomes: Mapping[Key, TrainingResult | FloatingPointError]) -> dict[Key, TrainingResult]:
    """What `train_in_turn` returned, where all runs came to their ends.

    Raises:
        FloatingPointError: loss or gradient was not finite; names the run, step, batches and the last checkpoint, of
            each run that ended so. Its parameters keep their last good values; other runs have done all their steps.
    """
    results = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, TrainingResult)}
    failed = [str(outcome) for outcome in outcomes.values() if isinstance(outcome, FloatingPointError)]
    if failed:
        raise FloatingPointError("; ".join([*failed, *(["the others went on"] if results else [])]))
    return results


def train_in_turn(runs: Mapping[Key, Run]) -> dict[Key, TrainingResult | FloatingPointError]:
    """Runs that know nothing of each other, step by step: the one that has done the fewest steps goes next.

    Each gives the bits that it gives alone. So several of them can share what a step's batches are made of. A run whose
    loss or gradient is not finite ends there, without harm to the others; the error is what became of it.

    Raises:
        ValueError: nothing to train, a parameter in half precision, a folder that already holds a run (a checkpoint or
            a logged step) although ``resume`` is off, or a checkpoint that is damaged or of other settings or
            parameters. Nothing has been written then.
        DeviceError: a device failed; what was logged and checkpointed before stays.
    """
    for run in runs.values():
        check_run(
            run.parameters,
            run.config,
            run.folder,
            run.resume,
            validated=run.validate is not None,
            trackers=run.trackers,
        )
        for key, parameter in run.parameters.items():
            if not parameter.requires_grad:
                raise ValueError(f"{key}: a trained parameter must require grad")
    outcomes: dict[Key, TrainingResult | FloatingPointError] = {}
    with ExitStack() as stack:
        kept = any(run.folder is not None for run in runs.values())
        pending = stack.enter_context(held_back()) if kept else Pending()
        going = {key: stack.enter_context(closing(_steps(run, pending))) for key, run in runs.items()}
        done = dict.fromkeys(runs, -1)
        while going:
            least = min(going, key=done.__getitem__)
            try:
                done[least] = next(going[least])
            except StopIteration as end:
                outcomes[least] = end.value
                del going[least]
            except FloatingPointError as error:  # in all processes, as its numbers are sums over these
                outcomes[least] = error
                del going[least]
    return {key: outcomes[key] for key in runs}


def _steps(run: Run, pending: Pending) -> Generator[int, None, TrainingResult]:
    """A run's steps, one each time it is asked; yields how many are done, first those that it goes on from."""
    parameters, config, folder, together = run.parameters, run.config, run.folder, processes()
    optimizer = _optimizer(parameters, config)
    with ExitStack() as stack:
        stack.enter_context(named("training links", *(parameter.device for parameter in parameters.values())))
        records = []
        if folder is not None:
            if together.writes:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(one_writer(folder))
            records = _open(folder, parameters, optimizer, config, run.resume, together)
        found = {record.step: record.validation for record in records if record.validation is not None}
        measures = together.writes or run.validated_by_all
        validation = Validation(run.validate, parameters, config, folder, found, measures)
        shown = run.progress if together.writes else False
        bar = Bar(config.steps, len(records), run.name, shown, (p.device for p in parameters.values()))
        names = run.trackers if together.writes else ()
        track = stack.enter_context(tracking(names, run.name, folder and folder.parent, settings_of(config)))
        stack.callback(_forget_gradients, parameters)
        stack.callback(bar.close)
        spent = 0.0
        for step in range(len(records), config.steps):
            yield step
            if validation.exhausted:
                break
            began = time.perf_counter() - spent
            value, norm, norms, by_round, tokens, stop = _step(run, optimizer, step, together, pending)
            seconds = time.perf_counter() - began
            measured = validation.after(step + 1)
            rate = config.rate(step)
            records.append(StepRecord(step + 1, value, norm, rate, seconds, norms, measured, by_round, tokens))
            bar.update(value, norm, tokens)
            track(step + 1, dataclasses.asdict(records[-1]))
            if folder is not None and together.writes:
                append_record(folder, records[-1])
            wanted = (run.on_step is not None and bool(run.on_step(records[-1]))) or pending.number is not None
            # Where no message of its own is sent, a signal goes with the next step's gradients.
            if together.count == 1 or run.on_step is not None or measured is not None or step + 1 == config.steps:
                stop = stop or together.sums([float(wanted)]) != [0.0]
            due = config.checkpoint_every > 0 and (step + 1) % config.checkpoint_every == 0
            if folder is not None and (stop or due or validation.exhausted or step + 1 == config.steps):
                if together.writes:
                    checkpoint.save(folder, parameters, optimizer, settings_of(config), step + 1)
                together.wait()
            if stop:
                return TrainingResult(len(records), records)
            spent = time.perf_counter() - began
        validation.restore()
    return TrainingResult(len(records), records)


def _step(
    run: Run, optimizer: torch.optim.Optimizer, step: int, together: Processes, pending: Pending
) -> tuple[float, float, dict[str, float], dict[str, list[float]], int, bool]:
    """One optimiser step; the mean loss, the gradient's norm before clipping (of all, by link if several, and by round
    if asked for), tokens, and whether a process had got a signal when the gradients were summed."""
    parameters, config = run.parameters, run.config
    optimizer.zero_grad(set_to_none=True)
    own = 0.0
    for part in together.share(config.accumulation):
        with autocast(parameters, config):
            made = run.loss(step * config.accumulation + part, step)
        pieces = iter([made] if isinstance(made, torch.Tensor) else made)
        while True:
            with autocast(parameters, config):
                piece = next(pieces, None)
            if piece is None:
                break
            value = piece / config.accumulation
            value.backward()
            own += value.item()
            del piece, value  # their graph may hold what it computes activations from again, such as prefixes
    numbers = [own, float(run.meter.take()), float(pending.number is not None)]
    total, tokens, signals = together.sum_gradients(parameters.values(), numbers)
    by_round = {} if run.round_norms is None else run.round_norms()
    norms = _norms(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        first, stored = step * config.accumulation, [] if run.folder is None else checkpoint.checkpoints(run.folder)
        batches = (
            f"batch {first}" if config.accumulation == 1 else f"batches {first} to {first + config.accumulation - 1}"
        )
        good = f"the last good checkpoint is {stored[0]}" if stored else "there is no checkpoint before it"
        raise FloatingPointError(
            f"{run.name}, step {step + 1}, {batches}: loss {total}, gradient norm {norm}; lower the learning rate; "
            f"{good}"
        )
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    optimizer.step()
    return total, norm, norms, by_round, int(tokens), signals > 0


@contextmanager
def autocast(parameters: Mapping[str, nn.Parameter], config: LoopConfig) -> Iterator[None]:
    """Within, products are computed at the run's precision; the masters keep theirs."""
    kinds = {parameter.device.type for parameter in parameters.values()}
    with ExitStack() as stack:
        for kind in kinds if config.precision == "bfloat16" else ():
            stack.enter_context(torch.autocast(kind, torch.bfloat16))
        yield


def _norms(parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Gradient norms by link: the first part of the parameters' names."""
    links: dict[str, list[torch.Tensor]] = {}
    for key, parameter in parameters.items():
        if parameter.grad is not None:
            links.setdefault(key.partition(".")[0], []).append(parameter.grad)
    if len(links) < 2:
        return {}
    return {link: torch.nn.utils.get_total_norm(gradients).item() for link, gradients in links.items()}


def _check(parameters: Mapping[str, nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("parameters: there are none to train")
    for key, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{key}: trained parameters must be float32 masters, got {parameter.dtype}")


def _forget_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def _optimizer(parameters: Mapping[str, nn.Parameter], config: LoopConfig) -> torch.optim.AdamW:
    decayed = [p for p in parameters.values() if p.ndim > 1]
    plain = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def begins(on_start: OnStart | None) -> bool:
    """Call `on_start` in all processes, after all have checked and before one writes; whether the run goes on."""
    together = processes()
    together.wait()
    ends = on_start is not None and bool(on_start())
    together.wait()
    return not ends


def check_run(
    parameters: Mapping[str, nn.Parameter],
    config: LoopConfig,
    folder: Path | None,
    resume: bool,
    *,
    validated: bool,
    trackers: Sequence[str] = (),
) -> None:
    """Raise ValueError, before anything is written, where `train` would not begin, or go on, in this folder."""
    _check(parameters)
    processes().check(config.accumulation)
    check_trackers(trackers, folder)
    if config.patience is not None and not validated:
        raise ValueError("patience: there are no validation rows (--validation, validation=ROWS) to wait for")
    if folder is not None:
        _check_folder(parameters, config, folder, resume)


def _check_folder(parameters: Mapping[str, nn.Parameter], config: LoopConfig, folder: Path, resume: bool) -> None:
    for above in (folder, *folder.parents):
        if above.exists() and not above.is_dir():
            raise ValueError(f"{above}: is a file, expected a folder for the run's log and checkpoints")
    if folder.is_dir():
        inside(folder, LOG, str(folder))
    begun = next(logged(folder), None) is not None or checkpoint.checkpoints(folder)
    if begun and not resume:
        raise ValueError(
            f"{folder}: already holds a training run; go on with it (--resume, resume=True) "
            "or choose another folder (--output, output=FOLDER)"
        )
    if (stored := checkpoint.load(folder)) is not None:
        stored.check(parameters, settings_of(config))
        for _ in logged(folder):
            pass  # a damaged line is told here


def _open(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    resume: bool,
    together: Processes,
) -> list[StepRecord]:
    """Make the folder ready and go on from its checkpoint, if any; the records of the steps that it has finished."""
    _check_folder(parameters, config, folder, resume)  # again: now nobody else writes there
    stored = checkpoint.load(folder)
    steps = 0 if stored is None else stored.step
    if stored is not None:
        stored.restore(parameters, optimizer)
    together.wait()  # all have read before one writes
    if stored is not None and together.writes:
        checkpoint.sweep(folder, stored.path)
    records = [record for record in logged(folder) if record.step <= steps]
    if [record.step for record in records] != list(range(1, steps + 1)):
        raise ValueError(f"{folder / LOG}: lacks steps that {stored.path.name if stored else ''} has finished")
    together.wait()
    if together.writes:
        write_records(folder, records)
    return records
