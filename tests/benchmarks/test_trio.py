"""The measurements on the notes task, on models that are small enough for a test."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.harness.link_seeds import crossed
from benchmarks.report.evidence import on_the_frontier
from benchmarks.trio import frontier
from benchmarks.trio.__main__ import load_agents, main
from benchmarks.trio.cells import measure
from benchmarks.trio.demo import EXAMPLE
from benchmarks.trio.demo import NAMES as DEMO_NAMES
from benchmarks.trio.demo import main as demo
from benchmarks.trio.links import load_links
from benchmarks.trio.page import rows_of
from benchmarks.trio.record import change
from benchmarks.trio.rereading import Opening, Rereader
from benchmarks.trio.shipped import models_of
from benchmarks.trio.task import Thoughts, loss
from benchmarks.trio.times import TURNS, turns
from recmas import Agent
from recmas.agents.targets import target_tokens
from recmas.answering.answers import Answer, Answers
from recmas.config.system_json import Decoding
from recmas.engine.messages import Latents, run_link
from recmas.evaluation.audits import gold_nll
from recmas.evaluation.intervals import student
from recmas.lab.notes import questions
from recmas.training.pairs import speak, utterances
from recmas_kernels import FusedRecursiveLink
from tests.runtime.tiny import tiny_agent

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/trio.json"
NAMES = ("4-0", "4-1", "4-0-task")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("large", "small")):
        agent = tiny_agent("llama", name, 32 + 8 * seed, seed)
        agent.model.config.max_position_embeddings = 4096
        agent.save_pretrained(folder / name)
    return folder


def call(models, step, *options):
    return main([str(models), str(models / "record.json"), step, "large", "small", *options])


def recorded(models):
    return json.loads((models / "record.json").read_text())["large-small"]


@pytest.fixture(scope="module")
def linked(models):
    """General links of two seeds, and the first ones after a short outer stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.trio.links.HELD", 2)
        patch.setattr("benchmarks.trio.task.TRAINED", 16)
        patch.setattr("benchmarks.trio.task.WATCHED", 8)
        # A vocabulary of one corpus: few words are one token.
        patch.setattr("benchmarks.trio.links.copies", lambda words, seed, count: short(words, seed, count))
        for seed in ("0", "1"):
            assert call(models, "links", "--lists", "4", "--steps", "2", "--seed", seed) == 0
        assert call(models, "task", "--links", "4-0", "--steps", "6", "--latents", "3", "--rate", "1e-2") == 0
    return models


def test_links_and_the_outer_stage_leave_their_record(linked):
    first, second, task = recorded(linked)["links"]
    assert [one["links"] for one in (first, second, task)] == ["4-0", "4-1", "4-0-task"]
    assert set(first["held out"]) == {"word lists", "messages, known", "messages, unknown"}
    for found in first["held out"].values():
        assert all(-1 <= value <= 1 for value in found.values())
    assert min(task["validation"][1:]) < task["validation"][0]
    weights = [(linked / "links/large-small" / name / "outer/model.safetensors").read_bytes() for name in NAMES]
    assert len(set(weights)) == 3
    inner = [(linked / "links/large-small" / name / "inner/model.safetensors").read_bytes() for name in NAMES]
    assert inner[0] == inner[2] != inner[1]


def test_audits_are_added_once_and_times_replaced(linked, monkeypatch, capsys):
    assert call(linked, "audit", "--links", "4-7") == 2
    assert f"{linked}/links/large-small/4-7: no links there" in capsys.readouterr().err
    cell = ("--questions", "7", "--latents", "1", "--tokens", "3", "--arms", "text")
    for links in ("4-0", ",".join(NAMES)):  # the first of these is done
        assert call(linked, "audit", "--links", links, *cell) == 0
    assert call(linked, "audit", "--links", "4-0", "--questions", "7", "--validation") == 0
    audits = recorded(linked)["audit"]
    arms = [("trained", 1, 0), ("shuffled", 1, 0), ("text", 0, 3)]
    assert [(one["arm"], one["steps"], one["tokens"]) for one in audits[:9]] == 3 * arms
    assert [(one["links"], one["seed"]) for one in audits[::3]] == [*((name, 2) for name in NAMES), ("4-0", 1)]
    assert all(len(one["correct"]) == len(one["nll"]) == 7 for one in audits)
    assert len(audits) == 11
    ways = {name: TURNS[name] | {"tokens": 2} for name in ("text, 32 tokens", "latents, m = 8")}
    monkeypatch.setattr("benchmarks.trio.times.TURNS", ways)
    for at_once, dtype in (("4", "float32"), ("1", "float32"), ("1", "bfloat16"), ("4", "float32")):
        assert call(linked, "time", "--links", "4-0", "--rounds", "1", "--at-once", at_once, "--dtype", dtype) == 0
    cells = [(1, "float32"), (1, "bfloat16"), (4, "float32")]
    times = [(one["way"], one["batch"], one["dtype"]) for one in recorded(linked)["time"]]
    assert times == [(way, *cell) for cell in cells for way in ways]


def test_the_outer_stage_has_the_loss_of_an_audit(linked):
    """Latents under the gold message, in the prompts as they are: neither cache nor common beginning changes them."""
    system = load_links(load_agents(linked, "large", "small"), linked / "links/large-small/4-0")
    rows = questions("train", 5, 3, ["known"])
    reader, solver = system.agents["reader"], system.agents["solver"]
    *_, final = system.pattern.visits(1)
    opening = Opening.of_ids(solver, system.prefix_ids(final, rows))
    assert opening.length > 100
    for turn in system.walk(rows, 1):
        if turn.visit.final:
            assert (turn.prompt.mask == 0).any()
            wanted = sum(gold_nll(solver, turn.prompt, [f" {row['answer']}" for row in rows]))
            turn.message = [""] * len(rows)
        else:
            said = speak(reader, utterances(system, "reader", rows, 1, max_tokens=3))
            turn.message = Latents(run_link(system.inner_links["reader"], said.hidden).view(3, 3, -1))
    thoughts = Thoughts(system, rows, 3, linked / "links/large-small/pairs")
    tokens = sum(len(ids) - 1 for ids in target_tokens(solver, [f" {row['answer']}" for row in rows]))
    assert loss(system, thoughts, opening, rows).item() * tokens == pytest.approx(wanted, rel=1e-5)


def test_an_agent_that_remembers_answers_as_one_that_reads_all(linked):
    folder, found, fed = linked / "links/large-small/4-0", [], []
    for kind in (Agent, Rereader):
        system = load_links(load_agents(linked, "large", "small", kind), folder)
        if kind is Rereader:
            system.agents["reader"].decoder.register_forward_pre_hook(count_columns(fed), with_kwargs=True)
        found.append([measure(system, 7, 1, steps, 3, ["text"]) for steps in (1, 3)])
    for plain, remembered in zip(*([*one[0], *one[1]] for one in found), strict=True):
        assert plain["correct"] == remembered["correct"]
        assert plain["nll"] == pytest.approx(remembered["nll"], abs=2e-3)
    assert sum(columns > 1 for columns in fed) == 2 + 2 * 2  # what all begin with, and the rest: to think, and per text


def count_columns(fed):
    def hook(module, arguments, keywords):
        fed.append(keywords["inputs_embeds"].shape[1])

    return hook


@pytest.fixture(scope="module")
def shipped(linked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    assert call(linked, "ship", "--links", "4-1", "--out", str(folder)) == 0
    return folder


def test_shipped_links_run_with_a_table_and_a_verdict(linked, shipped, capsys):
    size = sum(path.stat().st_size for path in (linked / "links/large-small/4-1").rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in shipped.rglob("*.safetensors")) < 0.6 * size
    options = ("--links", str(shipped), "--questions", "7", "--latents", "2", "--tokens", "2")
    assert demo([str(linked), *options]) == 0
    printed = capsys.readouterr().out
    assert "large reads, small solves: 7 questions of seed 3" in printed
    assert [line.split()[0] for line in printed.splitlines() if "[" in line][:4] == [*DEMO_NAMES.values()]
    assert "\nVerdict: cannot be told with 7 questions (" in printed
    assert "Whether text answers more of them than latents cannot be told" in printed
    assert demo([str(linked), *options[:2], "--questions", "6"]) == 2
    assert "6 are too few" in capsys.readouterr().err


def test_the_demo_names_what_is_missing_or_other(linked, shipped, tmp_path, capsys):
    assert demo([str(tmp_path), "--links", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'record.json'}: no record there, so these are no shipped links\n"
    )
    assert demo([str(tmp_path), "--links", str(shipped)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path / 'large/model.safetensors'}: no model there; the reader is None\n"
    for name in ("large", "small"):
        shutil.copytree(linked / name, tmp_path / name)
    with (tmp_path / "small/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert demo([str(tmp_path), "--links", str(shipped)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'small/model.safetensors'}: its SHA-256 is ")
    assert error.count("\n") == 1
    assert models_of(tmp_path, shipped, any_weights=True) == {"reader": "large", "solver": "small"}
    for name in ("large", "small"):
        shutil.rmtree(tmp_path / name)
    shutil.copytree(linked / "small", tmp_path / "large")
    shutil.copytree(linked / "large", tmp_path / "small")
    assert demo([str(tmp_path), "--links", str(shipped), "--any-weights"]) == 2
    assert "from 32 to 32 features, the models need 40 to 40" in capsys.readouterr().err


def test_what_is_shipped_is_small_and_of_the_models_of_the_record():
    measured = json.loads(RECORD.read_text())["qwen-smollm2"]
    kept = json.loads((EXAMPLE / "record.json").read_text())
    assert {model["folder"]: model["sha256"] for model in kept["models"].values()} == measured["sha256"]
    assert kept["links"] in measured["links"]
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*") if path.is_file()) <= 12e6
    widths = {name: FusedRecursiveLink.from_pretrained(EXAMPLE / name).config for name in ("inner", "outer")}
    assert [(one.in_features, one.out_features) for one in widths.values()] == [(896, 896), (896, 576)]


def test_what_several_add_at_once_is_all_there(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.trio.record.origin", lambda: time.sleep(0.01) or {})
    path = tmp_path / "record.json"

    def add(number):
        change(path, "a-b", lambda mine: mine["audit"].append({"number": number}))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(16)))
    assert sorted(one["number"] for one in json.loads(path.read_text())["a-b"]["audit"]) == list(range(16))


def test_several_seeds_widen_an_interval_by_what_they_differ():
    values = [[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]]
    mean, low, high = crossed(values)
    seeds, questions_ = 0.5 / 2, statistics.variance([0.5, 1.5, 2.5, 3.5]) / 4
    freedom = (seeds + questions_) ** 2 / (seeds**2 / 1 + questions_**2 / 3)
    half = student(1.959964, freedom) * math.sqrt(seeds + questions_)
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert crossed([[0.5, 0.5], [0.5, 0.5]]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"two seeds and two questions or more, got \[2, 3\]"):
        crossed([[1.0, 2.0], [1.0, 2.0, 3.0]])


def test_the_interval_over_seeds_and_questions_holds_what_it_says():
    rng, missed = random.Random(0), 0
    for _ in range(400):
        seeds, asked = [rng.gauss(0, 0.1) for _ in range(5)], [rng.gauss(0, 0.5) for _ in range(20)]
        _, low, high = crossed([[seed + one + rng.gauss(0, 0.3) for one in asked] for seed in seeds])
        missed += not low <= 0 <= high
    assert missed <= 32  # 20 are expected; more than 32 has a chance below one in 200


def audited(arm, steps, tokens, right, links="9-0", count=8, seed=2):
    correct, nll = [n < right for n in range(count)], [8.0 - right] * count
    asked = {"arm": arm, "steps": steps, "tokens": tokens, "hops": 1, "links": links, "seed": seed}
    return {**asked, "correct": correct, "nll": nll}


def timed(way, seconds):
    span = [seconds, seconds]
    measured = {"seconds": seconds, "range": span, "reader seconds": seconds, "reader range": span}
    return {"way": way, "batch": 1, "dtype": "float32", "questions": 4, "tokens": 9.0, **measured}


def test_page(tmp_path, capsys):
    audits = [audited("text", 0, 8, 7), audited("trained", 8, 0, 4), audited("shuffled", 8, 0, 0)]
    audits += [audited("trained", 8, 0, 8, links="9-0", seed=1), audited("text", 0, 8, 7, links="9-1")]
    audits += [audited("trained", 1, 0, right, links=f"9-{seed}-task") for seed, right in enumerate((4, 6))]
    times = [timed("text, 32 tokens", 2.0), timed("latents, m = 8", 0.5)]
    times += [timed("text, 1 token", 0.4), timed("latents, m = 1", 0.4), timed("text, 8 tokens", 0.45)]
    links = [{"links": f"9-{seed}", "held out": {"known": {"inner cosine": 0.25 + seed / 2}}} for seed in (0, 1)]
    links.append({"links": "9-0-task", "steps": 5, "questions": 6, "validation": [2.0, 0.996]})
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"a-b": {"links": links, "audit": audits, "time": times}}))
    assert main(["models", str(path), "page", "a", "b"]) == 0
    lines = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert ["9 lists", "2", "known", "0.50"] in lines
    assert ["9-0-task", "5", "6", "2.00, 1.00"] in lines
    text, latents, task, shuffled = (line for line in lines if line[3:4] == ["8"])
    assert text[:4] == ["text, 8 tokens", "", "1", "8"]
    assert text[4].startswith("0.88 [")
    assert text[5:8] == ["1.00", "0.75", "1.00"]
    assert latents[:4] == ["latents, m = 8", "9 lists", "1", "8"]
    assert latents[4].startswith("0.50 [")
    assert latents[8].startswith("-0.38 [")
    assert latents[8].endswith(", p = 0.25")
    assert latents[-1] == "+3.00 [+3.00, +3.00]"
    assert shuffled[8].endswith("p = 0.016")
    assert task[:4] == ["latents, m = 1", "9 lists, then the task", "2", "8"]
    assert task[5:8] == ["0.62", "0.62", "3.00"]
    mean, low, high = crossed([[float(n < right) - (n < 7) for n in range(8)] for right in (4, 6)], 2.2414)
    assert task[8] == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    assert ["latents, m = 1", "9 lists, then the task", "0.50, 0.75", "4.00, 2.00"] in lines
    half = next(line for line in lines if line[2:3] == ["8"])
    assert half[:3] == ["latents, m = 8", "9 lists", "8"]
    assert [cell.split(" ")[0] for cell in half[3:]] == ["+0.50", "-0.50", "-0.25"]
    turn = next(line for line in lines if line[:3] == ["float32", "1", "latents, m = 8"] and len(line) == 9)
    assert turn[-5:] == ["0.50 [0.50, 0.50]", "0.50 [0.50, 0.50]", "0.25", "0.10", "0.06"]
    assert lines[-2][:6] == ["1", "text, 8 tokens", "0.45", "", "", "8"]
    assert lines[-1][:6] == ["1", "latents, m = 8", "0.50", "9 lists", "1", "8"]
    assert lines[-1][6].startswith("0.50 [")
    assert lines[-1][7] == "none"  # eight questions do not show that the faster text answers more
    assert main(["models", str(path), "page", "b", "a"]) == 2
    assert "nothing of b-a" in capsys.readouterr().err


@pytest.mark.parametrize("pair", [pair for pair in json.loads(RECORD.read_text()) if pair != "made"])
def test_the_evidence_shows_what_the_record_holds(pair, capsys):
    assert main(["models", str(RECORD), "page", *pair.split("-")]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    shown = (ROOT / "docs/evidence.md").read_text(encoding="utf-8").replace("−", "-").splitlines()
    assert printed
    assert [line for line in printed if line not in shown] == []


def test_questions_of_other_tasks_and_hops_have_lines_of_their_own():
    first = audited("trained", 8, 0, 4)
    rows = rows_of({"audit": [first, {**first, "task": "gym"}, {**first, "hops": 2}, {**first, "task": "notes"}]})
    assert [row.message for row in rows] == ["latents, m = 8", "latents, m = 8, 2 hops", "latents, m = 8, gym"]


def test_a_faster_text_that_is_shown_to_answer_more_beats_latents():
    audits = [audited("text", 0, 8, 31, count=32), audited("trained", 8, 0, 12, count=32)]
    audits += [audited("trained", 1, 0, 12, count=32), audited("text", 0, 1, 14, count=32)]
    audits += [audited("trained", 8, 0, 8, links="9-0-task", count=32), audited("trained", 1, 0, 8, count=8)]
    times = [timed("text, 8 tokens", 0.6), timed("text, 1 token", 0.2), timed("latents, m = 8", 0.7)]
    times += [timed("latents, m = 1", 0.3), timed("latents, m = 32", 0.9), {**timed("text, 8 tokens", 0.1), "batch": 4}]
    found = frontier.ways(rows_of({"audit": audits}), times)
    named = {way.message: frontier.beaten(way, found) for way in found if way.latent}
    assert [way.message for way in found[:4]] == ["text, 1 token", "latents, m = 1", "text, 8 tokens", "latents, m = 8"]
    assert named["latents, m = 1"] is None
    assert named["latents, m = 8"] == found[2]
    record = {"qwen-smollm2": {"audit": audits, "time": times}}
    assert on_the_frontier(record).verdict == "**in part**: 1 of 2"
    assert "1 at once: text, 1 token 0.44 in 0.20 s, latents, m = 1 0.38 in 0.30 s" in on_the_frontier(record).measured
    assert on_the_frontier({}) is None


def short(words, seed, count):
    from recmas.lab.copies import copies

    return copies(words, seed, count, length=3)


def test_times_are_medians_of_turns():
    def answer(rows, **options):
        asked.append(options)
        answers = Answers(Answer(text_tokens={"reader": 5}) for _ in rows)
        answers.seconds["round 1, reader"] = 1.0
        return answers

    settings = {"reader": SimpleNamespace(decoding=Decoding())}
    asked = []
    ticks = itertools.accumulate(itertools.cycle([0.0, 2.0]))
    found = list(turns(SimpleNamespace(answer=answer, settings=settings), 4, 2, 3, clock=lambda: next(ticks)))
    assert len(asked) == 4 * len(TURNS)
    assert [options.get("latent_steps") for options in asked[: len(TURNS)]] == [None, None, None, 32, 8, 1]
    assert {one["seconds"] for one in found} == {0.5}
    assert {one["tokens"] for one in found} == {5.0}


def test_a_missing_model_is_named(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "r.json"), "links", "a", "b"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'a'}: no model there\n"
