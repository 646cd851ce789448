"""The paper's claims on the relay lab: what each step keeps, and verdicts that follow from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.relay import ablations, auto, gradients, loop, steps
from benchmarks.relay.__main__ import main
from benchmarks.relay.asked import RELAY, relay
from benchmarks.report import relay as judges
from benchmarks.report.__main__ import ROOT
from benchmarks.report.claims import FAILS, HOLDS, UNTOLD
from benchmarks.report.stored import RESULTS
from recmas.lab.world import questions


def made(path: Path, *arguments: str) -> dict[str, Any]:
    assert main([arguments[0], str(path), *arguments[1:]]) == 0
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_table_2_keeps_every_answer_and_every_turn(tmp_path: Path):
    record = made(tmp_path / "record.json", "table2", "--questions", "6", "--turns", "2")
    assert [(cell["mode"], cell["rounds"]) for cell in record["cells"]] == [
        (mode, rounds) for rounds in (1, 2, 3) for mode in ("text", "latent")
    ]
    for cell in record["cells"]:
        assert len(cell["seconds"]) == 2
        assert len(cell["correct"]) == 6
        assert (cell["latent_steps"] == 0) is (cell["mode"] == "text")
    text, latent = record["cells"][-2:]
    assert sum(text["correct"]) == sum(latent["correct"]) == 6  # three rounds are enough
    assert text["text_tokens"] > 3 * latent["text_tokens"]
    for judge in (judges.grows_with_rounds, judges.more_accurate, judges.faster, judges.fewer_tokens):
        assert judge(record).verdict


def test_a_looped_agent_is_asked_beside_the_system(tmp_path: Path):
    record = made(tmp_path / "record.json", "loop", "--questions", "24")
    assert [(cell["system"], cell["rounds"]) for cell in record["cells"]] == [
        (name, rounds) for name in ("system", "looped") for rounds in (1, 2, 3)
    ]
    assert judges.beats_the_loop(record).verdict.startswith(("**in part**", HOLDS))
    assert sum(record["cells"][2]["correct"]) >= 22 > sum(record["cells"][5]["correct"])
    one = loop.looped(relay())
    answers = one.answer(questions("test", 1, (1,), 2), rounds=3)
    assert [answer.latent_steps for answer in answers] == [{"solver": 6}] * 2
    assert one.template("solver", 1).fields == ("solver_sheet", "question")


def test_latent_steps_settling_and_gradients_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "STEPS", (0, 16, 80))
    record = made(tmp_path / "steps.json", "steps", "--questions", "4")
    assert [cell["steps"] for cell in record["cells"]] == ["own", 0, 16, 80]
    assert sum(record["cells"][0]["correct"]) == 4
    assert judges.grows_with_steps(record).verdict == FAILS
    record = made(tmp_path / "auto.json", "auto", "--questions", "6", "--turns", "1", "--split", "validation")
    assert len(record["cells"]) == len(auto.WAYS)
    for cell in record["cells"]:
        assert all(2 <= took <= 4 for took in cell["took"]) if cell["settle"] else set(cell["took"]) == {cell["rounds"]}
    assert judges.settles(record).verdict
    monkeypatch.setattr(gradients, "SEEDS", (1,))
    record = made(tmp_path / "gradients.json", "gradients", "--questions", "2")
    assert [cell["links"] for cell in record["cells"]] == list(gradients.KINDS)
    for cell in record["cells"]:
        assert [len(by_round) for by_round in cell["gains"]] == [2 * gradients.DIRECTIONS] * (gradients.ROUNDS - 1)
    assert judges.agents_lose_gradients_in_text(record).verdict == HOLDS


def test_link_seeds_gather_in_one_record_and_never_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, small = tmp_path / "depth.json", ("depth", "--questions", "4", "--scale", "0.001")
    assert len(made(path, *small, "--link-seed", "1")["cells"]) == 12
    twice = made(path, *small, "--link-seed", "2")
    assert [cell["link_seed"] for cell in twice["cells"]] == [1] * 12 + [2] * 12
    assert main(["depth", str(path), "--questions", "5", "--scale", "0.001", "--link-seed", "3"]) == 2
    assert "other questions or training steps" in capsys.readouterr().err
    assert json.loads(path.read_text()) == twice


def test_kinds_of_links_gather_in_one_record_and_are_made_anew_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, small = tmp_path / "ablations.json", ("ablations", "--questions", "4", "--scale", "0.001")
    made(path, *small, "--links", "1 layer,residual + 3 layers")
    record = made(path, *small, "--links", "residual + 3 layers")
    first, third = ablations.TRAINED * 2, [cell["links"] for cell in record["cells"]]
    assert third == ["1 layer"] * 2 + ["residual + 3 layers"] * 2
    assert tuple(cell["trained"] for cell in record["cells"]) == first
    assert [len(cell["correct"]) for cell in record["cells"]] == [4] * 4
    assert main([small[0], str(path), *small[1:], "--links", "4 layers"]) == 2
    assert capsys.readouterr().err.startswith("error: links: '4 layers' is none of 1 layer, residual + 1 layer, ")


@pytest.mark.parametrize("name", ablations.KINDS)
def test_a_kind_of_links_computes_what_it_is_called(name: str):
    """By its own parameters, in plain torch; only links of two layers have kernels."""
    kind, shipped = ablations.KINDS[name], relay()
    system = ablations.linked(shipped.agents, kind, 3)
    for link in (system.inner_links["critic"], system.outer_links["critic", "solver"]):
        x = torch.randn(5, 160, generator=torch.Generator().manual_seed(1))
        parts = dict(link.named_parameters())
        assert (
            sum(len(part.shape) == 2 and not key.startswith("residual") for key, part in parts.items()) == kind.layers
        )
        outer = link.config.kind == "outer"
        assert ("residual_proj.weight" in parts) is (kind.residual and outer)
        first, last = ("ln_source", "ln_target") if outer else ("pre_ln", "post_ln")
        z = F.layer_norm(x, (160,), parts[f"{first}.weight"], parts[f"{first}.bias"])
        for key in ("proj1", "proj1.0", "proj1.2", "proj2"):
            if f"{key}.weight" in parts:
                z = F.gelu(z) if key not in ("proj1", "proj1.0") else z
                z = F.linear(z, parts[f"{key}.weight"], parts[f"{key}.bias"])
        if kind.residual:
            z = z + (F.linear(x, parts["residual_proj.weight"], parts["residual_proj.bias"]) if outer else x)
        scale = parts[f"{last}.weight"]
        assert scale.unique().tolist() == pytest.approx(
            [shipped.agents["solver" if outer else "critic"].embedding_rms()]
        )
        torch.testing.assert_close(link(x), F.layer_norm(z, scale.shape, scale, parts[f"{last}.bias"]))


def test_too_few_questions_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["steps", str(tmp_path / "record.json"), "--questions", "1"]) == 2
    assert capsys.readouterr().err == "error: questions: 1 are too few, expected 2 or more\n"
    assert not (tmp_path / "record.json").exists()


def test_a_text_channels_jacobian_is_the_theorems():
    agent = relay().agents["planner"]
    channel = gradients.Worded(agent)
    h = torch.randn(agent.hidden_size, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.functional.jacobian(lambda row: channel(row[None])[0], h)
    read = agent.model.get_input_embeddings().weight.detach()
    write = agent.model.get_output_embeddings().weight.detach()
    p = (write @ h).softmax(0)
    torch.testing.assert_close(found, read.T @ (p.diag() - torch.outer(p, p)) @ write, rtol=1e-3, atol=1e-5)
    assert channel.entropy == pytest.approx(float(torch.special.entr(p).sum()), rel=1e-4)


def test_the_gain_of_a_round_is_that_of_its_jacobian(monkeypatch: pytest.MonkeyPatch):
    """By finite differences: how much a small change of what the planner sends moves what it sends a round later."""
    monkeypatch.setattr(gradients, "ROUNDS", 2)
    monkeypatch.setattr(gradients, "DIRECTIONS", 1)
    system, _ = gradients.linked(relay(), "identity", 1)
    rows = questions("test", 1, (4,), 1)

    def planner_of_round_2(changes: torch.Tensor) -> torch.Tensor:
        """By a row for each of these changes."""
        for turn in system.walk(rows * len(changes), 2):
            role = turn.visit.role
            turn.message = system.agents[role].think(
                turn.prompt, system.steps_by_role(None)[role], system.inner_links[role]
            )
            if role == "planner" and turn.visit.round == 2:
                return turn.message.states.flatten(1)
            if role == "planner":
                turn.message.states = turn.message.states + changes.view(-1, 2, 128)
        raise AssertionError

    small = 1e-2 * torch.eye(256)
    with torch.no_grad():
        still = planner_of_round_2(torch.zeros(1, 256))
        jacobian = (planner_of_round_2(small) - planner_of_round_2(-small)).T / 2e-2
    v = torch.randn((1, 2, 128), generator=torch.Generator().manual_seed(5)).flatten()
    assert still.norm() > 0
    ((gain,),) = gradients.round_gains(system, rows, 5)
    assert gain == pytest.approx(float((jacobian.T @ v).norm() / v.norm()), rel=0.05)


def share(count: int, of: int = 100) -> list[int]:
    return [1] * count + [0] * (of - count)


HUNDRED = {"questions": {"count": 100}}


def table2(latent: tuple[int, int, int], text: tuple[int, int, int], seconds: float = 1.0) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    for rounds in (1, 2, 3):
        for mode, right in (("text", text), ("latent", latent)):
            cost = {"seconds": [1.0 if mode == "text" else seconds] * 5, "latent_steps": 0.0}
            tokens = 10.0 * rounds if mode == "text" else 4.0
            way = {"link_seed": 1, "mode": mode, "rounds": rounds, "text_tokens": tokens}
            cells.append(way | {"correct": share(right[rounds - 1])} | cost)
    return {"cells": cells} | HUNDRED


def test_verdicts_on_table_2():
    good = table2((40, 70, 99), (20, 50, 80), seconds=0.5)
    for judge in (judges.grows_with_rounds, judges.more_accurate, judges.faster, judges.fewer_tokens):
        assert judge(good).verdict == HOLDS
    flat = table2((50, 50, 50), (50, 50, 50), seconds=1.5)
    for judge in (judges.grows_with_rounds, judges.more_accurate, judges.faster):
        assert judge(flat).verdict == FAILS
    assert "1 of 3" in judges.more_accurate(table2((40, 50, 50), (20, 50, 50))).verdict


def test_a_verdict_over_link_seeds_counts_their_differences():
    """Both seeds gain a question in ten; what one of them gains and the other loses is no gain."""

    def both(*latent: int) -> dict[str, Any]:
        made = [table2((right, 50, 50), (50, 50, 50)) for right in latent]
        cells = [{**cell, "link_seed": seed} for seed, one in enumerate(made) for cell in one["cells"]]
        return {"cells": cells} | HUNDRED

    alike, apart = (judges.more_accurate(both(*latent)) for latent in ((70, 71), (92, 48)))
    assert "1 of 3" in alike.verdict
    assert alike.measured.startswith("2 link seeds, 100 questions: latents minus text (97.5% each), r = 1: +0.205 [")
    assert apart.verdict == FAILS


def test_labs_of_one_link_seed_or_of_other_agents_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, change in (("twice", {}), ("other", {"link_seed": 2, "pretraining": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lab.json").write_text(json.dumps(json.loads((RELAY / "lab.json").read_text()) | change))
    for name, words in (("twice", "its link seed, 1, is another lab's, too"), ("other", "its agents are not those of")):
        assert main(["loop", str(tmp_path / "record.json"), "--labs", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()


def test_verdicts_on_depth_steps_and_gradients():
    def depth(deep: list[int], shallow: list[int]) -> dict[str, Any]:
        trained = {0: [10] * 3, 1: shallow, 2: [20] * 3, 3: deep}
        cells = [
            {"link_seed": seed, "trained": rounds, "rounds": asked, "correct": share(right[seed])}
            for rounds, right in trained.items()
            for asked in (1, 2, 3)
            for seed in range(3)
        ]
        return {"cells": cells}

    assert judges.deep_is_best(depth([90, 92, 91], [50, 52, 51])).verdict == HOLDS
    assert judges.deep_is_best(depth([90, 50, 20], [50, 52, 51])).verdict == FAILS

    def swept(none: int, few: int, many: int) -> dict[str, Any]:
        counts = {"own": 90, 0: none, 16: few, 80: many}
        cells = [{"link_seed": 1, "steps": steps, "correct": share(right)} for steps, right in counts.items()]
        return {"cells": cells} | HUNDRED

    assert judges.grows_with_steps(swept(10, 40, 80)).verdict == HOLDS
    assert "1 of 2" in judges.grows_with_steps(swept(10, 40, 40)).verdict
    assert judges.grows_with_steps(swept(40, 10, 10)).verdict == FAILS

    def gains(text: float, default: float) -> dict[str, Any]:
        cells = [{"links": "text", "gains": [[text] * 4], "entropy": {"a": 0.1}}]
        return {"cells": [*cells, {"links": "default", "gains": [[default] * 4]}]}

    assert judges.agents_keep_gradients(gains(1e-3, 0.9)).verdict == HOLDS
    assert judges.agents_keep_gradients(gains(1e-3, 0.1)).verdict == FAILS
    assert judges.agents_lose_gradients_in_text(gains(1e-3, 0.1)).verdict == HOLDS
    assert judges.agents_lose_gradients_in_text(gains(0.2, 0.1)).verdict == FAILS


def test_verdicts_on_kinds_of_links():
    def record(one: list[int], two: list[int], three: list[int]) -> dict[str, Any]:
        right = {"1 layer": one, "residual + 1 layer": [60, 62, 61], "2 layers": one, "residual + 2 layers": two}
        cells = [
            {"link_seed": seed, "links": name, "trained": "t", "correct": share(count)}
            for name, counts in {**right, "residual + 3 layers": three}.items()
            for seed, count in enumerate(counts)
        ]
        return {"cells": cells, "rounds": 3}

    best = record([40, 42, 41], [90, 91, 92], [90, 91, 91])
    assert judges.released_is_best(best).verdict == HOLDS
    assert judges.residual_helps(best).verdict == HOLDS
    assert judges.third_layer_helps(best).verdict == UNTOLD
    assert judges.third_layer_helps(record([40] * 3, [90, 91, 92], [50, 51, 52])).verdict == FAILS
    assert "t: 1 layer 0.410, residual + 1 layer 0.610, 2 layers 0.410, residual + 2 layers 0.910, residual + 3" in (
        judges.released_is_best(best).measured
    )
    worst = record([90, 92, 91], [10, 11, 12], [90, 91, 92])
    assert judges.released_is_best(worst).verdict == judges.residual_helps(worst).verdict == FAILS
    assert judges.third_layer_helps(worst).verdict == HOLDS
    assert "1 of 3" in judges.released_is_best(record([90, 92, 91], [80, 81, 82], [90, 90, 90])).verdict
    best["cells"][0]["link_seed"] = 7  # what would be compared is of other seeds
    with pytest.raises(ValueError, match="ablations: links of 'residual [+] 1 layer' lack link seed 7"):
        judges.released_is_best(best)


def test_the_page_shows_what_the_record_of_settling_holds():
    shown = (ROOT / "docs/how-to/ask.md").read_text(encoding="utf-8").splitlines()
    lines = list(auto.page(json.loads((RESULTS / "relay_auto.json").read_text())))
    assert len(lines) == 9
    assert [line for line in lines if line not in shown] == []


def test_a_verdict_on_settling():
    def asked(auto: list[int], seconds: float) -> dict[str, Any]:
        cost = {"link_seed": 1, "mode": "latent", "latent_steps": 1.0}
        fixed = [
            {**cost, "settle": None, "rounds": rounds, "correct": share(90), "took": [rounds], "seconds": [1.0] * 5}
            for rounds in (3, 4)
        ]
        own = {**cost, "settle": judges.SETTLED, "rounds": 4, "correct": auto, "took": [3], "seconds": [seconds] * 5}
        return {"cells": [*fixed, own]} | HUNDRED

    assert judges.settles(asked(share(90), 0.5)).verdict == HOLDS
    assert judges.settles(asked(share(50), 1.5)).verdict == FAILS
    assert "1 of 2" in judges.settles(asked(share(90), 1.5)).verdict


@pytest.mark.parametrize("step", sorted({step for _, _, step, _ in judges.CLAIMS}))
def test_the_committed_records_are_whole(step: str):
    record = json.loads((RESULTS / f"relay_{step}.json").read_text())
    if step != "gradients":
        assert len({cell["link_seed"] for cell in record["cells"]}) >= 5
        assert {len(cell["correct"]) for cell in record["cells"]} == {record["questions"]["count"]}
