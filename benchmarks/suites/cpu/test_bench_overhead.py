"""Cost of a call whose arithmetic is nothing: links eight wide, one token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.harness import floors
from benchmarks.harness.bench import Bench
from benchmarks.harness.gate import inference_errors, training_errors
from benchmarks.harness.goals import Goal
from benchmarks.harness.link_peer import LinkPeer, step
from benchmarks.harness.names import FUSED
from benchmarks.harness.record import Labels
from benchmarks.peers.link import link_peer
from recmas_kernels import FusedRecursiveLink, LinkConfig
from recmas_kernels.config import NORM_NAMES
from recmas_kernels.testing import make_link, make_rows

CONFIG = LinkConfig("inner", 8, 8, 8, "identity")
CALLS = 200  # per sample: one alone is shorter than the clock is good for
FASTER = 1 / 0.75
GOALS = {
    "module, no grad": Goal(FASTER, 2 * FASTER, must_us=25),
    "module, grad": Goal(FASTER, 2 * FASTER, must_us=40),
    "module, forward+backward": None,
    "bare op": Goal(FASTER, 2 * FASTER, must_us=12),
}


@dataclass(frozen=True)
class Case:
    mode: str

    @property
    def id(self) -> str:
        return f"cpu-{self.mode.replace(', ', '-').replace(' ', '-')}"


def cases(full: bool) -> list[Case]:
    return [Case(mode) for mode in GOALS]


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def bare_op(link: FusedRecursiveLink, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The op that a module without gradients runs, its arguments ready: neither module nor functions."""
    pairs = [(layer.weight, layer.bias) for layer in (link.proj1, link.proj2)]
    norms = (getattr(link, name) for name in NORM_NAMES["inner"])
    pairs += [(norm.weight, norm.bias) for norm in norms]
    tensors = (*pairs[0], *pairs[1], None, None, *pairs[2], *pairs[3])
    op = torch.ops.recmas.link_fwd.default
    return partial(op, x, *tensors, "identity", "none", link.config.eps, x.dtype, False)


def test_overhead(case: Case, bench: Bench) -> None:
    link = make_link(CONFIG)
    x = make_rows(1, CONFIG.in_features)
    eager = link_peer("eager", link, x)
    fused_call: Callable[[], object] = partial(link, x)
    eager_call: Callable[[], object] = partial(eager.forward, x)
    work = floors.link_forward(CONFIG, 1, x.element_size())
    errors = inference_errors(link, 1, {"eager": eager})
    if case.mode == "bare op":
        fused_call = bare_op(link, x)
        with torch.no_grad():
            assert torch.equal(bare_op(link, x)(), link(x))
    elif case.mode == "module, forward+backward":
        dy, learning = make_rows(1, CONFIG.out_features, seed=2), make_rows(1, CONFIG.in_features).requires_grad_()
        errors = training_errors(link, 1, {"eager": eager})
        work = floors.link_training(CONFIG, 1, x.element_size())
        fused_call = partial(step, LinkPeer(link, link), learning, dy)
        eager_call = partial(step, eager, learning, dy)
    labels = Labels("overhead", "link", "8x8x8", x.dtype, case.mode, tokens=1)
    variants = {FUSED: repeated(fused_call), "eager": repeated(eager_call)}
    with torch.set_grad_enabled(case.mode in ("module, grad", "module, forward+backward")):
        bench.run(labels, variants, work, errors, GOALS[case.mode], calls=CALLS)
