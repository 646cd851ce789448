"""Which cells of the GPU suites each step of `benchmarks.gpu.run` measures, so that a step fits its seconds."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.gpu.forecast import COMPILE_MAX
from benchmarks.suites.gpu import (
    link_grid,
    test_bench_alignment,
    test_bench_decode,
    test_bench_link,
    test_bench_products,
    test_bench_questions,
    test_bench_rollout,
)

STEPS = ("few", "many", "steps", "compile", "candidates")


def cells(step: str) -> list[tuple[Any, Any]]:
    """``(suite, case)`` of a step's cells, each once."""
    found = [
        (suite, case)
        for suite in (
            test_bench_link,
            test_bench_questions,
            test_bench_rollout,
            test_bench_decode,
            test_bench_alignment,
            test_bench_products,
        )
        for case in suite.cases(True)
        if step_of(suite, case) == step
    ]
    return found


def step_of(suite: Any, case: Any) -> str | None:
    """The step that a cell belongs to; None for one that only a run without ``--step`` measures."""
    name = suite.__name__.rsplit(".", 1)[-1]
    if name == "test_bench_rollout":
        return "steps" if case.batch == 16 else None
    if name == "test_bench_decode":
        return "steps"
    if name == "test_bench_alignment":
        return "compile" if COMPILE_MAX not in case.peers else None
    if name == "test_bench_products":
        return "candidates" if case.tokens == 4096 else None
    if name == "test_bench_questions":
        return {"gaps": "few", "variant": "many"}.get(case.kind) if case.tokens in (0, 1536, 16384) else None
    if name == "test_bench_link":
        return _link(case)
    return None


def _link(case: Any) -> str | None:
    if case.agents > 1 or not case.graph:
        return None
    if COMPILE_MAX in case.peers:
        return "compile" if (case.config, case.tokens, case.cold) == (link_grid.INNER, 1, True) else None
    if case.peers == link_grid.LAUNCHED:
        return "few"
    if case.rank == link_grid.TRITON_RANK:
        return "many"
    if case.forecast is None:
        return None
    if case.config == link_grid.INNER and case.tokens in (1, 32, 4096) and case.cold:
        return "few" if case.tokens == 1 else "compile"
    if case.config == link_grid.narrow(128) or (case.config == link_grid.OUTER and case.tokens == 1536):
        return "many" if case.mode == "forward" else None
    return None
