"""Every op: its schema, its fake, its registration, and the way from its call to a backend.

An op is functional, knows no autograd (``autograd.py`` holds the Functions) and does not know which kernel runs:
``choose`` decides inside the op, where tracing does not see it, so nothing here breaks a graph. Schemas are written by
hand and registered with ``define`` + ``impl``: the ``custom_op`` decorator costs about four times as much per call.

A link's ops exist in two forms. The op takes eleven tensors and four settings, as its schema says. The functions
`link_fwd`, `link_fwd_train` and `link_bwd` take `LinkArguments` and call the op; or, ``direct``, do what the op does
without the dispatcher, which takes 4 us for so many arguments. Direct calls need plain tensors, and nothing may observe
ops; see ``observed.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recmas_kernels import checks
from recmas_kernels.backends import settings
from recmas_kernels.backends.call import Call
from recmas_kernels.backends.choice import choose
from recmas_kernels.backends.tensors import is_plain_link
from recmas_kernels.devices import autocast_enabled
from recmas_kernels.reference import LinkArguments, accumulator

_PARAMETERS = (
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w3, Tensor? b3, "
    "Tensor? norm_in_weight, Tensor? norm_in_bias, Tensor? norm_out_weight, Tensor? norm_out_bias"
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
    hidden_features, out_features = arguments.w1.shape[0], arguments.w2.shape[0]
    return Call(op, x.device.type, arguments.dtype, tokens, in_features, hidden_features, out_features, training)


def _row_call(op: str, rows: Tensor, training: bool = False) -> Call:
    tokens, width = rows.shape
    return Call(op, rows.device.type, rows.dtype, tokens, width, 0, width, training)


def serve_link_fwd(arguments: LinkArguments, may_pack: bool) -> Tensor:
    """What `link_fwd` does, without the dispatcher."""
    return _serve(_link_call("link_fwd", arguments, False), arguments, may_pack)


def serve_link_fwd_train(arguments: LinkArguments) -> tuple[Tensor, ...]:
    """What `link_fwd_train` does, without the dispatcher."""
    return _serve(_link_call("link_fwd_train", arguments, True), arguments)


def serve_link_bwd(
    arguments: LinkArguments,
    dy: Tensor,
    pre: Tensor | None,
    z: Tensor | None,
    stats: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """What `link_bwd` does, without the dispatcher."""
    if pre is None:
        _, pre, z, stats = serve_link_fwd_train(arguments)
    return _serve(_link_call("link_bwd", arguments, True), arguments, dy, pre, z, stats, needs)


def _link_arguments(*values: Any) -> LinkArguments:
    """The arguments of a link's op, checked, with rows and parameters as every backend reads them."""
    arguments = LinkArguments._make(values)
    checks.check_link_settings(arguments.gelu, arguments.eps, arguments.dtype)
    if is_plain_link(arguments, True):
        return arguments
    checks.expect_matrix("x", arguments.x)
    arguments = checks.checked_link(arguments, arguments.x.shape, mixed=True)
    return arguments._replace(x=_dense(arguments.x))


def _dense(rows: Tensor) -> Tensor:
    """``rows [T, n]`` with a contiguous last dimension."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _op_link_fwd(*values: Any) -> Tensor:
    return serve_link_fwd(_link_arguments(*values[:-1]), values[-1])


def _op_link_fwd_train(*values: Any) -> tuple[Tensor, ...]:
    return serve_link_fwd_train(_link_arguments(*values))


def _op_link_bwd(dy: Tensor, x: Tensor, pre: Any, z: Any, stats: Any, *rest: Any) -> tuple[Tensor, ...]:
    arguments = _link_arguments(x, *rest[:-1])
    checks.check_saved(arguments, dy, pre, z, stats)
    return serve_link_bwd(arguments, dy, pre, z, stats, rest[-1])


def _op_handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    return _serve_handoff("handoff_fwd", rows, embeds, slot_rows)


def _op_handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    _serve_handoff("handoff_", rows, embeds, slot_rows)


def _serve_handoff(op: str, rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Any:
    checks.check_handoff(rows, embeds, slot_rows)
    _check_slot_rows(slot_rows, embeds.shape[0])
    rows = _dense(rows.to(embeds.dtype))  # a handoff copies bytes
    try:
        return _serve(_row_call(op, rows), rows, embeds, slot_rows)
    except IndexError:
        raise checks.outside("slot_rows", slot_rows, embeds.shape[0]) from None


def _op_handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    checks.check_handoff_gradient(dy, slot_rows)
    _check_slot_rows(slot_rows, dy.shape[0])
    try:
        return _serve(_row_call("handoff_bwd", dy, training=True), dy, slot_rows)
    except IndexError:
        raise checks.outside("slot_rows", slot_rows, dy.shape[0]) from None


def _op_alignment_fwd(
    pred: Tensor, target: Tensor, token_ids: Tensor | None, mask: Tensor | None, *weights: float
) -> tuple[Tensor, Tensor]:
    checks.expect_matrix("pred", pred)
    checks.check_alignment(pred, target, token_ids, mask)
    pred, target = _dense(pred), _dense(target)
    ids, mask = None if token_ids is None else token_ids.contiguous(), None if mask is None else mask.contiguous()
    try:
        return _serve(_row_call("alignment_fwd", pred), pred, target, ids, mask, *weights)
    except IndexError:
        if ids is None:
            raise
        raise checks.outside("token_ids", ids, target.shape[0], mask) from None


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


def _expect_one_device(**tensors: Tensor | None) -> None:
    """In a fake: real tensors come here, too, if one of them is on the meta device."""
    owner, first = next(iter(tensors.items()))
    assert first is not None
    for name, tensor in tensors.items():
        checks.expect_device(name, tensor, owner, first.device)


def _fake_link_fwd(*values: Any) -> Tensor:
    arguments = LinkArguments._make(values[:-1])
    _expect_one_device(**arguments.named_tensors)
    return arguments.x.new_empty(arguments.x.shape[0], arguments.w2.shape[0])


def _fake_link_fwd_train(*values: Any) -> tuple[Tensor, ...]:
    arguments = LinkArguments._make(values)
    _expect_one_device(**arguments.named_tensors)
    x, dtype = arguments.x, arguments.dtype
    tokens, out_features = x.shape[0], arguments.w2.shape[0]
    return (
        x.new_empty(tokens, out_features),
        x.new_empty(tokens, arguments.w1.shape[0], dtype=dtype),
        x.new_empty((0,) if arguments.norm_out_weight is None else (tokens, out_features), dtype=dtype),
        x.new_empty(4, tokens, dtype=accumulator(dtype)),
    )


def _fake_link_bwd(dy: Tensor, x: Tensor, pre: Any, z: Any, stats: Any, *rest: Any) -> tuple[Tensor, ...]:
    arguments, needs = LinkArguments(x, *rest[:-1]), rest[-1]
    _expect_one_device(**arguments.named_tensors, dy=dy, pre=pre, z=z, stats=stats)
    return tuple(
        x.new_empty(0) if tensor is None or not need else tensor.new_empty(tensor.shape)
        for tensor, need in zip(arguments.tensors, needs, strict=True)
    )


def _fake_handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    _expect_one_device(embeds=embeds, rows=rows, slot_rows=slot_rows)
    return embeds.new_empty(embeds.shape)


def _fake_handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    _expect_one_device(embeds=embeds, rows=rows, slot_rows=slot_rows)


def _fake_handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    _expect_one_device(dy=dy, slot_rows=slot_rows)
    return dy.new_empty(slot_rows.shape[0], dy.shape[1]), dy.new_empty(dy.shape)


def _fake_alignment_fwd(
    pred: Tensor, target: Tensor, token_ids: Tensor | None, mask: Tensor | None, *weights: float
) -> tuple[Tensor, Tensor]:
    _expect_one_device(pred=pred, target=target, token_ids=token_ids, mask=mask)
    return pred.new_empty((), dtype=accumulator(pred.dtype)), pred.new_empty(pred.shape)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # op: (what it does, its fake)
    "link_fwd": (_op_link_fwd, _fake_link_fwd),
    "link_fwd_train": (_op_link_fwd_train, _fake_link_fwd_train),
    "link_bwd": (_op_link_bwd, _fake_link_bwd),
    "handoff_fwd": (_op_handoff_fwd, _fake_handoff_fwd),
    "handoff_": (_op_handoff_, _fake_handoff_),
    "handoff_bwd": (_op_handoff_bwd, _fake_handoff_bwd),
    "alignment_fwd": (_op_alignment_fwd, _fake_alignment_fwd),
}

for _op, _schema in SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_op]
    torch.library.define(f"recmas::{_op}", _schema)
    torch.library.impl(f"recmas::{_op}", "CompositeExplicitAutograd", _run)
    torch.library.register_fake(f"recmas::{_op}", _fake)

_link_fwd = torch.ops.recmas.link_fwd.default
_link_fwd_train = torch.ops.recmas.link_fwd_train.default
_link_bwd = torch.ops.recmas.link_bwd.default
handoff_fwd = torch.ops.recmas.handoff_fwd.default
handoff_ = torch.ops.recmas.handoff_.default
handoff_bwd = torch.ops.recmas.handoff_bwd.default
alignment_fwd = torch.ops.recmas.alignment_fwd.default


def link_fwd(arguments: LinkArguments, may_pack: bool, direct: bool) -> Tensor:
    """y ``[T, out]`` in x's dtype. ``may_pack`` permits a backend to keep packed copies of the weights."""
    return serve_link_fwd(arguments, may_pack) if direct else _link_fwd(*arguments, may_pack)


def link_fwd_train(arguments: LinkArguments, direct: bool) -> tuple[Tensor, ...]:
    """``(y, pre, z, stats)``, see `reference.link_fwd_train`."""
    return serve_link_fwd_train(arguments) if direct else _link_fwd_train(*arguments)


def link_bwd(
    arguments: LinkArguments,
    dy: Tensor,
    pre: Tensor | None,
    z: Tensor | None,
    stats: Tensor | None,
    needs: list[bool],
    direct: bool,
) -> tuple[Tensor, ...]:
    """Eleven gradients, see `reference.link_bwd`. Without ``pre``, ``z`` and ``stats`` they are made again from x.

    One op and not two: torch.compile would merge a second ``link_fwd_train`` with the first, and keep its results.
    """
    if direct:
        return serve_link_bwd(arguments, dy, pre, z, stats, needs)
    x, *rest = arguments
    return _link_bwd(dy, x, pre, z, stats, *rest, needs)
