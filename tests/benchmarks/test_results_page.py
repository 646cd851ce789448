"""Claims, and verdicts that follow from stored samples."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.goals import Goal
from benchmarks.harness.growth import GrowthCase, growth_record
from benchmarks.harness.record import noise_of
from benchmarks.harness.scaling import whole
from benchmarks.harness.timing import Quantiles, Ratio
from benchmarks.report.__main__ import ROOT
from benchmarks.report.claims import CLAIMS, FAILS, HOLDS, UNTOLD, Finding
from benchmarks.report.evidence import carried, content, half_the_time, relay
from benchmarks.report.results_page import html_page, results_page
from benchmarks.report.stored import RESULTS, load
from benchmarks.suites.cpu.test_bench_complexity import NAMES, terms_of

FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir())


def test_the_committed_page_is_what_the_records_say():
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == results_page(RESULTS)


def test_one_file_holds_the_page_and_its_plots():
    page = html_page(RESULTS)
    assert page.count("<svg") == len(list(RESULTS.glob("*/*.svg"))) > 0
    assert "src=" not in page
    assert all(claim.text in page for claim in CLAIMS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_ratio_and_verdict_follows_from_its_samples(folder: Path):
    """Samples are kept to a hundredth of a microsecond, a thousandth of the shortest."""
    found = [record for suite in load(folder).values() for record in suite["records"]]
    for record in found:
        derive = _ratios if "impls" in record else _growth if "sizes" in record else _whole
        assert derive(record) is (record["missed"] is not None), (record["op"], record["shape"])
    assert found


def _ratios(record: dict[str, Any]) -> bool:
    samples = {name: one["samples_us"] for name, one in record["impls"].items()}
    ratios = {name: Ratio.of(samples[name], samples["fused"][: len(samples[name])]) for name in record["ratios"]}
    for name, ratio in ratios.items():
        assert asdict(ratio) == pytest.approx(record["ratios"][name], rel=2e-3)
    if record["goal"] is None:
        return False
    goal = Goal(**record["goal"])
    microseconds = Quantiles.of(samples["fused"]).p50
    if goal.peer not in ratios:
        return goal.missed_at_least(record["unmeasured"][goal.peer]["at_least"], microseconds) is not None
    memory = None
    if goal.must_memory is not None:
        memory = record["impls"][goal.peer]["peak_mem_mb"] / record["impls"]["fused"]["peak_mem_mb"]
    return goal.missed(ratios[goal.peer], noise_of(samples), microseconds, memory) is not None


def _growth(record: dict[str, Any]) -> bool:
    case = GrowthCase(record["op"], record["factor"], record["expected"], (), (), record["control"])
    samples = [[value * 1e-6 for value in times] for times in record["samples_us"]]
    return growth_record(case, record["sizes"], samples)["missed"] is not None


def _whole(record: dict[str, Any]) -> bool:
    sizes = [[turn[name] for name in ("features", "vocabulary", "prompt", "steps")] for turn in record["turns"]]
    columns = np.array([terms_of(*of_turn, text) for of_turn in sizes for text in (True, False)])
    _, r2 = whole(NAMES, columns, [[value * 1e-6 for value in times] for times in record["samples_us"]])
    assert r2 == pytest.approx(record["r2"], abs=1e-6)
    return bool(r2 < record["goal"]["r2"])


def record(op: str, missed: str | None = None, **more: Any) -> dict[str, Any]:
    goal = {"peer": "eager", "must": 1.0}
    return {"op": op, "shape": "s", "goal": goal, "missed": missed, "ratios": {"eager": {"value": 2.0}}, **more}


def test_a_claim_holds_in_every_cell_or_in_part_or_not():
    judge = next(claim for claim in CLAIMS if claim.suite == "alignment").judge
    met, missed = record("a"), record("b", "0.5x eager, must be 1.0x")
    assert judge([]) is None
    assert judge([met]).verdict == HOLDS
    assert judge([missed]).verdict == FAILS
    found = judge([met, missed])
    assert "1 of 2" in found.verdict
    assert "b: 0.5x eager, must be 1.0x" in found.measured
    assert "2.00× to 2.00× of eager in 2 cells" in found.measured


def test_links_that_cost_more_time_or_memory_are_not_cheaper():
    judge = next(claim for claim in CLAIMS if claim.suite == "costs").judge

    def costs(low: float, memory: float) -> dict[str, Any]:
        impls = {"fused": {"peak_mem_mb": 10.0}, "LoRA, rank 16": {"peak_mem_mb": memory}}
        return record("a", ratios={"LoRA, rank 16": {"value": low, "low": low}}, impls=impls)

    assert judge([costs(1.5, 20.0)]).verdict == HOLDS
    assert judge([costs(0.5, 20.0)]).verdict == FAILS
    assert judge([costs(1.5, 5.0)]).verdict == FAILS


def test_audits_decide_by_their_verdict_and_their_answers():
    arms = [{"arm": "trained", "correct": [True, True]}, {"arm": "text", "correct": [True, False]}]
    matters = {"arms": arms, "verdict": "content matters"}
    untold = {"arms": arms, "verdict": "content cannot be told with 2 questions"}

    def verdict(*audits: dict[str, Any]) -> str:
        return relay({"questions": {"count": 2}, "audits": audits}).verdict

    assert verdict(matters, matters) == HOLDS
    assert verdict(untold) == FAILS
    assert "1 of 2" in verdict(matters, untold)


def audited(arm: str, correct: list[bool], links: str = "9-0", **more: Any) -> dict[str, Any]:
    asked = {"cell": links, "links": links, "seed": 2, "hops": 1, "steps": 0, "tokens": 0}
    return {"arm": arm, "correct": correct, "nll": [1.0] * len(correct), **asked, **more}


def test_latents_carry_what_text_carries_if_they_answer_as_much():
    text, judge = [True, False] * 8, carried("a-b", "9 lists")
    assert judge({}) is None

    def verdict(*seeds: list[bool]) -> str:
        audits = [audited("text", text, tokens=8), audited("text", [False] * 16, tokens=8, seed=1)]
        audits += [audited("trained", one, f"9-{seed}", steps=8) for seed, one in enumerate(seeds)]
        found = judge({"a-b": {"audit": audits}})
        assert found is not None
        return found.verdict

    assert verdict(text, text) == HOLDS
    assert verdict([True] * 16, [True] * 16) == HOLDS
    assert verdict([False] * 16, [False] * 16) == FAILS
    assert verdict([False] * 16) == FAILS
    assert verdict([True, True, *text[2:]], [False, False, *text[2:]]) == UNTOLD


def test_latents_are_compared_with_texts_of_their_own_questions():
    text = audited("text", [True, False] * 8, tokens=8)
    audits = [text, {**text, "correct": [True] * 16, "task": "gym"}, audited("trained", [True] * 16, steps=8)]
    audits.append(audited("trained", [False] * 16, steps=8, task="gym"))
    audits[:0] = [audited("trained", [False] * 16, steps=80), audited("trained", [True] * 16, steps=80, task="gym")]
    record = {"a-b": {"audit": audits}}
    for asked, verdict in (({}, HOLDS), ({"task": "gym"}, FAILS)):
        found = carried("a-b", "9 lists", **asked)(record)
        assert found is not None
        assert found.verdict == verdict
    assert carried("a-b", "9 lists", hops=2)(record) is None


def test_content_matters_in_those_audits_that_show_it():
    right = [audited("trained", [True] * 8), audited("shuffled", [False] * 8)]
    judge = content("a-b")
    assert judge({"a-b": {"audit": []}}) is None
    assert judge({"a-b": {"audit": right}}) == Finding(
        "accuracy minus that with latents of another question: +1.00 to +1.00, NLL of the gold answer: +0.00 to +0.00 "
        "nats, in 1 audits",
        HOLDS,
    )
    same = [audited("trained", [True] * 8, "9-1"), audited("shuffled", [True] * 8, "9-1")]
    few = judge({"a-b": {"audit": same}})
    assert few is not None
    assert few.verdict == UNTOLD  # eight questions do not show that there is nothing
    many = judge({"a-b": {"audit": [{**one, "correct": [True] * 400, "nll": [1.0] * 400} for one in same]}})
    assert many is not None
    assert many.verdict == FAILS
    found = judge({"a-b": {"audit": [*right, *same]}})
    assert found is not None
    assert "1 of 2" in found.verdict


def test_half_the_time_is_of_the_whole_turn():
    def timed(way: str, seconds: float, batch: int) -> dict[str, Any]:
        return {"way": way, "batch": batch, "dtype": "float32", "reader seconds": seconds}

    times = [timed(way, t, b) for b in (1, 4) for way, t in (("text, 32 tokens", 2.0), ("latents, m = 8", 0.5 + b / 4))]
    found = half_the_time({"qwen-smollm2": {"time": times}})
    assert found is not None
    assert found.measured.endswith("0.38 with 1 at once in float32, 0.75 with 4 at once in float32")
    assert "1 of 2" in found.verdict
    assert half_the_time({}) is None


@pytest.mark.parametrize("command", sorted({claim.command for claim in CLAIMS}))
def test_the_command_of_a_claim_exists(command: str):
    assert (ROOT / command.removesuffix(" --grid full").split()[-1]).is_file()


def test_no_record_is_left_out():
    for folder in FOLDERS:
        for suite, stored in load(folder).items():
            assert any(claim.judge(stored["records"]) for claim in CLAIMS if claim.suite == suite), suite
    times = {"step_times.json"}  # they explain times of the suite "frozen", and claim nothing
    page = results_page(RESULTS)
    assert all(path.name in page for path in RESULTS.glob("*.json") if path.name not in times)
