"""The link's ops: row passes and products strung together, in the variant that `plan` names."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recmas_kernels.backends.triton import activation, gradients, library, matmul, plan, rows, small_hidden
from recmas_kernels.backends.triton.device import launching

_WIDEST_STRIDE = 2**24  # elements between rows of x; a kernel indexes the 128 rows of a tile in 32 bits


class _Given(NamedTuple):
    """The arguments that all three ops share; see `recmas_kernels.reference`."""

    x: Tensor  # [T, in]
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    w3: Tensor | None
    b3: Tensor | None
    gi: Tensor | None
    ci: Tensor | None
    go: Tensor | None
    co: Tensor | None
    residual: str
    gelu: str
    eps: float
    dtype: torch.dtype

    def rows(self, width: int) -> Tensor:
        """New ``[T, width]`` in the compute dtype."""
        return torch.empty(self.x.shape[0], width, dtype=self.dtype, device=self.x.device)

    def plan(self, op: str) -> plan.Link:
        """What the choice of a variant for ``op`` depends on."""
        return plan.Link(
            op,
            self.x.device,
            self.dtype,
            self.x.shape[0],
            self.x.shape[1],
            self.w1.shape[0],
            self.w2.shape[0],
            self.residual,
            self.gi is not None or self.go is not None,
        )


def _given(x: Tensor, *rest: Any) -> _Given:
    return _Given(x if x.stride(0) < _WIDEST_STRIDE else x.contiguous(), *rest)


def link_fwd(*arguments: Any) -> Tensor:
    """``y [T, out]`` in x's dtype; arguments and mathematics as `recmas_kernels.reference.link_fwd`."""
    given = _given(*arguments[:15])
    with launching("link_fwd", given.x):
        return _forward(given, keep=False)[0]


def link_fwd_train(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, pre, z, stats)``; arguments and mathematics as `recmas_kernels.reference.link_fwd_train`."""
    given = _given(*arguments)
    with launching("link_fwd_train", given.x):
        y, pre, z, stats = _forward(given, keep=True)
    assert pre is not None
    return y, pre, z, stats


def _forward(given: _Given, *, keep: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    x, go = given.x, given.go
    if x.shape[0] == 0:
        out_features = given.w2.shape[0]
        z = x.new_empty(0, dtype=given.dtype) if go is None else given.rows(out_features)
        return x.new_empty(0, out_features), given.rows(given.w1.shape[0]), z, x.new_zeros(4, 0, dtype=torch.float32)

    def attempt(variant: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        if variant == plan.SMALL:
            return _forward_small(given, keep=keep)
        return _forward_stages(given, variant, keep=keep)

    return attempt(plan.variant(given.plan("train" if keep else "infer"), attempt))


def _forward_small(given: _Given, *, keep: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    x, go = given.x, given.go
    y = torch.empty(x.shape[0], given.w2.shape[0], dtype=x.dtype, device=x.device)
    pre = given.rows(given.w1.shape[0]) if keep else None
    z = given.rows(given.w2.shape[0]) if keep and go is not None else y
    stats = torch.zeros(4, x.shape[0], dtype=torch.float32, device=x.device)
    small_hidden.forward(
        x,
        given.w1,
        given.b1,
        given.w2,
        given.b2,
        given.gi,
        given.ci,
        go,
        given.co,
        y,
        pre,
        z,
        stats,
        given.residual,
        given.gelu,
        given.eps,
        given.dtype,
    )
    return y, pre, x.new_empty(0, dtype=given.dtype) if go is None else z, stats


def _forward_stages(given: _Given, variant: str, *, keep: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    x, w1, b1, w2, b2, w3, b3, gi, ci, go, co, residual, gelu, eps, dtype = given
    hidden_features = w1.shape[0]
    stats = torch.zeros(4, x.shape[0], dtype=torch.float32, device=x.device)
    joint = library.joint(x, hidden_features, residual, dtype) if variant == plan.LIBRARY else None
    raw = joint[:, hidden_features:] if joint is not None and residual == "linear" else None
    u = x.to(dtype)
    if gi is not None:
        u = given.rows(x.shape[1])
        rows.normalise(x, gi, ci, eps, dtype, plain=raw, normed=u, stats=stats[:2])
    elif raw is not None:
        raw.copy_(x)
    addend = None
    if joint is not None:
        pre = library.up(u, w1, b1, gelu, joint[:, :hidden_features], keep=keep)
        z = library.down(joint, w2, b2, w3, b3)
        addend = x if residual == "identity" else None
    else:
        act, pre = matmul.up(u, w1, b1, gelu, keep=keep)
        z = matmul.down(act, x.to(dtype), w2, b2, w3, b3, residual)
    if go is None and addend is None:
        return z.to(x.dtype), pre, x.new_empty(0, dtype=dtype), stats
    y = torch.empty(z.shape, dtype=x.dtype, device=x.device)
    if go is None:
        rows.normalise(z, None, None, eps, dtype, addend=addend, plain=y)
        return y, pre, x.new_empty(0, dtype=dtype), stats
    kept = z if keep and addend is not None else None
    rows.normalise(z, go, co, eps, dtype, addend=addend, plain=kept, normed=y, stats=stats[2:])
    return y, pre, z, stats


def link_bwd(dy: Tensor, x: Tensor, pre: Tensor, z: Tensor, stats: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Eleven gradients; arguments and mathematics as `recmas_kernels.reference.link_bwd`."""
    given, needs = _given(x, *rest[:-1]), rest[-1]
    inputs = given[:11]
    found: tuple[Tensor | None, ...]
    if x.shape[0] == 0:
        found = tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in inputs)
    else:
        with launching("link_bwd", x):
            saved = (dy, pre, z, stats)

            def attempt(variant: str) -> tuple[Tensor | None, ...]:
                return _backward(given, saved, needs, variant)

            found = attempt(plan.variant(given.plan("backward"), attempt))
    return tuple(
        grad.to(tensor.dtype) if need and grad is not None and tensor is not None else x.new_empty(0)
        for grad, tensor, need in zip(found, inputs, needs, strict=True)
    )


def _backward(
    given: _Given, saved: tuple[Tensor, Tensor, Tensor, Tensor], needs: list[bool], variant: str
) -> tuple[Tensor | None, ...]:
    dy, pre, z, stats = saved
    x, w1, _, w2, _, w3, _, gi, ci, go, _, residual, gelu, eps, dtype = given
    need_x, need_w1, need_b1, need_w2, need_b2, need_w3, need_b3, need_gi, need_ci, need_go, need_co = needs
    need_du = need_x or need_gi or need_ci
    dgi = dci = dgo = dco = None

    # Through the output norm. dz is what reaches the sum z, and the gradients of b2 and b3 are its column sums.
    dz, dbias = dy.to(dtype), None
    if go is not None:
        dz = given.rows(w2.shape[0])
        sums = need_go or need_co or need_b2 or need_b3
        found = rows.normalise_backward(dy, z, stats[2:], go, None, dtype, sums=sums, total=True, drows=dz)
        if found is not None:
            dgo, dco, dbias = found
    elif need_b2 or need_b3:
        dbias = dy.sum(0, dtype=torch.float32)

    # Through both products and GELU; the activation comes back on the way, for the gradient of w2. Without an input
    # norm du is already the whole gradient of x.
    act = torch.empty_like(pre) if need_w2 else None
    dpre = du = db1 = None
    around = _Around(dz, w3, residual)
    if need_du or need_w1 or need_b1:
        stage = {plan.SMALL: _small_gradients, plan.LIBRARY: _library_gradients, plan.MATMUL: _matmul_gradients}
        dpre, du, db1 = stage[variant](
            given, around if gi is None else _Around(dz, None, "none"), pre, act, need_du=need_du, need_b1=need_b1
        )
    elif act is not None:
        activation.activate(pre, act, gelu)

    # Through the input norm, whose output comes back for the gradient of w1.
    u, dx = x.to(dtype), du
    if gi is not None:
        normed = given.rows(x.shape[1]) if need_w1 else None
        if du is not None:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
            found = rows.normalise_backward(
                du,
                x,
                stats[:2],
                gi,
                ci,
                dtype,
                sums=need_gi or need_ci,
                addend=around.gradient() if need_x else None,
                drows=dx,
                normed=normed,
            )
            if found is not None:
                dgi, dci = found
        elif normed is not None:
            rows.normalise(x, gi, ci, eps, dtype, normed=normed)
        u = u if normed is None else normed

    problems: list[_Problem | None] = [(dpre, u, w1) if need_w1 else None, (dz, act, w2) if need_w2 else None]
    problems.append((dz, x.to(dtype), w3) if need_w3 and w3 is not None else None)
    dw1, dw2, dw3 = _weight_gradients(variant, problems)
    return dx, dw1, db1, dw2, dbias, dw3, dbias, dgi, dci, dgo, dco


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
    given: _Given, around: _Around, pre: Tensor, act: Tensor | None, *, need_du: bool, need_b1: bool
) -> _Stage:
    dpre = torch.empty_like(pre)
    du = given.rows(given.x.shape[1]) if need_du else None
    add_dz = around.residual == "identity"
    db1 = small_hidden.backward(
        around.dz, pre, given.w1, given.w2, dpre, act, du, given.gelu, given.dtype, sums=need_b1, add_dz=add_dz
    )
    return dpre, du, db1


def _library_gradients(
    given: _Given, around: _Around, pre: Tensor, act: Tensor | None, *, need_du: bool, need_b1: bool
) -> _Stage:
    dpre = around.dz @ given.w2.to(given.dtype)
    db1 = activation.activate_backward(dpre, pre, dpre, act, given.gelu, sums=need_b1)
    if not need_du:
        return dpre, None, db1
    w1, start = given.w1.to(given.dtype), around.gradient()
    if start is None:
        return dpre, dpre @ w1, db1
    # dz is still needed; a product through w3 is a buffer of its own.
    add = Tensor.addmm if start is around.dz else Tensor.addmm_
    return dpre, add(start, dpre, w1), db1


def _matmul_gradients(
    given: _Given, around: _Around, pre: Tensor, act: Tensor | None, *, need_du: bool, need_b1: bool
) -> _Stage:
    dpre, db1 = matmul.hidden_gradient(around.dz, given.w2, pre, act, given.gelu, sums=need_b1)
    if not need_du:
        return dpre, None, db1
    more = None if around.w3 is None else (around.dz, around.w3)
    addend = around.dz if around.residual == "identity" else None
    return dpre, matmul.input_gradient(dpre, given.w1, more=more, addend=addend), db1


def _weight_gradients(variant: str, problems: list[_Problem | None]) -> list[Tensor | None]:
    """``left^T right`` in the weight's dtype for each ``(left, right, weight)``; None stays None."""
    wanted = []
    for left, right, weight in filter(None, problems):
        assert left is not None
        assert right is not None
        wanted.append((left, right, weight.dtype))
    if variant == plan.MATMUL and wanted:
        found = iter(gradients.weight_gradients(wanted))
    else:
        found = iter([library.weight_gradient(*problem) for problem in wanted])
    return [None if problem is None else next(found) for problem in problems]
