"""What a decoder can do beside a plain forward over one row: asked here, proved elsewhere (`recmas.engine.proofs`).

Nothing is known by a model's name. A feature that a decoder has not proved is off for it, and what is off says why; an
answer computed without it is the same, only slower.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Proof:
    """What one proof found.

    Attributes:
        holds: whether the decoder may be used this way.
        error: the largest relative difference that was seen; infinite where something raised.
        bound: what rounding explains.
        detail: what was compared, or what was raised.
    """

    holds: bool
    error: float
    bound: float
    detail: str

    @classmethod
    def of(cls, error: float, bound: float, detail: str) -> Proof:
        return cls(error <= bound and math.isfinite(error), error, bound, detail)

    @classmethod
    def raised(cls, error: Exception) -> Proof:
        """The proof of what cannot even be computed."""
        lines = str(error).strip().splitlines()
        return cls(False, float("inf"), 0.0, f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}")

    def __str__(self) -> str:
        if self.bound == 0.0 and self.error > 0.0:
            return self.detail
        return f"{self.detail} differ by {self.error:.1e} of their size; rounding explains {self.bound:.1e}"


Prover = Callable[[PreTrainedModel], dict[str, Proof]]
_PROVERS: dict[str, Prover] = {}
_FOUND: dict[str, dict[str, Proof]] = {}
_FINGERPRINTS: WeakKeyDictionary[PreTrainedModel, tuple[object, str]] = WeakKeyDictionary()
_PROVING = threading.RLock()


def proves(*features: str) -> Callable[[Prover], Prover]:
    """Decorates what proves these features, all of them at once."""

    def register(prover: Prover) -> Prover:
        def guarded(decoder: PreTrainedModel) -> dict[str, Proof]:
            try:
                return prover(decoder)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model raises that cannot be used so
                return dict.fromkeys(features, Proof.raised(error))

        _PROVERS.update(dict.fromkeys(features, guarded))
        return prover

    return register


def proof(decoder: PreTrainedModel, feature: str) -> Proof:
    """The proof of one feature; it runs when it is first asked for, once for all models of one fingerprint."""
    key = fingerprint(decoder)
    found = _FOUND.setdefault(key, {})
    if feature not in found:
        with _PROVING:
            if feature not in found:
                found.update(_PROVERS[feature](decoder))
    return found[feature]


def missing(decoder: PreTrainedModel, feature: str) -> str:
    """Why a feature is off for this decoder; empty if it is proved, or if nobody who could prove it was imported."""
    if feature not in _PROVERS:
        return ""
    found = proof(decoder, feature)
    return "" if found.holds else f"{decoder.config.model_type} model without {feature}: {found}"


def stand_in(other: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """What is proved of `decoder` holds of `other`, which computes as it does."""
    known = fingerprint(decoder)
    _FINGERPRINTS[other] = _quick(other), known


def fingerprint(decoder: PreTrainedModel) -> str:
    """What decides how a decoder computes: configuration, classes, attention, dtype, kind of device, transformers."""
    quick = _quick(decoder)
    known = _FINGERPRINTS.get(decoder)
    if known is None or known[0] != quick:
        classes = sorted({f"{type(part).__module__}.{type(part).__qualname__}" for part in decoder.modules()})
        config: dict[str, Any] = decoder.config.to_dict()
        config.pop("_name_or_path", None)
        parts = (sorted(config.items(), key=str), classes, quick, transformers.__version__, torch.__version__)
        known = quick, hashlib.sha256(repr(parts).encode()).hexdigest()
        _FINGERPRINTS[decoder] = known
    return known[1]


def _quick(decoder: PreTrainedModel) -> tuple[object, ...]:
    """What may change while a model lives."""
    weight = decoder.get_input_embeddings().weight
    return weight.dtype, weight.device.type, decoder.config._attn_implementation
