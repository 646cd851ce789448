"""Every op: its schema, its fake and its registration, on one page.

An op is functional, knows no autograd (``functional.py`` holds the Functions) and does not know which kernel runs:
``backends.choose`` decides inside the op, where tracing cannot see it, so nothing here breaks a graph. Schemas are
written by hand and registered with ``define`` + ``impl``: the ``custom_op`` decorator costs about four times as much
per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recmas_kernels import backends

_PARAMETERS = (
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w3, Tensor? b3, "
    "Tensor? gi, Tensor? ci, Tensor? go, Tensor? co"
)
_SETTINGS = "str residual, str gelu, float eps, ScalarType dtype"
_ELEVEN = ", ".join(["Tensor"] * 11)

SCHEMAS = {
    "link_fwd": f"(Tensor x, {_PARAMETERS}, {_SETTINGS}, bool may_pack) -> Tensor",
    "link_fwd_train": f"(Tensor x, {_PARAMETERS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "link_bwd": "(Tensor dy, Tensor x, Tensor? pre, Tensor? z, Tensor? stats, "
    f"{_PARAMETERS}, {_SETTINGS}, bool[11] needs) -> ({_ELEVEN})",
    "handoff_fwd": "(Tensor rows, Tensor embeds, Tensor slot_rows) -> Tensor",
    "handoff_": "(Tensor rows, Tensor(a!) embeds, Tensor slot_rows) -> ()",
    "handoff_bwd": "(Tensor dy, Tensor slot_rows) -> (Tensor, Tensor)",
    "alignment_fwd": "(Tensor pred, Tensor target, Tensor? token_ids, Tensor? mask, "
    "float cosine_weight, float mse_weight, float embed_scale) -> (Tensor, Tensor)",
}


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_link_fwd(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], w2.shape[0])


def _fake_link_fwd_train(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    go, dtype = rest[5], rest[10]
    tokens, out = x.shape[0], w2.shape[0]
    return (
        x.new_empty(tokens, out),
        x.new_empty(tokens, w1.shape[0], dtype=dtype),
        x.new_empty(0, dtype=dtype) if go is None else x.new_empty(tokens, out, dtype=dtype),
        x.new_empty(4, tokens, dtype=_statistics_dtype(dtype)),
    )


def _fake_link_bwd(dy: Tensor, x: Tensor, pre: Any, z: Any, stats: Any, *rest: Any) -> tuple[Tensor, ...]:
    wanted, needs = (x, *rest[:10]), rest[14]
    return tuple(
        x.new_empty(0) if tensor is None or not need else tensor.new_empty(tensor.shape)
        for tensor, need in zip(wanted, needs, strict=True)
    )


def _fake_handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    return embeds.new_empty(embeds.shape)


def _fake_handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    return None


def _fake_handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    return dy.new_empty(slot_rows.shape[0], dy.shape[1]), dy.new_empty(dy.shape)


def _fake_alignment_fwd(pred: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return pred.new_empty((), dtype=_statistics_dtype(pred.dtype)), pred.new_empty(pred.shape)


def _link_call(op: str, args: tuple[Any, ...]) -> backends.Call:
    if op == "link_bwd":
        x, w1, w2, dtype = args[1], args[5], args[7], args[18]
    else:
        x, w1, w2, dtype = args[0], args[1], args[3], args[14]
    tokens, in_features = x.shape
    return backends.Call(
        op, x.device.type, dtype, tokens, in_features, w1.shape[0], w2.shape[0], training=op != "link_fwd"
    )


def _row_call(op: str, args: tuple[Any, ...]) -> backends.Call:
    rows = args[0]
    tokens, width = rows.shape
    return backends.Call(op, rows.device.type, rows.dtype, tokens, width, 0, width, training=op.endswith("bwd"))


def _launcher(op: str) -> Callable[..., Any]:
    describe = _link_call if op.startswith("link") else _row_call

    def launch(*args: Any) -> Any:
        call = describe(op, args)
        if op.startswith("handoff"):
            backends.check_slot_rows(args[-1], args[-2].shape[0])
        run = getattr(backends.choose(op, call), op)
        if backends.autocast_enabled(call.device):
            # The dtype was settled outside; autocast would cast the float32 accumulations of the reference again.
            with torch.autocast(call.device, enabled=False):
                return run(*args)
        return run(*args)

    launch.__name__ = op
    return launch


def _recomputing(link_fwd_train: Callable[..., Any], link_bwd: Callable[..., Any]) -> Callable[..., Any]:
    """``link_bwd`` that makes what it was not given (pre, z, stats) from x, for calls that kept nothing else.

    One op and not two: torch.compile would merge a second ``link_fwd_train`` with the first, and keep its results.
    """

    def launch(dy: Tensor, x: Tensor, pre: Tensor | None, z: Tensor | None, stats: Tensor | None, *rest: Any) -> Any:
        if pre is None:
            _, pre, z, stats = link_fwd_train(x, *rest[:-1])
        return link_bwd(dy, x, pre, z, stats, *rest)

    launch.__name__ = "link_bwd"
    return launch


_FAKES: dict[str, Callable[..., Any]] = {
    "link_fwd": _fake_link_fwd,
    "link_fwd_train": _fake_link_fwd_train,
    "link_bwd": _fake_link_bwd,
    "handoff_fwd": _fake_handoff_fwd,
    "handoff_": _fake_handoff_,
    "handoff_bwd": _fake_handoff_bwd,
    "alignment_fwd": _fake_alignment_fwd,
}

_LAUNCHERS = {op: _launcher(op) for op in SCHEMAS}
_LAUNCHERS["link_bwd"] = _recomputing(_LAUNCHERS["link_fwd_train"], _LAUNCHERS["link_bwd"])

for _op, _schema in SCHEMAS.items():
    torch.library.define(f"recmas::{_op}", _schema)
    torch.library.impl(f"recmas::{_op}", "CompositeExplicitAutograd", _LAUNCHERS[_op])
    torch.library.register_fake(f"recmas::{_op}", _FAKES[_op])

link_fwd = torch.ops.recmas.link_fwd.default
link_fwd_train = torch.ops.recmas.link_fwd_train.default
link_bwd = torch.ops.recmas.link_bwd.default
handoff_fwd = torch.ops.recmas.handoff_fwd.default
handoff_ = torch.ops.recmas.handoff_.default
handoff_bwd = torch.ops.recmas.handoff_bwd.default
alignment_fwd = torch.ops.recmas.alignment_fwd.default


def caller(op: Any, direct: bool) -> Callable[..., Any]:
    """``op`` itself; or, ``direct``, what it does without its way through the dispatcher.

    Direct calls need plain tensors that nothing observes; see `observed.py`.
    """
    return _DIRECT[op] if direct else op


_DIRECT = {getattr(torch.ops.recmas, op).default: launch for op, launch in _LAUNCHERS.items()}
