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

from recmas_kernels import derivatives, flops, serve
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
    "handoff_fwd": "(Tensor rows, Tensor embeds, Tensor slot_rows) -> Tensor",
    "handoff_": "(Tensor rows, Tensor(a!) embeds, Tensor slot_rows) -> ()",
    "handoff_bwd": "(Tensor dy, Tensor slot_rows) -> (Tensor, Tensor)",
    "alignment_fwd": "(Tensor pred, Tensor target, Tensor? token_ids, Tensor? mask, "
    "float cosine_weight, float mse_weight, float embed_scale) -> (Tensor, Tensor)",
}


def _op_link_fwd(*values: Any) -> Tensor:
    arguments, training = LinkArguments._make(values[:-1]), values[-1]
    return serve.link_fwd_train(arguments)[0] if training else serve.link_fwd(arguments)


def _op_link_fwd_train(*values: Any) -> tuple[Tensor, ...]:
    return serve.link_fwd_train(LinkArguments._make(values))


def _op_link_bwd(dy: Tensor, x: Tensor, pre: Any, z: Any, stats: Any, *rest: Any) -> tuple[Tensor, ...]:
    return serve.link_bwd(LinkArguments(x, *rest[:-1]), dy, pre, z, stats, rest[-1])


def _fake_link_fwd(*values: Any) -> Tensor:
    arguments = LinkArguments._make(values[:-1])
    return arguments.x.new_empty(arguments.x.shape[0], arguments.w2.shape[0])


def _fake_link_fwd_train(*values: Any) -> tuple[Tensor, ...]:
    arguments = LinkArguments._make(values)
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
    return tuple(
        x.new_empty(0) if tensor is None or not need else tensor.new_empty(tensor.shape)
        for tensor, need in zip(arguments.tensors, needs, strict=True)
    )


def _fake_handoff_fwd(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> Tensor:
    return embeds.new_empty(embeds.shape)


def _fake_handoff_(rows: Tensor, embeds: Tensor, slot_rows: Tensor) -> None:
    return None


def _fake_handoff_bwd(dy: Tensor, slot_rows: Tensor) -> tuple[Tensor, Tensor]:
    return dy.new_empty(slot_rows.shape[0], dy.shape[1]), dy.new_empty(dy.shape)


def _fake_alignment_fwd(pred: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return pred.new_empty((), dtype=accumulator(pred.dtype)), pred.new_empty(pred.shape)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # op: (what it does, its fake)
    "link_fwd": (_op_link_fwd, _fake_link_fwd),
    "link_fwd_train": (_op_link_fwd_train, _fake_link_fwd_train),
    "link_bwd": (_op_link_bwd, _fake_link_bwd),
    "handoff_fwd": (serve.handoff_fwd, _fake_handoff_fwd),
    "handoff_": (serve.handoff_, _fake_handoff_),
    "handoff_bwd": (serve.handoff_bwd, _fake_handoff_bwd),
    "alignment_fwd": (serve.alignment_fwd, _fake_alignment_fwd),
}
_WRITES = {"handoff_": 1}  # op: the argument that it writes into

_library = torch.library.Library("recmas", "FRAGMENT")  # a reload of this module drops the old one with its ops
for _op, _schema in SCHEMAS.items():
    _run, _fake = _IMPLEMENTATIONS[_op]
    _library.define(f"{_op}{_schema}")
    _library.impl(_op, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"recmas::{_op}", _fake, lib=_library)
    if _op in _WRITES:
        _library.impl(_op, derivatives.refuse_autograd(_op), "Autograd", with_keyset=True)
        _library.impl(_op, derivatives.bump_version(_op, _WRITES[_op]), "ADInplaceOrView", with_keyset=True)
    else:
        _setup, _backward = (getattr(derivatives, f"{_op}_{part}") for part in ("setup", "backward"))
        torch.library.register_autograd(f"recmas::{_op}", _backward, setup_context=_setup, lib=_library)
flops.register()

link_fwd = torch.ops.recmas.link_fwd.default
link_fwd_train = torch.ops.recmas.link_fwd_train.default
link_bwd = torch.ops.recmas.link_bwd.default
handoff_fwd = torch.ops.recmas.handoff_fwd.default
handoff_ = torch.ops.recmas.handoff_.default
handoff_bwd = torch.ops.recmas.handoff_bwd.default
alignment_fwd = torch.ops.recmas.alignment_fwd.default
