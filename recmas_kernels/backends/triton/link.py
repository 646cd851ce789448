"""The link's ops: row passes and products strung together, in the variant that `plan` names."""

from __future__ import annotations

import torch
from torch import Tensor

from recmas_kernels.backends.triton import activation, library, matmul, plan, rows, small_hidden
from recmas_kernels.backends.triton.device import guard
from recmas_kernels.backends.triton.library import cast

Maybe = Tensor | None


def link_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Maybe,
    w2: Tensor,
    b2: Maybe,
    w3: Maybe,
    b3: Maybe,
    gi: Maybe,
    ci: Maybe,
    go: Maybe,
    co: Maybe,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
    may_pack: bool,
) -> Tensor:
    """``y [T, out]`` in x's dtype; see `recmas_kernels.reference.link_fwd`."""
    with guard(x):
        return _forward(x, w1, b1, w2, b2, w3, b3, gi, ci, go, co, residual, gelu, eps, dtype, keep=False)[0]


def link_fwd_train(
    x: Tensor,
    w1: Tensor,
    b1: Maybe,
    w2: Tensor,
    b2: Maybe,
    w3: Maybe,
    b3: Maybe,
    gi: Maybe,
    ci: Maybe,
    go: Maybe,
    co: Maybe,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, pre, z, stats)``; see `recmas_kernels.reference.link_fwd_train`."""
    with guard(x):
        y, pre, z, stats = _forward(
            x, w1, b1, w2, b2, w3, b3, gi, ci, go, co, residual, gelu, eps, dtype, keep=True
        )
    assert pre is not None
    return y, pre, z, stats


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Maybe,
    w2: Tensor,
    b2: Maybe,
    w3: Maybe,
    b3: Maybe,
    gi: Maybe,
    ci: Maybe,
    go: Maybe,
    co: Maybe,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    tokens, in_features = x.shape
    hidden_features, out_features = w1.shape[0], w2.shape[0]
    stats = torch.zeros(4, tokens, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    no_z = torch.empty(0, dtype=dtype, device=x.device)
    if tokens == 0:
        pre = torch.empty(0, hidden_features, dtype=dtype, device=x.device)
        return y, pre, no_z if go is None else y.to(dtype), stats
    link = plan.Link(
        "forward",
        x.device,
        dtype,
        tokens,
        in_features,
        hidden_features,
        out_features,
        residual,
        gi is not None or go is not None,
    )
    variant = plan.variant(link)

    if variant == plan.SMALL:
        pre = torch.empty(tokens, hidden_features, dtype=dtype, device=x.device) if keep else None
        z = torch.empty(tokens, out_features, dtype=dtype, device=x.device) if keep and go is not None else y
        config = plan.small_config(small_hidden.block_hidden(hidden_features), dtype, x.device)
        small_hidden.forward(
            x, w1, b1, w2, b2, gi, ci, go, co, y, pre, z, stats, residual, gelu, eps, dtype, config
        )
        return y, pre, no_z if go is None else z, stats

    linear, by_library = residual == "linear", variant == plan.LIBRARY
    joint = library.joint(x, hidden_features, residual, dtype) if by_library else None
    raw = joint[:, hidden_features:] if joint is not None and linear else None
    u = x.to(dtype)
    if gi is not None:
        u = torch.empty(tokens, in_features, dtype=dtype, device=x.device)
        rows.normalise(x, gi, ci, eps, dtype, plain=raw, normed=u, stats=stats[:2])
    elif raw is not None:
        raw.copy_(x)
    if joint is not None:
        pre = library.up(u, w1, b1, gelu, joint[:, :hidden_features], keep=keep)
        z = library.down(joint, w2, b2, w3, b3)
        addend = x if residual == "identity" else None
    else:
        act, pre = matmul.up(u, w1, b1, gelu, keep=keep)
        z = matmul.down(act, x.to(dtype), w2, b2, w3, b3, residual)
        addend = None
    if go is not None:
        kept = z if keep and addend is not None else None
        rows.normalise(z, go, co, eps, dtype, addend=addend, plain=kept, normed=y, stats=stats[2:])
    elif addend is not None:
        rows.normalise(z, None, None, eps, dtype, addend=addend, plain=y)
    else:
        y = z.to(x.dtype)
    return y, pre, no_z if go is None else z, stats


def link_bwd(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    z: Tensor,
    stats: Tensor,
    w1: Tensor,
    b1: Maybe,
    w2: Tensor,
    b2: Maybe,
    w3: Maybe,
    b3: Maybe,
    gi: Maybe,
    ci: Maybe,
    go: Maybe,
    co: Maybe,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of ``(x, w1, b1, w2, b2, w3, b3, gi, ci, go, co)``; see `recmas_kernels.reference.link_bwd`."""
    inputs = (x, w1, b1, w2, b2, w3, b3, gi, ci, go, co)
    if x.shape[0] == 0:
        found: tuple[Tensor | None, ...] = tuple(None if t is None else torch.zeros_like(t) for t in inputs)
    else:
        with guard(x):
            found = _backward(
                dy, x, pre, z, stats, w1, b1, w2, w3, gi, ci, go, residual, gelu, eps, dtype, needs
            )  # fmt: skip
    return tuple(
        grad.to(tensor.dtype) if need and grad is not None and tensor is not None else x.new_empty(0)
        for grad, tensor, need in zip(found, inputs, needs, strict=True)
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    z: Tensor,
    stats: Tensor,
    w1: Tensor,
    b1: Maybe,
    w2: Tensor,
    w3: Maybe,
    gi: Maybe,
    ci: Maybe,
    go: Maybe,
    residual: str,
    gelu: str,
    eps: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_w1, need_b1, need_w2, need_b2, need_w3, need_b3, need_gi, need_ci, need_go, need_co = needs
    tokens, in_features = x.shape
    hidden_features, out_features = w1.shape[0], w2.shape[0]
    need_du = need_x or need_gi or need_ci
    dgi = dci = dgo = dco = dx = db1 = None

    # Through the output norm. dz is what reaches the sum z, and the bias gradients b2 and b3 are its column sums.
    dz, dbias = dy.to(dtype), None
    if go is not None:
        dz = torch.empty(tokens, out_features, dtype=dtype, device=x.device)
        sums = need_go or need_co or need_b2 or need_b3
        found = rows.normalise_backward(dy, z, stats[2:], go, None, dtype, sums=sums, drows=dz)
        if found is not None:
            dgo, dco, dbias = found
    elif need_b2 or need_b3:
        dbias = dy.sum(0, dtype=torch.float32)

    # Through the second product and GELU; the activation comes back on the way for the gradient of w2.
    variant = plan.variant(
        plan.Link(
            "backward",
            x.device,
            dtype,
            tokens,
            in_features,
            hidden_features,
            out_features,
            residual,
            gi is not None or go is not None,
        )
    )
    act = torch.empty_like(pre) if need_w2 else None
    du = dpre = None
    adds_dz = residual == "identity" and gi is None
    if need_du or need_w1 or need_b1:
        if variant == plan.SMALL:
            dpre = torch.empty_like(pre)
            du = torch.empty(tokens, in_features, dtype=dtype, device=x.device) if need_du else None
            config = plan.small_config(small_hidden.block_hidden(hidden_features), dtype, x.device)
            db1 = small_hidden.backward(
                dz, pre, w1, w2, dpre, act, du, gelu, dtype, config, sums=need_b1, add_dz=adds_dz
            )
        elif variant == plan.LIBRARY:
            dpre = dz @ w2.to(dtype)
            db1 = activation.activate_backward(dpre, pre, dpre, act, gelu, sums=need_b1)
        else:
            dpre, db1 = matmul.hidden_gradient(dz, w2, pre, act, gelu, sums=need_b1)
    elif act is not None:
        activation.activate(pre, act, gelu)

    # Through the first product, the input norm and the residual.
    if need_du and du is None:
        assert dpre is not None
        if variant == plan.LIBRARY:
            du = _library_input_gradient(dpre, dz, w1, w3 if gi is None else None, adds_dz)
        else:
            more = (dz, w3) if w3 is not None and gi is None else None
            du = matmul.input_gradient(dpre, w1, more=more, addend=dz if adds_dz else None)
    u = x.to(dtype)
    if gi is not None:
        u = torch.empty(tokens, in_features, dtype=dtype, device=x.device) if need_w1 else None
        if du is not None:
            around = dz if residual == "identity" else None
            if w3 is not None and need_x:
                around = dz @ w3.to(dtype)
            dx = torch.empty(tokens, in_features, dtype=x.dtype, device=x.device) if need_x else None
            found = rows.normalise_backward(
                du,
                x,
                stats[:2],
                gi,
                ci,
                dtype,
                sums=need_gi or need_ci,
                addend=around,
                drows=dx,
                normed=u,
            )
            if found is not None:
                dgi, dci, _ = found
        elif u is not None:
            rows.normalise(x, gi, ci, eps, dtype, normed=u)
    else:
        dx = du

    dw1, dw2, dw3 = _weight_gradients(
        variant,
        [
            (dpre, u, w1) if need_w1 else None,
            (dz, act, w2) if need_w2 else None,
            (dz, x.to(dtype), w3) if need_w3 and w3 is not None else None,
        ],
    )
    return dx, dw1, db1, dw2, dbias, dw3, dbias, dgi, dci, dgo, dco


def _library_input_gradient(dpre: Tensor, dz: Tensor, w1: Tensor, w3: Maybe, adds_dz: bool) -> Tensor:
    """``dpre w1``, plus ``dz w3`` if w3 is given, or plus ``dz``."""
    dtype = dpre.dtype
    if w3 is not None:
        return (dz @ w3.to(dtype)).addmm_(dpre, w1.to(dtype))
    if adds_dz:
        return torch.addmm(dz, dpre, w1.to(dtype))
    return dpre @ w1.to(dtype)


def _weight_gradients(
    variant: str, problems: list[tuple[Maybe, Maybe, Maybe] | None]
) -> list[Tensor | None]:
    """``left^T right`` in the weight's dtype for each ``(left, right, weight)``; None stays None."""
    wanted = [
        (left, right, weight.dtype)
        for left, right, weight in filter(None, problems)
        if left is not None and right is not None and weight is not None
    ]
    if variant == plan.MATMUL and wanted:
        found = iter(matmul.weight_gradients(wanted))
    else:
        found = iter([library.weight_gradient(*problem) for problem in wanted])
    return [None if problem is None else next(found) for problem in problems]
