"""What a link computes before its first step, other than what it was drawn at.

"identity": its residual alone, ``norm_out(x)``, or of a linear residual the identity matrix, cut or filled up.
"ridge": the linear map of its targets. With a linear residual that is ``residual_proj``, the second layer zero; with
another one the second layer, on the first one's activations as they were drawn, adds what the residual lacks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels import RecursiveLink

PENALTY = 1e-3
"""Of the mean square of the features, added to every one's."""
_NORMS = {"inner": "pre_ln", "outer": "ln_source"}
ROWS = 8
"""Rows to fit on per feature; more are not asked for."""


def to_identity(link: RecursiveLink) -> None:
    """Make ``link`` its residual alone.

    Raises:
        ValueError: it has none.
    """
    if link.config.residual == "none":
        raise ValueError("link_init: 'identity' needs links with a residual")
    with torch.no_grad():
        for parameter in _last(link).parameters():
            parameter.zero_()
        if link.config.residual == "linear":
            link.residual_proj.weight.copy_(torch.eye(*link.residual_proj.weight.shape))
            if link.residual_proj.bias is not None:
                link.residual_proj.bias.zero_()


def to_ridge(link: RecursiveLink, examples: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit ``link`` to examples: rows ``[n, in]`` and what each should become ``[n, out]``.

    Before a final norm the scale of the targets does not count: what joins an identity takes its scale.
    """
    linear = link.config.residual == "linear"
    fitted: nn.Linear = link.residual_proj if linear else _last(link)
    width = fitted.weight.shape[1] + (fitted.bias is not None)
    products = torch.zeros(width, width, dtype=torch.float64)
    targets = torch.zeros(width, fitted.weight.shape[0], dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for x, target in examples:
            features = _features(link, x.to(fitted.weight.dtype)).cpu().double()
            wanted = target.cpu().double()
            if link.config.residual == "identity":
                kept = x.cpu().double()
                scale = (kept.square().mean() / wanted.square().mean()).sqrt() if link.config.norm else 1
                wanted = scale * wanted - kept
            products += features.T @ features
            targets += features.T @ wanted
            count += len(features)
            if count >= ROWS * width:
                break
        penalty = PENALTY * products.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        solved = torch.linalg.solve(products + penalty * torch.eye(width, dtype=torch.float64), targets).T
        if linear:
            for parameter in _last(link).parameters():
                parameter.zero_()
        fitted.weight.copy_(solved[:, : fitted.weight.shape[1]])
        if fitted.bias is not None:
            fitted.bias.copy_(solved[:, -1])


def _last(link: RecursiveLink) -> nn.Linear:
    return link.proj2 if link.config.layers == 2 else link.proj1


def _features(link: RecursiveLink, x: Tensor) -> Tensor:
    """What the fitted layer reads, and a one for its bias."""
    fitted = link.residual_proj if link.config.residual == "linear" else _last(link)
    if link.config.residual != "linear":
        x = getattr(link, _NORMS[link.config.kind])(x) if link.config.norm else x
        if link.config.layers == 2:
            x = F.gelu(link.proj1(x), approximate="tanh" if link.config.activation == "gelu_tanh" else "none")
    return x if fitted.bias is None else torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
