"""Links on a CPU: forward without grad, and forward with backward, against every peer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.gate import inference_errors, training_errors
from benchmarks.harness.link_peer import LinkPeer, step
from benchmarks.harness.names import COMPILED, FUSED, PRODUCTS, ZENTORCH
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import TimeBound, Unmeasured
from benchmarks.harness.timing import Call
from benchmarks.peers.link import link_peer, products
from benchmarks.suites.cpu.link_grid import LinkCase, link_cases
from recmas_kernels import FusedRecursiveLink, packed
from recmas_kernels.testing import make_link, make_rows

cases = link_cases
SAME_PRODUCTS = tuple(name for name in COMPILED if name != ZENTORCH)  # compiled code that calls eager's products
Rows = tuple[Tensor, Tensor]  # x and the gradient of y


def call_of(case: LinkCase, peer: LinkPeer, rows: Rows) -> Call:
    """One call of ``peer``, on the rows in its own dtype."""
    x, dy = (tensor.to(peer.dtype) for tensor in rows)
    return partial(step, peer, x.detach().requires_grad_(), dy) if case.training else partial(peer.forward, x)


def within_bound(
    case: LinkCase, link: FusedRecursiveLink, rows: Rows, bound: TimeBound
) -> tuple[dict[str, LinkPeer], dict[str, Unmeasured]]:
    """The case's peers whose calls keep within the bound, and why the others, products among them, do not run."""
    peers: dict[str, LinkPeer] = {}
    unmeasured: dict[str, Unmeasured] = {}
    for name in case.peers:
        if name in SAME_PRODUCTS and "eager" in unmeasured:
            unmeasured[name] = Unmeasured("eager is over its bound, and compiled code calls the same products")
            continue
        call_on: Callable[[int], object]
        if name == PRODUCTS:
            call_on = lambda count: products(link, count, case.training)()  # noqa: E731
        else:
            peer = peers[name] = link_peer(name, link, rows[0])
            call_on = lambda count, peer=peer: call_of(case, peer, (rows[0][:count], rows[1][:count]))()  # noqa: E731
        if name not in COMPILED and (over := bound.probe(call_on, case.tokens)) is not None:
            unmeasured[name] = over
            peers.pop(name, None)
    return peers, unmeasured


def test_link(case: LinkCase, bench: Bench) -> None:
    link = make_link(case.config, case.dtype)
    x = make_rows(case.tokens, case.config.in_features, dtype=case.dtype)
    dy = make_rows(case.tokens, case.config.out_features, dtype=case.dtype, seed=2)
    # In inference the weights are packed, as the runtime packs them for an answer; training reads them as stored.
    with nullcontext() if case.training or case.unpacked else packed(link), torch.set_grad_enabled(case.training):
        peers, unmeasured = within_bound(case, link, (x, dy), TimeBound())
        errors_of = training_errors if case.training else inference_errors
        errors = errors_of(link, case.tokens, peers, slow_eager="eager" in unmeasured)
        implementations = {FUSED: LinkPeer(link, link), **peers}
        variants = {name: call_of(case, peer, (x, dy)) for name, peer in implementations.items()}
        if PRODUCTS in case.peers and PRODUCTS not in unmeasured:
            variants[PRODUCTS] = products(link, case.tokens, case.training)
        work_of = floors.link_training if case.training else floors.link_forward
        work = work_of(case.config, case.tokens, case.dtype.itemsize)
        labels = Labels("link", case.config.kind, case.shape, case.dtype, case.mode, case.tokens, case.cold)
        goal = case.goal(bench.device.has_bf16_products)
        bench.run(labels, variants, work, errors, goal, unmeasured=unmeasured)
