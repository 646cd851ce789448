"""Kernels for recursive multi-agent systems: RecursiveLinks, latent handoff, alignment loss, frozen linear layers.

Public are the names in ``__all__``, the command ``python -m recmas_kernels.info``, and ``recmas_kernels.testing`` for
tests and benchmarks. Importing this package needs torch only and loads, compiles, tunes and probes nothing.
"""

from recmas_kernels.accelerate import accelerate
from recmas_kernels.backends.choice import BACKENDS, BackendUnavailableError, use_backend
from recmas_kernels.backends.explain import explain
from recmas_kernels.backends.packing import packed
from recmas_kernels.config import LinkConfig
from recmas_kernels.decoder.steps import DecoderSteps
from recmas_kernels.frozen_linear import FrozenLinear
from recmas_kernels.functional import Norm, alignment_loss, latent_handoff, recursive_link
from recmas_kernels.fuse import fuse
from recmas_kernels.fused_link import FusedRecursiveLink
from recmas_kernels.link import RecursiveLink
from recmas_kernels.version import __version__
from recmas_kernels.weights import named_weights

__all__ = [
    "BACKENDS",
    "BackendUnavailableError",
    "DecoderSteps",
    "FrozenLinear",
    "FusedRecursiveLink",
    "LinkConfig",
    "Norm",
    "RecursiveLink",
    "__version__",
    "accelerate",
    "alignment_loss",
    "explain",
    "fuse",
    "latent_handoff",
    "named_weights",
    "packed",
    "recursive_link",
    "use_backend",
]
