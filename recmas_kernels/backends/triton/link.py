"""The link's ops, composed of row passes and products in the variant that `plan` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recmas_kernels.backends.triton import activation, library, plan, rows, small_hidden
from recmas_kernels.backends.triton.device import launching
from recmas_kernels.reference import LinkArguments

_WIDEST_STRIDE = 2**24  # elements between rows of x; a kernel indexes the 128 rows of a tile in 32 bits


_Forward = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # y, pre if kept, z, stats if kept


def _rows(arguments: LinkArguments, width: int) -> Tensor:
    """New ``[T, width]`` in the compute dtype."""
    return torch.empty(arguments.x.shape[0], width, dtype=arguments.dtype, device=arguments.x.device)


def _variant(arguments: LinkArguments) -> str:
    """Which kernels serve the call."""
    tokens, in_features = arguments.x.shape
    sizes = (tokens, in_features, arguments.w1.shape[0], arguments.w2.shape[0])
    return plan.variant(plan.Link(arguments.x.device, arguments.dtype, *sizes, arguments.residual))


def _narrow(arguments: LinkArguments) -> LinkArguments:
    """The same call, with x copied if its rows are too far apart for the kernels' 32-bit indices."""
    x = arguments.x
    return arguments if x.stride(0) < _WIDEST_STRIDE else arguments._replace(x=x.contiguous())


def link_fwd(arguments: LinkArguments) -> Tensor:
    """``y [T, out]`` in x's dtype; weights are read as they are stored. See `recmas_kernels.reference.link_fwd`."""
    with launching("link_fwd", arguments.x):
        return _forward(_narrow(arguments), keep=False)[0]


def link_fwd_train(arguments: LinkArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, pre, z, stats)``; see `recmas_kernels.reference.link_fwd_train`."""
    with launching("link_fwd_train", arguments.x):
        y, pre, z, stats = _forward(_narrow(arguments), keep=True)
    assert pre is not None
    assert stats is not None
    return y, pre, z, stats


def _forward(arguments: LinkArguments, *, keep: bool) -> _Forward:
    x, gain_out = arguments.x, arguments.norm_out_weight
    if x.shape[0] == 0:
        out_features = arguments.w2.shape[0]
        z = x.new_empty(0, dtype=arguments.dtype) if gain_out is None else _rows(arguments, out_features)
        return (
            x.new_empty(0, out_features),
            _rows(arguments, arguments.w1.shape[0]),
            z,
            x.new_zeros(4, 0, dtype=torch.float32),
        )

    variant = _variant(arguments)
    if variant == plan.SMALL:
        return _forward_small(arguments, keep=keep)
    return _forward_stages(arguments, PRODUCTS[variant], keep=keep)


def _stats(x: Tensor, *, keep: bool) -> Tensor | None:
    """For means and deviations of both norms; zeros where there is none."""
    return torch.zeros(4, x.shape[0], dtype=torch.float32, device=x.device) if keep else None


def _forward_small(arguments: LinkArguments, *, keep: bool) -> _Forward:
    x, gain_out = arguments.x, arguments.norm_out_weight
    y = torch.empty(x.shape[0], arguments.w2.shape[0], dtype=x.dtype, device=x.device)
    pre = _rows(arguments, arguments.w1.shape[0]) if keep else None
    z = _rows(arguments, arguments.w2.shape[0]) if keep and gain_out is not None else y
    stats = _stats(x, keep=keep)
    small_hidden.forward(
        x,
        arguments.w1,
        arguments.b1,
        arguments.w2,
        arguments.b2,
        arguments.norm_in_weight,
        arguments.norm_in_bias,
        gain_out,
        arguments.norm_out_bias,
        y,
        pre,
        z,
        stats,
        arguments.residual,
        arguments.gelu,
        arguments.eps,
        arguments.dtype,
    )
    return y, pre, x.new_empty(0, dtype=arguments.dtype) if gain_out is None else z, stats


Products = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""``products(arguments, normed, keep=...)``: z, pre if it is to be kept, and what is still to be added to z.

``normed(raw)`` gives the first product's operand, and copies x in the compute dtype into ``raw`` if that is given."""


def _forward_stages(arguments: LinkArguments, products: Products, *, keep: bool) -> _Forward:
    x, gain_in, bias_in, eps, dtype = (
        arguments.x,
        arguments.norm_in_weight,
        arguments.norm_in_bias,
        arguments.eps,
        arguments.dtype,
    )
    gain_out, bias_out = arguments.norm_out_weight, arguments.norm_out_bias
    stats = _stats(x, keep=keep)

    def normed(raw: Tensor | None = None) -> Tensor:
        if gain_in is not None:
            u = _rows(arguments, x.shape[1])
            rows.normalise(x, gain_in, bias_in, eps, dtype, plain=raw, normed=u, stats=stats)
            return u
        if raw is not None:
            raw.copy_(x)
        return x.to(dtype)

    z, pre, addend = products(arguments, normed, keep=keep)
    if gain_out is None and addend is None:
        return z.to(x.dtype), pre, x.new_empty(0, dtype=dtype), stats
    y = torch.empty(z.shape, dtype=x.dtype, device=x.device)
    if gain_out is None:
        rows.normalise(z, None, None, eps, dtype, addend=addend, plain=y)
        return y, pre, x.new_empty(0, dtype=dtype), stats
    kept = z if keep and addend is not None else None
    rows.normalise(z, gain_out, bias_out, eps, dtype, addend=addend, plain=kept, normed=y, stats=stats, side=rows.OUT)
    return y, pre, z, stats


def _library_products(
    arguments: LinkArguments, normed: Callable[..., Tensor], *, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, w1, b1, w2, b2, w3, b3 = arguments[:7]
    hidden_features = w1.shape[0]
    joint = library.joint(x, hidden_features, w3, arguments.dtype)
    u = normed(joint[:, hidden_features:] if joint.shape[1] > hidden_features else None)
    pre = library.up(u, w1, b1, arguments.gelu, joint[:, :hidden_features], keep=keep)
    z = library.down(joint, x, w2, b2, w3, b3)
    return z, pre, x if arguments.residual == "identity" else None


def link_bwd(
    arguments: LinkArguments, dy: Tensor, pre: Tensor, z: Tensor, stats: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Eleven gradients; see `recmas_kernels.reference.link_bwd`."""
    arguments = _narrow(arguments)
    x, inputs = arguments.x, arguments.tensors
    found: tuple[Tensor | None, ...]
    if x.shape[0] == 0:
        found = tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in inputs)
    else:
        with launching("link_bwd", x):
            found = _backward(arguments, (dy, pre, z, stats), needs, _variant(arguments))
    return tuple(
        grad.to(tensor.dtype) if need and grad is not None and tensor is not None else x.new_empty(0)
        for grad, tensor, need in zip(found, inputs, needs, strict=True)
    )


def _backward(
    arguments: LinkArguments, saved: tuple[Tensor, Tensor, Tensor, Tensor], needs: list[bool], variant: str
) -> tuple[Tensor | None, ...]:
    dy, pre, z, stats = saved
    x, w1, _, w2, _, w3, _, gain_in, bias_in, gain_out, _, residual, gelu, eps, dtype = arguments
    (
        need_x,
        need_w1,
        need_b1,
        need_w2,
        need_b2,
        need_w3,
        need_b3,
        need_gain_in,
        need_bias_in,
        need_gain_out,
        need_bias_out,
    ) = needs
    need_du = need_x or need_gain_in or need_bias_in
    dgain_in = dbias_in = dgain_out = dbias_out = None

    # Through the output norm. dz is what reaches the sum z, and the gradients of b2 and b3 are its column sums.
    dz, dbias = dy.to(dtype), None
    if gain_out is not None:
        dz = _rows(arguments, w2.shape[0])
        sums = need_gain_out or need_bias_out or need_b2 or need_b3
        found = rows.normalise_backward(
            dy, z, stats, gain_out, None, dtype, side=rows.OUT, sums=sums, total=True, drows=dz
        )
        if found is not None:
            dgain_out, dbias_out, dbias = found
    elif need_b2 or need_b3:
        dbias = dy.sum(0, dtype=torch.float32)

    # Through both products and GELU; the activation comes back on the way, for the gradient of w2. Without an input
    # norm du is already the whole gradient of x.
    act = torch.empty_like(pre) if need_w2 else None
    dpre = du = db1 = None
    around = _Around(dz, w3, residual)
    if need_du or need_w1 or need_b1:
        dpre, du, db1 = GRADIENTS[variant](
            arguments,
            around if gain_in is None else _Around(dz, None, "none"),
            pre,
            act,
            need_du=need_du,
            need_b1=need_b1,
        )
    elif act is not None:
        activation.activate(pre, act, gelu)

    # Through the input norm, whose output comes back for the gradient of w1.
    u, dx = x.to(dtype), du
    if gain_in is not None:
        normed = _rows(arguments, x.shape[1]) if need_w1 else None
        if du is not None:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
            found = rows.normalise_backward(
                du,
                x,
                stats,
                gain_in,
                bias_in,
                dtype,
                sums=need_gain_in or need_bias_in,
                addend=around.gradient() if need_x else None,
                drows=dx,
                normed=normed,
            )
            if found is not None:
                dgain_in, dbias_in = found
        elif normed is not None:
            rows.normalise(x, gain_in, bias_in, eps, dtype, normed=normed)
        u = u if normed is None else normed

    problems: list[_Problem | None] = [(dpre, u, w1) if need_w1 else None, (dz, act, w2) if need_w2 else None]
    problems.append((dz, x.to(dtype), w3) if need_w3 and w3 is not None else None)
    dw1, dw2, dw3 = _weight_gradients(WEIGHT_GRADIENTS.get(variant, library.weight_gradients), problems)
    db3 = dbias.clone() if dbias is not None and need_b2 and need_b3 else dbias  # each gradient has its own memory
    return dx, dw1, db1, dw2, dbias, dw3, db3, dgain_in, dbias_in, dgain_out, dbias_out


_Problem = tuple[Tensor | None, Tensor | None, Tensor]  # left, right, the weight whose gradient is left^T right
_Stage = tuple[Tensor, Tensor | None, Tensor | None]  # dpre, du if wanted, db1 if wanted


class _Around(NamedTuple):
    """The way of the gradient around the hidden layer, through the residual."""

    dz: Tensor
    w3: Tensor | None
    residual: str

    def gradient(self) -> Tensor | None:
        """What reaches x this way: ``dz``, ``dz w3`` or nothing."""
        if self.w3 is not None:
            return self.dz @ self.w3.to(self.dz.dtype)
        return self.dz if self.residual == "identity" else None


def _small_gradients(
    arguments: LinkArguments, around: _Around, pre: Tensor, act: Tensor | None, *, need_du: bool, need_b1: bool
) -> _Stage:
    dpre = torch.empty_like(pre)
    du = _rows(arguments, arguments.x.shape[1]) if need_du else None
    add_dz = around.residual == "identity"
    db1 = small_hidden.backward(
        around.dz,
        pre,
        arguments.w1,
        arguments.w2,
        dpre,
        act,
        du,
        arguments.gelu,
        arguments.dtype,
        sums=need_b1,
        add_dz=add_dz,
    )
    return dpre, du, db1


def _library_gradients(
    arguments: LinkArguments, around: _Around, pre: Tensor, act: Tensor | None, *, need_du: bool, need_b1: bool
) -> _Stage:
    dpre = around.dz @ arguments.w2.to(arguments.dtype)
    db1 = activation.activate_backward(dpre, pre, dpre, act, arguments.gelu, sums=need_b1)
    if not need_du:
        return dpre, None, db1
    w1, start = arguments.w1.to(arguments.dtype), around.gradient()
    if start is None:
        return dpre, dpre @ w1, db1
    # dz is still needed; a product through w3 is a buffer of its own.
    add = Tensor.addmm if start is around.dz else Tensor.addmm_
    return dpre, add(start, dpre, w1), db1


def _weight_gradients(
    compute: Callable[[list[tuple[Tensor, Tensor, torch.dtype]]], list[Tensor]], problems: list[_Problem | None]
) -> list[Tensor | None]:
    """``left^T right`` in the weight's dtype for each ``(left, right, weight)``; None stays None."""
    wanted = []
    for left, right, weight in filter(None, problems):
        assert left is not None
        assert right is not None
        wanted.append((left, right, weight.dtype))
    found = iter(compute(wanted) if wanted else [])
    return [None if problem is None else next(found) for problem in problems]


# What a variant is made of. A candidate for another one adds itself here (benchmarks/gpu/candidates).
PRODUCTS: dict[str, Products] = {plan.LIBRARY: _library_products}
GRADIENTS: dict[str, Callable[..., _Stage]] = {plan.SMALL: _small_gradients, plan.LIBRARY: _library_gradients}
WEIGHT_GRADIENTS: dict[str, Callable[[list[tuple[Tensor, Tensor, torch.dtype]]], list[Tensor]]] = {}
