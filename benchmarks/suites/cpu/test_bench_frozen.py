"""An agent's own steps: frozen layers from packed weights against the library's, `think` and `write`.

The time of a cell is that of its steps alone, on a prompt that has been read: the floor is the bytes of the weights. As
many bytes are read in turn with the steps, since the rate of memory changes from one minute to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch

from benchmarks.harness.bench import Bench
from benchmarks.harness.checkpoints import Checkpoint
from benchmarks.harness.floors import Work
from benchmarks.harness.goals import Goal
from benchmarks.harness.names import COMPILE_FROZEN, EAGER_FLOAT32, FUSED, LLAMA, READS
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import TimeBound, Unmeasured
from benchmarks.peers.llama import LlamaSequences, llama_python
from benchmarks.suites.cpu import frozen_cases
from benchmarks.suites.cpu.frozen_cases import COLUMNS, COMPILED_BATCHES, PROMPT, STEPS, Case
from benchmarks.suites.cpu.frozen_steps import Llama, Made, Steps
from recmas.agents.agent import Agent
from recmas_kernels import packed
from recmas_kernels.backends import cpu
from recmas_kernels.testing import relative_error

pytestmark = pytest.mark.runtime

EQUAL = 1e-4  # of the largest entry: float32 sums in two orders, through all layers
SLACK = 4  # times eager's own error in bfloat16
GELU_TABLE = 3e-3  # llama.cpp looks GELU up in a table of 16 bits
ROUNDS = 9
BOUND = TimeBound(all_seconds=60)
cases = frozen_cases.cases


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    found = Made()
    yield found
    found.close()


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@torch.no_grad()
def test_frozen_steps(case: Case, bench: Bench, made: Made) -> None:
    made.of(case.shape)
    wanted = {FUSED: (case.dtype, True), "eager": (case.dtype, False), EAGER_FLOAT32: (torch.float32, False)}
    if case.dtype is torch.float32:
        del wanted[EAGER_FLOAT32]
    ours: dict[str, Steps] = {name: Steps(made.agent(*how), case) for name, how in wanted.items()}
    variants: dict[str, Steps | Llama] = {**ours}
    unmeasured: dict[str, Unmeasured] = {}
    extra: dict[str, Any] = {}
    if isinstance(case.shape, Checkpoint):
        extra["weights_sha256"] = case.shape.sha256
    with ExitStack() as held:
        if bench.full and case.batch in COMPILED_BATCHES:
            compiled = made.compiled(case)
            if isinstance(compiled, Unmeasured):
                unmeasured[COMPILE_FROZEN] = compiled
            else:
                variants[COMPILE_FROZEN] = ours[COMPILE_FROZEN] = compiled
            if (python := llama_python()) is not None:
                file = made.file(case)
                sequences = held.enter_context(
                    closing(LlamaSequences(python, file, case.op, case.batch, COLUMNS, case.dtype))
                )
                variants[LLAMA] = Llama(sequences, ours["eager"].agent, case)
                extra["llama"] = sequences.build
        errors = _errors(case, variants)
        held.enter_context(packed(*(steps.link for steps in ours.values())))
        if bench.benchmark.enabled:
            for steps in variants.values():
                steps()  # an untimed call first touches the memory of a model that has just been made
        work = _work(ours[FUSED].agent, case)
        weights = torch.ones(work.weight_bytes // STEPS // 4)
        calls = {**variants, READS: lambda: [weights.sum() for _ in range(STEPS)]}
        shape = f"{case.shape.name}, {STEPS} steps after {PROMPT} tokens"
        labels = Labels(case.suite, case.op, shape, case.dtype, "forward", case.batch)
        bench.run(
            labels,
            calls,
            work,
            errors,
            _goal(case),
            rounds=ROUNDS,
            twice=None,
            bound=BOUND,
            unmeasured=unmeasured,
            weighed=(),
            extra=extra,
        )


def _errors(case: Case, variants: dict[str, Steps | Llama]) -> dict[str, float]:
    """Of one position after the prompt, which nobody errs by more in than eager's order of sums and dtype explain."""
    tokens = torch.arange(case.batch) + 1
    found = {name: steps.after(tokens) for name, steps in variants.items()}
    exact = found["eager" if case.dtype is torch.float32 else EAGER_FLOAT32].double()
    errors = {name: relative_error(values, exact) for name, values in found.items()}
    bound = EQUAL if case.dtype is torch.float32 else SLACK * errors["eager"]
    for name, error in errors.items():
        if name == LLAMA and case.shape.uses_gelu:
            bound = max(bound, GELU_TABLE)
        assert error <= bound, f"{name}: results differ by {error:.1e}, allowed are {bound:.1e}"
    return errors


def _work(agent: Agent, case: Case) -> Work:
    """Each weight read once per step: the panels, and for writing the head, packed or tied to the token table."""
    accelerated, head = agent.accelerated, agent.model.get_output_embeddings()
    assert accelerated is not None
    elements, weights = accelerated.elements, accelerated.packed_bytes
    own = next((layer.packed() for layer in accelerated.packed.values() if layer is head), None)
    if own is not None and not case.writes:
        elements, weights = elements - own.out_features * own.in_features, weights - own.data.nbytes
    if own is None and case.writes:
        elements, weights = elements + head.weight.numel(), weights + head.weight.nbytes
    return Work(2 * case.batch * elements, weights, weights) * STEPS


def _goal(case: Case) -> Goal:
    """Where the library is at its best, 1.5 times it; on AVX2 alone 2.5 times, and bfloat16 4 times eager float32."""
    if cpu.instruction_set()[0] != "avx2":
        return Goal(1.5 if case.dtype is torch.float32 else 1.0)
    return Goal(2.5) if case.dtype is torch.float32 else Goal(4.0, peer=EAGER_FLOAT32)
