"""The peers of a fused link, each built only when asked for: compiling takes up to a minute.

`eager`: the plain module. `addmm`: the best that plain torch calls can do, residual and biases folded into the products
and GELU into the first one. `compile`: torch.compile as it comes. `compile-frozen`: Inductor with freezing (it packs
weights, too) and max-autotune. `products`: the library's matrix products alone, an upper limit and no peer: without
norms, biases, GELU and residual. `eager, float32`: the plain module in float32, beside cells of another dtype.
`zentorch`: torch.compile with AMD's plugin, without grad, where that is installed and the processor is AMD's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.link_peer import Forward, LinkPeer
from benchmarks.harness.machine import Device
from benchmarks.harness.names import COMPILED, EAGER_FLOAT32, PRODUCTS, ZENTORCH
from recmas_kernels import RecursiveLink
from recmas_kernels.config import NORM_NAMES
from recmas_kernels.testing import eager_twin

PEERS = ("eager", EAGER_FLOAT32, "addmm", *COMPILED, PRODUCTS)


def _normalised(link: RecursiveLink, side: int, rows: Tensor) -> Tensor:
    if not link.config.norm:
        return rows
    norm: nn.LayerNorm = getattr(link, NORM_NAMES[link.config.kind][side])
    return F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def best_eager(link: RecursiveLink, x: Tensor) -> Tensor:
    """``link(x)`` for ``x [T, in]`` of a two-layer link with biases, in as few passes as torch calls allow."""
    config = link.config
    u, w1, b1 = _normalised(link, 0, x), link.proj1.weight, link.proj1.bias
    if torch.is_grad_enabled() or x.is_cuda:
        a = F.gelu(torch.addmm(b1, u, w1.t()))
    else:
        # Has no derivative, and is the tanh form on CUDA.
        a = torch._addmm_activation(b1, u, w1.t(), use_gelu=True)
    if config.residual == "identity":
        z = torch.addmm(x + link.proj2.bias, a, link.proj2.weight.t())
    else:
        z = torch.addmm(link.proj2.bias + link.residual_proj.bias, a, link.proj2.weight.t())
        z = torch.addmm(z, x, link.residual_proj.weight.t())
    return _normalised(link, 1, z)


def compiled(module: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile with its defaults, for the one shape it will see."""
    torch._dynamo.reset()  # all links share one code object, and dynamo gives up after eight shapes of it
    return torch.compile(module, dynamic=False)


@torch.no_grad()
def compiled_frozen(module: nn.Module, x: Tensor) -> Forward:
    """torch.compile with max-autotune and frozen weights, compiled for the shape of ``x``; for use without grad."""
    torch._dynamo.reset()
    forward = torch.compile(module.eval(), dynamic=False, options=torch._inductor.list_mode_options("max-autotune"))
    # Not one of the options: dynamo itself asks for it while tracing, or the weights stay inputs and nothing is packed.
    with torch._inductor.config.patch(freezing=True):
        forward(x)
    return forward


def zentorch_serves() -> bool:
    """Whether zentorch is a peer here: it is installed, and the processor is AMD's."""
    return importlib.util.find_spec("zentorch") is not None and Device().vendor == "AuthenticAMD"


@torch.no_grad()
def compiled_by_zentorch(module: nn.Module, x: Tensor) -> Forward:
    """torch.compile with the backend of zentorch, compiled for the shape of ``x``; for use without grad.

    It packs the weights in place, so that ``module`` itself computes something else afterwards.
    """
    import zentorch  # noqa: F401  (registers the backend)

    # No reset of dynamo here: it would make `compile-frozen` compile again at its next call, and then without freezing.
    forward = torch.compile(module.eval(), backend=ZENTORCH, dynamic=False)
    # The backend leaves a pass of its own in Inductor's configuration, which other peers must not meet.
    with torch._inductor.config.patch(freezing=True, joint_custom_post_pass=None):
        forward(x)
    return forward


def products(link: RecursiveLink, tokens: int, training: bool) -> Callable[[], None]:
    """The matrix products of a link into buffers that exist already; with ``training`` those of the backward too."""
    dtype = link.proj1.weight.dtype
    projections = [link.proj1, link.proj2, *([link.residual_proj] if link.config.residual == "linear" else [])]
    triples = []
    for projection in projections:
        weight = projection.weight.detach()
        rows = torch.randn(tokens, weight.shape[1]).to(dtype)
        triples.append((rows, weight, torch.randn(tokens, weight.shape[0]).to(dtype)))
    gradients = [(torch.empty_like(rows), torch.empty_like(weight)) for rows, weight, _ in triples] if training else []

    def run() -> None:
        for rows, weight, out in triples:
            torch.mm(rows, weight.t(), out=out)
        for (rows, weight, out), (drows, dweight) in zip(triples, gradients, strict=bool(gradients)):
            torch.mm(out, weight, out=drows)
            torch.mm(out.t(), rows, out=dweight)

    return run


def link_peer(name: str, link: RecursiveLink, x: Tensor) -> LinkPeer:
    """Peer ``name`` with its own copy of ``link``'s parameters, for inputs shaped as ``x``.

    Raises:
        ValueError: there is no such peer.
    """
    twin = eager_twin(link, torch.float32 if name == EAGER_FLOAT32 else link.proj1.weight.dtype)
    if name in ("eager", EAGER_FLOAT32):
        return LinkPeer(twin, twin)
    if name == "addmm":
        return LinkPeer(lambda x: best_eager(twin, x), twin)
    if name == "compile":
        return LinkPeer(compiled(twin), twin)
    if name == "compile-frozen":
        return LinkPeer(compiled_frozen(twin, x), twin)
    if name == ZENTORCH:
        return LinkPeer(compiled_by_zentorch(twin, x), twin)
    raise ValueError(f"peer is {name!r}, expected one of {', '.join(PEERS)}")
