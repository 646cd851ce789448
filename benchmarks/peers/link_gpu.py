"""The peers of a fused link on a GPU, each on several copies of its operands, which cold calls take in turn.

`eager`, `addmm`, `compile` as on a CPU; `compile-max`: max-autotune, without graphs of its own, since all variants are
recorded alike; `reduce-overhead`: with graphs of its own, for calls that are not recorded; `products`: the library's
matrix products alone, no peer; `LAUNCHES`: the fused link itself with other launches of its few-token kernels. Compiled
peers take the parameters as arguments: one compilation serves every copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.harness.gpu import cuda
from benchmarks.harness.gpu.forecast import COMPILE, COMPILE_MAX
from benchmarks.harness.link_peer import LinkPeer
from benchmarks.harness.names import FUSED, PRODUCTS
from benchmarks.harness.timing import Call
from benchmarks.peers.link import best_eager
from recmas_kernels import FusedRecursiveLink
from recmas_kernels.testing import eager_twin

FORWARD, BACKWARD = "forward", "backward"
REDUCE_OVERHEAD = "reduce-overhead"
# By name: when a launch may start beside the one ahead, and the percentage of unified memory asked for as shared.
LAUNCHES = {
    f"{FUSED}, {overlap} overlap, {carveout} % shared": (overlap, carveout)
    for carveout in (100, 50)
    for overlap in ("early", "late", "off")
    if (overlap, carveout) != ("early", 100)  # the usual ones
}
GPU_PEERS = ("eager", "addmm", COMPILE, COMPILE_MAX, REDUCE_OVERHEAD, PRODUCTS, *LAUNCHES)
_MODES = {COMPILE: None, COMPILE_MAX: "max-autotune-no-cudagraphs", REDUCE_OVERHEAD: "reduce-overhead"}


def compiled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as peer ``name`` compiles it, for the one shape it will see."""
    torch._dynamo.reset()  # all links share one code object, and dynamo gives up after eight shapes of it
    return torch.compile(function, dynamic=False, mode=_MODES[name])


def link_peers(name: str, link: FusedRecursiveLink, count: int) -> list[LinkPeer]:
    """Peer ``name`` (or "fused") on ``count`` copies of ``link``, each with parameters of its own.

    Raises:
        ValueError: there is no such peer.
    """
    if name in LAUNCHES:
        modules = [copy.deepcopy(link) for _ in range(count)]
        return [LinkPeer(partial(_launch, *LAUNCHES[name], module), module) for module in modules]
    if name == FUSED:
        return [LinkPeer(module, module) for module in (copy.deepcopy(link) for _ in range(count))]
    twins = [eager_twin(link, link.proj1.weight.dtype) for _ in range(count)]
    if name == "eager":
        return [LinkPeer(twin, twin) for twin in twins]
    if name == "addmm":
        return [LinkPeer(partial(best_eager, twin), twin) for twin in twins]
    if name not in _MODES:
        raise ValueError(f"peer is {name!r}, expected one of {', '.join(GPU_PEERS)}")
    # A module of its own: parameters that are also the module's would be one input, and cost a second compilation.
    shell = copy.deepcopy(twins[0]).to("meta")
    run = compiled(name, lambda parameters, x: functional_call(shell, parameters, (x,)))
    return [LinkPeer(partial(run, dict(twin.named_parameters())), twin) for twin in twins]


def _launch(overlap: str, carveout: int, link: FusedRecursiveLink, x: Tensor) -> Tensor:
    with cuda.launched(overlap, carveout):
        return link(x)


def link_calls(peers: list[LinkPeer], xs: list[Tensor], dys: list[Tensor], mode: str) -> list[Call]:
    """One call per copy: a forward without grad, or a backward alone, whose forward runs here and is kept.

    Args:
        peers: as `link_peers` made them.
        xs: ``[T, in]`` per copy; leaves that want a gradient for a backward.
        dys: ``[T, out]`` per copy.
        mode: FORWARD or BACKWARD.
    """
    if mode == FORWARD:
        return [partial(peer.forward, x) for peer, x in zip(peers, xs, strict=True)]
    return [_backward(peer, x, dy) for peer, x, dy in zip(peers, xs, dys, strict=True)]


def _backward(peer: LinkPeer, x: Tensor, dy: Tensor) -> Call:
    y, inputs = peer.forward(x), (x, *peer.module.parameters())
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def product_calls(link: FusedRecursiveLink, tokens: int, mode: str, count: int) -> list[Call]:
    """The bare products of a link's forward or backward, into buffers that exist already; one call per copy."""
    return [_products(copy.deepcopy(link), tokens, mode) for _ in range(count)]


def _products(link: FusedRecursiveLink, tokens: int, mode: str) -> Call:
    projections = [link.proj1, link.proj2, *([link.residual_proj] if link.config.residual == "linear" else [])]
    operands: list[tuple[Tensor, Tensor, Tensor]] = []
    for projection in projections:
        weight = projection.weight.detach()
        rows = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
        out = torch.randn(tokens, weight.shape[0], device=weight.device, dtype=weight.dtype)
        if mode == FORWARD:
            operands.append((rows, weight.t(), out))
        else:
            operands.append((out, weight, rows))
            operands.append((out.t(), rows.clone(), torch.empty_like(weight)))

    def run() -> None:
        for left, right, result in operands:
            torch.mm(left, right, out=result)

    return run
