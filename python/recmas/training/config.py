"""Settings of the training stages. No torch here, so that ``recmas train --help`` is fast."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

SAFE_RATE = 1e-4
MOST_RATE = 1e6
"""AdamW moves parameters by about the rate: with a higher one they soon exceed float32."""
LinkInit = Literal["default", "identity", "ridge"]
Source = Literal["forced", "rollout"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings that every stage shares.

    Attributes:
        steps: optimiser steps in all; the schedule ends there.
        batch_size: rows per batch (a callable row source decides for itself).
        accumulation: batches per step; the step's loss is the plain mean of their losses. Several processes deal them
            out among themselves.
        learning_rate: peak of the schedule.
        betas: of AdamW's two moments.
        weight_decay: AdamW's, on matrices only, never on biases and other 1-D parameters.
        schedule: "cosine" or "linear" to zero at the last step, or "constant", after the warm-up.
        warmup_steps: steps over which the rate grows linearly to its peak.
        clip_norm: bound of the gradient's norm over all trained parameters.
        checkpoint_every: steps between checkpoints (one more is written at the end); 0 writes only that one.
        validate_every: steps between two measurements of the validation rows, where there are any; one more follows the
            last step.
        patience: measurements in a row without a better one that end the run; None is as many as there are steps.
        seed: of the order of rows and of everything else that is drawn.
        precision: of products: "float32" leaves models and links theirs, "bfloat16" computes under autocast; the links'
            masters and the optimiser stay float32.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 10
    clip_norm: float = 1.0
    checkpoint_every: int = 100
    validate_every: int = 100
    patience: int | None = None
    seed: int = 42
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("accumulation", 1),
            ("warmup_steps", 0),
            ("checkpoint_every", 0),
            ("validate_every", 1),
        ):
            check_count(name, getattr(self, name), least)
        if self.patience is not None:
            check_count("patience", self.patience, 1)
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            check_number(name, getattr(self, name))
        if not 0 < self.learning_rate <= MOST_RATE:
            raise ValueError(f"learning_rate must be above 0 and at most {MOST_RATE:g}, got {self.learning_rate}")
        if not (_are_numbers(self.betas) and len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay}")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule must be 'cosine', 'linear' or 'constant', got {self.schedule!r}")

    def rate(self, step: int) -> float:
        """Learning rate of ``step`` (from 0)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(LoopConfig):
    """Settings of a stage that aligns links' outputs with embeddings; see `LoopConfig` for the rest.

    Attributes:
        rounds: the round whose prompts and messages are trained on, or several of which each step draws one.
        cosine_weight: of one minus the cosine between link output and embedding.
        mse_weight: of their mean squared difference.
        max_tokens: only the first tokens of a message count; None takes all.
        link_init: "default" begins with the links as they are; "identity" with their residual alone; "ridge" with the
            linear map of the targets (`recmas.training.link_init`).
    """

    rounds: int | tuple[int, ...] = 1
    cosine_weight: float = 1.0
    mse_weight: float = 0.0
    max_tokens: int | None = None
    link_init: LinkInit = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounds(self.rounds)
        if self.link_init not in ("default", "identity", "ridge"):
            raise ValueError(f"link_init must be 'default', 'identity' or 'ridge', got {self.link_init!r}")
        for name in ("cosine_weight", "mse_weight"):
            check_number(name, getattr(self, name))
        weights = self.cosine_weight, self.mse_weight
        if not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(
                f"cosine_weight and mse_weight must be finite, not negative nor both zero, got {weights[0]} and "
                f"{weights[1]}"
            )
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class InnerConfig(AlignmentConfig):
    """Settings of the inner stage: those of `AlignmentConfig` with the defaults of the reference implementation.

    Rounds from 2 on show a first-stage agent the prompt that holds feedback.

    Attributes:
        inner_target: agent whose input embeddings of the text are the targets, for all trained links or by role; None
            takes each agent's own. Agents of equal width only.
    """

    inner_target: str | Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class WarmupConfig(AlignmentConfig):
    """Settings of the warm-up: those of `AlignmentConfig`."""

    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class OuterConfig(LoopConfig):
    """Settings of the outer stage; see `LoopConfig` for the rest.

    Attributes:
        learning_rate: 1e-4. A higher one (5e-4, 1e-3) serves a single round only: through two rounds or more it was
            measured to destroy links that worked, so `train_outer` warns.
        rounds: of the unrolled recursion, or several of which each step draws one.
        latent_steps: of every agent or by role; None takes the system's own.
        latents: "forced" reads them off under the gold message (at most one per token of it, end included); "rollout"
            lets each agent think as at inference, which needs no gold messages but the answer, and a longer graph.
        recompute: keep each layer's input alone and run the layer again in the backward, as the reference does: much
            less memory, a third more time, the same bits. Rollouts are run again step by step.
        micro_batch: rows that are unrolled at once; a batch's gradients are gathered over its micro-batches. None takes
            as many as keep the processor busy.
        round_weights: of the last agent's cross entropy after each round, whose sum is the loss; as many as the most
            rounds. A step of fewer rounds takes the last ones. None weighs the last round alone, by 1.
        round_norms: log, too, by link and round, the norm of the gradient that comes through the messages sent in that
            round. Each round needs memory for gradients of its own, beside their sum.
        distill: weight of the distance between the last agent's latents and those of the agent that it reads, which is
            added to the loss (`recmas.training.distillation`); 0 leaves it out.
    """

    learning_rate: float = SAFE_RATE
    rounds: int | tuple[int, ...] = 3
    latent_steps: int | Mapping[str, int] | None = None
    latents: Source = "forced"
    recompute: bool = True
    micro_batch: int | None = None
    round_weights: tuple[float, ...] | None = None
    round_norms: bool = False
    distill: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rounds(self.rounds)
        if self.micro_batch is not None:
            check_count("micro_batch", self.micro_batch, 1)
        if self.round_weights is not None:
            check_round_weights(self.round_weights, self.most_rounds)
        check_number("distill", self.distill)
        if not (math.isfinite(self.distill) and self.distill >= 0):
            raise ValueError(f"distill must not be negative, got {self.distill}")
        if self.distill > 0 and self.most_rounds < 2:
            raise ValueError("distill: in one round the last agent has no latents to compare; train two or more")
        if self.latents not in ("forced", "rollout"):
            raise ValueError(f"latents must be 'forced' or 'rollout', got {self.latents!r}")

    @property
    def most_rounds(self) -> int:
        return self.rounds if isinstance(self.rounds, int) else max(self.rounds)


@dataclass(frozen=True, kw_only=True)
class AllConfig:
    """Settings of all three stages, one after the other; what is not here has each stage's own default.

    Attributes:
        steps: optimiser steps of each link's run, and of the outer links together.
        batch_size: rows per batch.
        accumulation: batches per step; several processes deal them out among themselves.
        rounds: of the unrolled recursion, or several of which each step draws one; None is 1 to the system's own.
        latent_steps: of every agent or by role; None is the system's own.
        latents: "forced" or "rollout", of the outer stage.
        round_weights: of the last agent's cross entropy after each round, in the outer stage, whose sum is the loss;
            None weighs the last round alone.
        round_norms: log the gradient's norm by link and round, too, in the outer stage.
        distill: weight of the distance between the last agent's latents and its expert's, in the outer stage.
        inner_target: agent whose input embeddings are the targets of inner links, for all or by role; None takes each
            agent's own.
        checkpoint_every: steps between checkpoints.
        validate_every: steps between two measurements of the validation rows, where there are any.
        patience: measurements in a row without a better one that end a run; None is as many as there are steps.
        seed: of all that is drawn.
        precision: of products, "float32" or "bfloat16".
    """

    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    rounds: int | tuple[int, ...] | None = None
    latent_steps: int | Mapping[str, int] | None = None
    latents: Source = "forced"
    round_weights: tuple[float, ...] | None = None
    round_norms: bool = False
    distill: float = 0.0
    inner_target: str | Mapping[str, str] | None = None
    checkpoint_every: int = 100
    validate_every: int = 100
    patience: int | None = None
    seed: int = 42
    precision: Literal["float32", "bfloat16"] = "float32"

    def stages(self, rounds: int) -> tuple[InnerConfig, WarmupConfig, OuterConfig]:
        """The stages' settings for a system of so many rounds."""
        names = {field.name for field in fields(LoopConfig)} & {field.name for field in fields(self)}
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        shared["rounds"] = tuple(range(1, rounds + 1)) if self.rounds is None else self.rounds
        outer = OuterConfig(
            **shared,
            latent_steps=self.latent_steps,
            latents=self.latents,
            round_weights=self.round_weights,
            round_norms=self.round_norms,
            distill=self.distill,
        )
        aligned = shared | {"rounds": tuple(range(1, outer.most_rounds + 1))}
        return InnerConfig(**aligned, inner_target=self.inner_target), WarmupConfig(**aligned), outer


_STAGES = {kind.__name__: kind for kind in (InnerConfig, WarmupConfig, OuterConfig)}
ALWAYS_TOLD = ("steps", "batch_size", "accumulation", "learning_rate")
"""Settings that are told of every run, be they the defaults or not."""


def settings_of(config: LoopConfig) -> dict[str, Any]:
    """The configuration as plain JSON values, with the name of its stage."""
    return json.loads(json.dumps({"stage": type(config).__name__, **asdict(config)}))


def is_of_a_stage(settings: Mapping[str, Any]) -> bool:
    """Whether these are what `settings_of` makes of a stage's configuration."""
    return settings.get("stage") in list(_STAGES)  # a list, since a damaged file may say what has no hash


def changed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `settings_of` made of a stage's configuration, all that is not the stage's default."""
    defaults = settings_of(_STAGES[settings["stage"]]())
    return {name: value for name, value in settings.items() if name not in defaults or defaults[name] != value}


def check_count(name: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number."""
    if not _are_numbers([value]):
        raise ValueError(f"{name} must be a number, got {value!r}")


def _are_numbers(values: object) -> bool:
    return isinstance(values, Sequence) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )


def each_round_count(rounds: int | Sequence[int]) -> list[int]:
    """All that a step may draw from."""
    return [rounds] if isinstance(rounds, int) else list(rounds)


def check_rounds(rounds: int | Sequence[int]) -> None:
    """Raise ValueError unless ``rounds`` is a positive integer or a sequence of at least one."""
    several = each_round_count(rounds) if isinstance(rounds, int | Sequence) else []
    if not several or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in several):
        raise ValueError(f"rounds must be one or more positive integers, got {rounds!r}")


def check_round_weights(weights: Sequence[float], rounds: int) -> None:
    """Raise ValueError unless these weigh the losses of so many rounds: none negative, the last one positive."""
    if not _are_numbers(weights):
        raise ValueError(f"round_weights must be a sequence of numbers, got {weights!r}")
    if len(weights) != rounds:
        raise ValueError(f"round_weights: expected one for each of {rounds} rounds, got {len(weights)}")
    if not (all(math.isfinite(weight) and weight >= 0 for weight in weights) and weights[-1] > 0):
        raise ValueError(f"round_weights must not be negative, and the last one positive, got {tuple(weights)}")


def weighed_rounds(weights: Sequence[float] | None, rounds: int) -> dict[int, float]:
    """Of a run of so many rounds, those after which the last agent's loss counts, and their weights."""
    last = (1.0,) if weights is None else tuple(weights)[-rounds:]
    first = rounds - len(last) + 1
    return {round: weight for round, weight in enumerate(last, start=first) if weight > 0}
