"""Links on a GPU: the forecast row by row, the released links, and calls that the host bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.harness import floors
from benchmarks.harness.gate import inference_errors, training_errors
from benchmarks.harness.gpu.bench import PRODUCTS_LT, GpuBench, under_lt
from benchmarks.harness.names import FUSED, PRODUCTS
from benchmarks.harness.record import Labels
from benchmarks.harness.timing import Call
from benchmarks.peers.link_gpu import BACKWARD, FORWARD, link_calls, link_peers, product_calls
from benchmarks.suites.gpu.link_grid import LinkCase, link_cases
from recmas_kernels.testing import make_link

cases = link_cases
GATED = ("eager", "addmm")


def test_link(case: LinkCase, gpu_bench: GpuBench) -> None:
    link = make_link(case.config, case.dtype).to(gpu_bench.device)
    itemsize = case.dtype.itemsize
    work_of = floors.link_forward if case.mode == FORWARD else floors.link_backward
    work = work_of(case.config, case.tokens, itemsize) * case.agents
    count = gpu_bench.sets(work.bytes_min, cold=case.cold)

    gated = {name: link_peers(name, link, 1)[0] for name in GATED if name in case.peers}
    errors = (inference_errors if case.mode == FORWARD else training_errors)(link, case.tokens, gated)

    def rows(features: int, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(gpu_bench.device).manual_seed(seed)
        return [
            torch.randn(case.tokens, features, generator=generator, device=gpu_bench.device).to(case.dtype)
            for _ in range(count * case.agents)
        ]

    xs, dys = rows(case.config.in_features, 1), rows(case.config.out_features, 2)
    if case.mode == BACKWARD:
        xs = [x.requires_grad_() for x in xs]

    def build(name: str) -> Sequence[Call]:
        if name == PRODUCTS:
            return grouped(product_calls(link, case.tokens, case.mode, len(xs)), case.agents)
        return grouped(link_calls(link_peers(name, link, len(xs)), xs, dys, case.mode), case.agents)

    builders: dict[str, Callable[[], Sequence[Call]]] = {
        name: partial(build, name) for name in (FUSED, *case.peers) if name != PRODUCTS_LT
    }
    if PRODUCTS_LT in case.peers:
        builders[PRODUCTS_LT] = lambda: [partial(under_lt, call) for call in build(PRODUCTS)]
    suite = "link" if case.graph else "host"
    labels = Labels(suite, case.op, case.shape, case.dtype, case.mode, case.tokens, case.cold, case.graph)
    with torch.set_grad_enabled(case.mode == BACKWARD):
        gpu_bench.measure(labels, builders, work, errors, case.forecast)


def grouped(calls: Sequence[Call], size: int) -> list[Call]:
    """``calls`` so many at a time."""
    if size == 1:
        return list(calls)

    def run(group: Sequence[Call]) -> None:
        for call in group:
            call()

    return [partial(run, calls[start : start + size]) for start in range(0, len(calls), size)]
