"""Derivatives of the ops, as `autograd_keys.records` takes them: ``setup(ctx, inputs, output)`` and backward.

They belong to the ops themselves, so that traced, exported and compiled modules have them. A first derivative runs the
backward op. Where a graph of it is asked for (``create_graph``), it is plain torch over the saved inputs, which torch
can differentiate as often as it likes. Incoming gradients that are undefined stay undefined, and are made contiguous
otherwise; nothing that was given or saved is ever written to or handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recmas_kernels import reference, serve
from recmas_kernels.observed import is_ordinary, observed
from recmas_kernels.reference import LinkArguments

Gradients = tuple[Tensor | None, ...]
_TENSORS, _SETTINGS = 11, 4  # of a link's arguments


def composed(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> Gradients:
    """Gradients of ``function(*inputs)`` for those that need them, by plain torch, with a graph of their own."""
    with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
        # Views of their own: one tensor may be several inputs, whose gradients are not the same.
        views = [t.view_as(t) if need and t is not None else t for t, need in zip(inputs, needs, strict=True)]
        wanted = [view for view, need in zip(views, needs, strict=True) if need and view is not None]
        found = iter(torch.autograd.grad(function(*views), wanted, dy, create_graph=True, allow_unused=True))
    return tuple(next(found) if need and t is not None else None for t, need in zip(inputs, needs, strict=True))


def _composition(settings: tuple[Any, ...]) -> Callable[..., Tensor]:
    return lambda *tensors: reference.link_fwd(LinkArguments._make((*tensors, *settings)))


def keep_link(ctx: Any, arguments: Sequence[Any], intermediates: Sequence[Tensor]) -> None:
    """Save what `link_gradients` reads; ``intermediates`` are pre, z and stats, or none of them."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*arguments[:_TENSORS], *intermediates)
    ctx.settings = tuple(arguments[_TENSORS:])


def link_gradients(ctx: Any, needs: Sequence[bool], dy: Tensor | None, direct: bool) -> Gradients:
    """Gradients of x and the ten parameters."""
    if dy is None:
        return (None,) * _TENSORS
    saved, settings = ctx.saved_tensors, ctx.settings
    tensors, intermediates = saved[:_TENSORS], saved[_TENSORS:] or (None, None, None)
    if torch.is_grad_enabled():
        return composed(_composition(settings), tensors, needs, dy)
    if direct and not observed() and is_ordinary(dy):
        arguments = LinkArguments._make((*tensors, *settings))
        pre, z, stats = intermediates
        grads = serve.link_bwd(arguments, dy.contiguous(), pre, z, stats, list(needs))
    else:
        x, *parameters = tensors
        op = torch.ops.recmas.link_bwd.default
        grads = op(dy.contiguous(), x, *intermediates, *parameters, *settings, list(needs))
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def link_fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    keep_link(ctx, inputs[:-1], ())


def link_fwd_backward(ctx: Any, dy: Tensor | None) -> Gradients:
    """Keeps nothing but the inputs: the backward op runs the forward kernel once more."""
    grads = link_gradients(ctx, ctx.needs_input_grad[:_TENSORS], dy, direct=False)
    return (*grads, *(None,) * (_SETTINGS + 1))


def link_fwd_train_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *intermediates = output
    ctx.mark_non_differentiable(*intermediates)
    keep_link(ctx, inputs, intermediates)


def link_fwd_train_backward(ctx: Any, dy: Tensor | None, *_: None) -> Gradients:
    return (*link_gradients(ctx, ctx.needs_input_grad[:_TENSORS], dy, direct=False), *(None,) * _SETTINGS)


def link_bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, _, _, _, *parameters = inputs[:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(grad for grad, need in zip(output, inputs[-1], strict=True) if not need))
    ctx.save_for_backward(dy, x, *parameters[: _TENSORS - 1])
    ctx.settings, ctx.needs = tuple(parameters[_TENSORS - 1 :]), list(inputs[-1])


def link_bwd_backward(ctx: Any, *incoming: Tensor | None) -> Gradients:
    """Derivatives of a link's gradients, of dy, x and the parameters: the gradients are made again in plain torch."""
    given, again = ctx.needs_input_grad, torch.is_grad_enabled()
    needs = (*given[:2], *given[5 : 5 + _TENSORS - 1])
    with torch.enable_grad():
        inputs = [t.view_as(t) if need else t for t, need in zip(ctx.saved_tensors, needs, strict=True)]
        dy, *tensors = inputs
        first = composed(_composition(ctx.settings), _requiring_grad(tensors, ctx.needs), ctx.needs, dy)
    pairs = [(g, d) for g, d in zip(first, incoming, strict=True) if g is not None and d is not None]
    grads, dgrads = zip(*pairs, strict=True) if pairs else ((), ())
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(grads, wanted, dgrads, create_graph=again, allow_unused=True))
    d_dy, dx, *rest = (next(found) if need else None for need in needs)
    return (d_dy, dx, None, None, None, *rest, *(None,) * (_SETTINGS + 1))


def _requiring_grad(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        t.detach().requires_grad_() if t is not None and need and not t.requires_grad else t
        for t, need in zip(tensors, needs, strict=True)
    ]


def frozen_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, panels, _, _, stored = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(panels)
    ctx.in_features, ctx.stored = x.shape[-1], stored


def frozen_linear_backward(ctx: Any, dy: Tensor | None) -> Gradients:
    """Of x alone: weight and bias are frozen."""
    nothing = (None,) * 4
    if dy is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    (panels,) = ctx.saved_tensors
    if torch.is_grad_enabled() or observed() or not is_ordinary(dy):
        op = torch.ops.recmas.frozen_linear_bwd.default
        return op(dy.contiguous(), panels, ctx.in_features, ctx.stored), *nothing
    return serve.frozen_linear_bwd(dy, panels, ctx.in_features, ctx.stored), *nothing


def frozen_linear_bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, panels, _, stored = inputs
    ctx.save_for_backward(panels)
    ctx.out_features, ctx.stored = dy.shape[-1], stored


def frozen_linear_bwd_backward(ctx: Any, ddx: Tensor) -> Gradients:
    """A product is linear: the derivative of its input gradient is the product, without its bias."""
    op = torch.ops.recmas.frozen_linear.default
    return op(ddx.contiguous(), *ctx.saved_tensors, None, ctx.out_features, ctx.stored), None, None, None


def handoff_fwd_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[2])
    ctx.row_dtype = inputs[0].dtype


def handoff_fwd_backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if dy is None:
        return None, None, None
    drows, dembeds = torch.ops.recmas.handoff_bwd.default(dy.contiguous(), *ctx.saved_tensors)
    return drows.to(ctx.row_dtype), dembeds, None


def handoff_bwd_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])


def handoff_bwd_backward(ctx: Any, ddrows: Tensor, ddembeds: Tensor) -> tuple[Tensor, None]:
    """A handoff is linear: the derivative of its backward pass is a handoff."""
    op = torch.ops.recmas.handoff_fwd.default
    return op(ddrows.contiguous(), ddembeds.contiguous(), *ctx.saved_tensors), None


def alignment_fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.weights = inputs[4:]


def alignment_fwd_backward(ctx: Any, dloss: Tensor | None, _: None) -> Gradients:
    """Of pred, which alone learns."""
    *inputs, grad = ctx.saved_tensors
    return (None,) * 7 if dloss is None else alignment_gradients(inputs, ctx.weights, grad, dloss)


def alignment_gradients(inputs: Sequence[Any], weights: tuple[float, ...], grad: Tensor, dloss: Tensor) -> Gradients:
    """From ``grad``, that of pred which `alignment_fwd` returned; a graph of derivatives is plain torch."""
    nothing = (None,) * 6
    if torch.is_grad_enabled():
        pred, target, token_ids, mask = inputs

        def loss(rows: Tensor) -> Tensor:
            return reference.alignment_loss(rows, target.detach(), token_ids, mask, *weights)

        return *composed(loss, [pred], [True], dloss), *nothing
    return (grad * dloss).to(grad.dtype), *nothing
