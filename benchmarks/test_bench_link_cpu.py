"""Links on a CPU: forward without grad, and forward with backward, against every peer."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import floors
from benchmarks.baselines import PRODUCTS, LinkPeer, link_peer, products
from benchmarks.gate import inference_errors, step, training_errors
from benchmarks.record import FUSED, Bench, Labels
from benchmarks.shapes import LinkCase, link_cases
from benchmarks.timing import Call
from recmas_kernels.testing import make_link, make_rows

cases = link_cases


def test_link(case: LinkCase, bench: Bench) -> None:
    link = make_link(case.config, case.dtype)
    x = make_rows(case.tokens, case.config.in_features, dtype=case.dtype)
    peers = {name: link_peer(name, link, x) for name in case.peers if name != PRODUCTS}
    implementations = {FUSED: LinkPeer(link, link), **peers}
    itemsize = case.dtype.itemsize
    if case.training:
        dy = make_rows(case.tokens, case.config.out_features, dtype=case.dtype, seed=2)
        errors = training_errors(link, case.tokens, peers)
        learning = x.requires_grad_()
        variants: dict[str, Call] = {name: partial(step, peer, learning, dy) for name, peer in implementations.items()}
        work = floors.link_training(case.config, case.tokens, itemsize)
    else:
        errors = inference_errors(link, case.tokens, peers)
        variants = {name: partial(peer.forward, x) for name, peer in implementations.items()}
        work = floors.link_forward(case.config, case.tokens, itemsize)
    if PRODUCTS in case.peers:
        variants[PRODUCTS] = products(link, case.tokens, case.training)
    mode = "forward+backward" if case.training else "forward"
    labels = Labels("link", case.config.kind, case.shape, case.dtype, mode, case.tokens, case.cold)
    with torch.set_grad_enabled(case.training):
        bench.run(labels, variants, work, errors, case.goal(bench.device.has_bf16_products))
