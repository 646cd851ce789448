"""The compiled CPU kernels: which calls they take, allocation, and the native calls. The only caller of ``_cpu``.

``module`` is the compiled module, its instruction set and dtypes; ``readable`` and ``panels`` are the tensors that it
reads. One file per kernel family: ``link``, ``frozen``, ``decoder``, ``rows``, ``alignment``; and ``objects``, which
compares what Python holds.
"""

from __future__ import annotations

from recmas_kernels.backends.call import Call
from recmas_kernels.backends.cpu.alignment import alignment_bwd, alignment_fwd
from recmas_kernels.backends.cpu.frozen import frozen_linear, frozen_linear_bwd
from recmas_kernels.backends.cpu.link import link_bwd, link_fwd, link_fwd_train
from recmas_kernels.backends.cpu.module import ISAS, fresh_scratch, instruction_set, library, reads, unavailable
from recmas_kernels.backends.cpu.objects import stand_ins, unchanged, versions
from recmas_kernels.backends.cpu.panels import MOST_STREAMED, pack_frozen, unpack_frozen
from recmas_kernels.backends.cpu.rows import handoff_, handoff_bwd, handoff_fwd, rms_norm

__all__ = [
    "ISAS",
    "MOST_STREAMED",
    "alignment_bwd",
    "alignment_fwd",
    "declines",
    "fresh_scratch",
    "frozen_linear",
    "frozen_linear_bwd",
    "handoff_",
    "handoff_bwd",
    "handoff_fwd",
    "instruction_set",
    "library",
    "link_bwd",
    "link_fwd",
    "link_fwd_train",
    "pack_frozen",
    "reads",
    "rms_norm",
    "stand_ins",
    "unavailable",
    "unchanged",
    "unpack_frozen",
    "versions",
]


def declines(call: Call) -> str | None:
    """Why ``call`` is not served; None if it is."""
    if call.op.startswith("handoff"):
        return None
    if not reads(call.dtype):
        return f"the kernels have no {str(call.dtype).removeprefix('torch.')}"
    if 0 in (call.in_features, call.out_features) or (
        not call.op.startswith("alignment") and call.hidden_features == 0
    ):
        return "a size is 0"
    return None
