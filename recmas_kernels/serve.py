"""What each op does, as plain functions: the way from a call to the backend that serves it.

``choose`` decides in here, where tracing does not see it, so that no op breaks a graph. The functions know no autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recmas_kernels.backends import cpu, settings
from recmas_kernels.backends.call import Call
from recmas_kernels.backends.choice import choose
from recmas_kernels.devices import autocast_enabled, device_type
from recmas_kernels.reference import LinkArguments


def _serve(call: Call, *arguments: Any) -> Any:
    """The op of ``call``, run by the backend that serves it."""
    run = getattr(choose(call), call.op)
    if autocast_enabled(call.device):
        # The dtype was settled outside; autocast would cast the float32 accumulations of the reference again.
        with torch.autocast(call.device, enabled=False):
            return run(*arguments)
    return run(*arguments)


def _link_call(op: str, arguments: LinkArguments, training: bool) -> Call:
    x = arguments.x
    tokens, in_features = x.shape
    out_features, hidden_features = arguments.w2.shape
    return Call(op, device_type(x), arguments.dtype, tokens, in_features, hidden_features, out_features, training)


def _row_call(op: str, rows: Tensor, training: bool = False) -> Call:
    tokens, width = rows.shape
    return Call(op, device_type(rows), rows.dtype, tokens, width, 0, width, training)


def link_fwd(arguments: LinkArguments) -> Tensor:
    """y ``[T, out]`` in x's dtype."""
    return _serve(_link_call("link_fwd", arguments, False), arguments)


def link_fwd_train(arguments: LinkArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, pre, z, stats)``, see `reference.link_fwd_train`."""
    return _serve(_link_call("link_fwd_train", arguments, True), arguments)


def link_bwd(
    arguments: LinkArguments,
    dy: Tensor,
    pre: Tensor | None,
    z: Tensor | None,
    stats: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Eleven gradients, see `reference.link_bwd`. Without ``pre``, ``z`` and ``stats`` they are made again from x."""
    if pre is None:
        _, pre, z, stats = link_fwd_train(arguments)
    return _serve(_link_call("link_bwd", arguments, True), arguments, dy, pre, z, stats, needs)


def frozen_linear(x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, stored: torch.dtype) -> Tensor:
    """y ``[..., out_features]`` in x's dtype. Panels exist where the CPU kernels do, so these serve every call."""
    return cpu.frozen_linear(x, panels, bias, out_features, stored)


def frozen_linear_bwd(dy: Tensor, panels: Tensor, in_features: int, stored: torch.dtype) -> Tensor:
    """dx ``[..., in_features]`` in dy's dtype."""
    return cpu.frozen_linear_bwd(dy, panels, in_features, stored)


def frozen_weight(panels: Tensor, out_features: int, in_features: int, stored: torch.dtype) -> Tensor:
    """The weight ``[out_features, in_features]`` that panels were made of."""
    return cpu.unpack_frozen(panels, out_features, in_features, stored)


def handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    """See `reference.handoff_fwd`."""
    _check_slot_rows(slot_rows, embeds.shape[0])
    return _serve(_row_call("handoff_fwd", rows), rows, embeds, slot_rows)


def handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    """See `reference.handoff_`."""
    _check_slot_rows(slot_rows, embeds.shape[0])
    _serve(_row_call("handoff_", rows), rows, embeds, slot_rows)


def handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.handoff_bwd`."""
    _check_slot_rows(slot_rows, dy.shape[0])
    return _serve(_row_call("handoff_bwd", dy, training=True), dy, slot_rows)


def alignment_fwd(pred: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """See `reference.alignment_fwd`."""
    return _serve(_row_call("alignment_fwd", pred), pred, *rest)


def alignment_bwd(grad: Tensor, dloss: Tensor) -> Tensor:
    """``grad * dloss`` in grad's dtype, in grad's own memory where that is cheaper: whoever calls gives it up."""
    return _serve(_row_call("alignment_bwd", grad, training=True), grad, dloss)


def _check_slot_rows(slot_rows: Tensor, table_rows: int) -> None:
    """Under ``RECMAS_CHECK=1``: raise ValueError unless the rows are unique and inside ``[0, table_rows)``.

    Not otherwise, since on an accelerator it waits for the device.
    """
    if not settings.checks() or slot_rows.numel() == 0:
        return
    if slot_rows.unique().numel() != slot_rows.numel():
        raise ValueError("slot_rows names a row more than once")
    if slot_rows.min() < 0 or slot_rows.max() >= table_rows:
        raise ValueError(f"slot_rows names rows outside [0, {table_rows})")
