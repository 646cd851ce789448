"""Fused kernels for recursive multi-agent systems: RecursiveLinks, the latent handoff and the alignment loss.

Importing this package needs torch only and loads, compiles, tunes and probes nothing.
"""

from recmas_kernels.backends import BackendUnavailableError, explain, use_backend
from recmas_kernels.backends.packing import clear_packed
from recmas_kernels.functional import alignment_loss, latent_handoff, recursive_link
from recmas_kernels.link import LinkConfig, RecursiveLink
from recmas_kernels.modules import FusedRecursiveLink, fuse

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "FusedRecursiveLink",
    "LinkConfig",
    "RecursiveLink",
    "alignment_loss",
    "clear_packed",
    "explain",
    "fuse",
    "latent_handoff",
    "recursive_link",
    "use_backend",
]
