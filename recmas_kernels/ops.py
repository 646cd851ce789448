"""Every op: its schema, its fake, its derivative and its registration.

An op is functional (but ``handoff_``) and does not know which kernel runs. Schemas are written by hand and registered
with ``define`` + ``impl``: the ``custom_op`` decorator costs about four times as much per call.

A link's ops take eleven tensors and four settings. Through the dispatcher that costs 4 us, so calls of plain tensors
that nothing observes go to ``serve.py`` directly; see ``observed.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recmas_kernels import autograd_keys, checks, derivatives, flops, serve
from recmas_kernels.backends.tensors import is_plain_link
from recmas_kernels.reference import LinkArguments, accumulator

_PARAMETERS = (
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w3, Tensor? b3, "
    "Tensor? norm_in_weight, Tensor? norm_in_bias, Tensor? norm_out_weight, Tensor? norm_out_bias"
)
_SETTINGS = "str residual, str gelu, float eps, ScalarType dtype"
_ELEVEN = ", ".join(["Tensor"] * 11)

SCHEMAS = {
    "link_fwd": f"(Tensor x, {_PARAMETERS}, {_SETTINGS}, bool training) -> Tensor",
    "link_fwd_train": f"(Tensor x, {_PARAMETERS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "link_bwd": "(Tensor dy, Tensor x, Tensor? pre, Tensor? z, Tensor? stats, "
    f"{_PARAMETERS}, {_SETTINGS}, bool[11] needs) -> ({_ELEVEN})",
    "frozen_linear": "(Tensor x, Tensor panels, Tensor? bias, SymInt out_features, ScalarType stored) -> Tensor",
    "frozen_linear_bwd": "(Tensor dy, Tensor panels, SymInt in_features, ScalarType stored) -> Tensor",
    "frozen_weight": "(Tensor panels, SymInt out_features, SymInt in_features, ScalarType stored) -> Tensor",
    "handoff_fwd": "(Tensor rows, Tensor embeds, Tensor slot_rows) -> Tensor",
    "handoff_": "(Tensor rows, Tensor(a!) embeds, Tensor slot_rows) -> ()",
    "handoff_bwd": "(Tensor dy, Tensor slot_rows) -> (Tensor, Tensor)",
    "alignment_fwd": "(Tensor pred, Tensor target, Tensor? token_ids, Tensor? mask, "
    "float cosine_weight, float mse_weight, float embed_scale) -> (Tensor, Tensor)",
}


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
    arguments, training = _link_arguments(*values[:-1]), values[-1]
    return serve.link_fwd_train(arguments)[0] if training else serve.link_fwd(arguments)


def _op_link_fwd_train(*values: Any) -> tuple[Tensor, ...]:
    return serve.link_fwd_train(_link_arguments(*values))


def _op_link_bwd(dy: Tensor, x: Tensor, pre: Any, z: Any, stats: Any, *rest: Any) -> tuple[Tensor, ...]:
    arguments = _link_arguments(x, *rest[:-1])
    checks.check_saved(arguments, dy, pre, z, stats)
    return serve.link_bwd(arguments, dy, pre, z, stats, rest[-1])


def _op_frozen_linear(x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, stored: torch.dtype) -> Tensor:
    checks.check_panels(x, panels, stored)
    if bias is not None:
        checks.expect_shape("bias", bias, out_features)
        checks.expect_device("bias", bias, "x", x.device)
    return serve.frozen_linear(x, panels, bias, out_features, stored)


def _op_frozen_linear_bwd(dy: Tensor, panels: Tensor, in_features: int, stored: torch.dtype) -> Tensor:
    checks.check_panels(dy, panels, stored)
    return serve.frozen_linear_bwd(dy, panels, in_features, stored)


def _op_frozen_weight(panels: Tensor, out_features: int, in_features: int, stored: torch.dtype) -> Tensor:
    checks.expect_tensor("panels", panels)
    return serve.frozen_weight(panels, out_features, in_features, stored)


def _op_handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    return _handoff(serve.handoff_fwd, rows, embeds, slot_rows)


def _op_handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    _handoff(serve.handoff_, rows, embeds, slot_rows)


def _handoff(run: Callable[..., Any], rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Any:
    checks.check_handoff(rows, embeds, slot_rows)
    try:
        return run(_dense(rows.to(embeds.dtype)), embeds, slot_rows)  # a handoff copies bytes
    except IndexError:
        raise checks.outside("slot_rows", slot_rows, embeds.shape[0]) from None


def _op_handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    checks.check_handoff_gradient(dy, slot_rows)
    try:
        return serve.handoff_bwd(dy, slot_rows)
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
        return serve.alignment_fwd(pred, target, ids, mask, *weights)
    except IndexError:
        if ids is None:
            raise
        raise checks.outside("token_ids", ids, target.shape[0], mask) from None


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


def _fake_frozen_linear(x: Tensor, panels: Tensor, bias: Any, out_features: int, stored: torch.dtype) -> Tensor:
    _expect_one_device(x=x, panels=panels, bias=bias)
    return x.new_empty(*x.shape[:-1], out_features)


def _fake_frozen_linear_bwd(dy: Tensor, panels: Tensor, in_features: int, stored: torch.dtype) -> Tensor:
    _expect_one_device(dy=dy, panels=panels)
    return dy.new_empty(*dy.shape[:-1], in_features)


def _fake_frozen_weight(panels: Tensor, out_features: int, in_features: int, stored: torch.dtype) -> Tensor:
    return panels.new_empty(out_features, in_features, dtype=stored)


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
    "frozen_linear": (_op_frozen_linear, _fake_frozen_linear),
    "frozen_linear_bwd": (_op_frozen_linear_bwd, _fake_frozen_linear_bwd),
    "frozen_weight": (_op_frozen_weight, _fake_frozen_weight),
    "handoff_fwd": (_op_handoff_fwd, _fake_handoff_fwd),
    "handoff_": (_op_handoff_, _fake_handoff_),
    "handoff_bwd": (_op_handoff_bwd, _fake_handoff_bwd),
    "alignment_fwd": (_op_alignment_fwd, _fake_alignment_fwd),
}
_CONSTANT = {"frozen_weight"}  # ops of no floating-point input: nothing to differentiate
_WRITES = {"handoff_": 1}  # op: the argument that it writes into

_library = torch.library.Library("recmas", "FRAGMENT")  # a reload of this module drops the old one with its ops
for _op, _schema in SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_op]
    _library.define(f"{_op}{_schema}")
    _library.impl(_op, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"recmas::{_op}", _fake, lib=_library)
    if _op in _WRITES:
        _library.impl(_op, autograd_keys.refuses(_op), "Autograd", with_keyset=True)
        _library.impl(_op, autograd_keys.bumps_version(_op, _WRITES[_op]), "ADInplaceOrView", with_keyset=True)
    elif _op not in _CONSTANT:
        _setup, _backward = (getattr(derivatives, f"{_op}_{part}") for part in ("setup", "backward"))
        _library.impl(_op, autograd_keys.records(_op, _run, _setup, _backward), "Autograd", with_keyset=True)
flops.register()

link_fwd = torch.ops.recmas.link_fwd.default
link_fwd_train = torch.ops.recmas.link_fwd_train.default
link_bwd = torch.ops.recmas.link_bwd.default
frozen_linear = torch.ops.recmas.frozen_linear.default
frozen_linear_bwd = torch.ops.recmas.frozen_linear_bwd.default
frozen_weight = torch.ops.recmas.frozen_weight.default
handoff_fwd = torch.ops.recmas.handoff_fwd.default
handoff_ = torch.ops.recmas.handoff_.default
handoff_bwd = torch.ops.recmas.handoff_bwd.default
alignment_fwd = torch.ops.recmas.alignment_fwd.default
