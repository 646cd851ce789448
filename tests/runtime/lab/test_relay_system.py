"""The shipped lab answers, its controls do not, and a lab can be built from nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recmas import RecursiveMAS
from recmas.config.system_json import read_spec
from recmas.lab.build import build
from recmas.lab.grid import CONTROLS, Measurement, grid
from recmas.lab.tasks import RELAY
from recmas.lab.world import ROLES, questions
from tests.runtime.lab.few_steps import few_steps

SHIPPED = Path(__file__).parents[3] / "examples" / "relay"
FRESH = 1001
"""Seed of worlds that no other command uses by default."""


@pytest.fixture(scope="module")
def lab() -> RecursiveMAS:
    return RecursiveMAS.from_pretrained(SHIPPED)


def accuracy(cells: list[Measurement]) -> dict[tuple[str, int, int], float]:
    return {(cell.method, cell.hops, cell.rounds): cell.accuracy for cell in cells}


def test_it_is_small_and_says_where_it_comes_from() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 6_000_000
    record = json.loads((SHIPPED / "lab.json").read_text())
    assert {"seed", "link_seed", "validation_seed", "commit", "versions", "settings"} <= record.keys()
    spec = read_spec(SHIPPED)
    assert set(spec.agents) == set(ROLES)
    assert not any(agent.chat for agent in spec.agents.values())


def test_latents_answer_fresh_questions_and_controls_do_not(lab: RecursiveMAS) -> None:
    """64 questions of one hop: 0.9 is far below what the lab reaches and nine standard deviations above chance."""
    reached = accuracy(grid(lab, FRESH, 64, hops=[1], rounds=[1]))
    assert reached["latent", 1, 1] >= 0.9
    assert reached["text", 1, 1] >= 0.9
    for control in CONTROLS:
        assert reached[control, 1, 0 if control == "solver alone" else 1] <= 0.4


def test_two_hops_need_two_rounds(lab: RecursiveMAS) -> None:
    reached = accuracy(grid(lab, FRESH, 64, hops=[2], rounds=[1, 2, 3], methods=["latent"]))
    assert reached["latent", 2, 1] <= 0.4
    assert reached["latent", 2, 2] >= 0.8
    assert reached["latent", 2, 3] >= 0.8


def test_latents_and_text_say_the_same_and_cost_what_the_messages_cost(lab: RecursiveMAS) -> None:
    rows = questions("test", FRESH, [1], 16)
    latent, text = (lab.answer(rows, mode=mode, rounds=2) for mode in ("latent", "text"))
    agreed = sum(a.text == b.text for a, b in zip(latent, text, strict=True))
    assert agreed >= 15
    assert latent[0].latent_steps == {"planner": 4, "critic": 4, "solver": 3}
    assert set(latent[0].text_tokens) == {"solver"}
    assert set(text[0].text_tokens) == set(ROLES)
    assert text[0].latent_steps == {}


def test_wrong_methods_and_counts_are_refused(lab: RecursiveMAS) -> None:
    with pytest.raises(ValueError, match="'telepathy' is not one of latent, text"):
        grid(lab, FRESH, 8, methods=["telepathy"])
    with pytest.raises(ValueError, match="count: 1 is too few"):
        grid(lab, FRESH, 1)


def test_a_lab_is_built_from_nothing(tmp_path: Path) -> None:
    """A few steps of every stage: what is written is an ordinary system, and its record says how it was made."""
    settings = few_steps(RELAY)
    record = build(tmp_path / "lab", seed=3, jobs=1, settings=settings, progress=False)
    assert record == json.loads((tmp_path / "lab" / "lab.json").read_text())
    assert record["seed"] == record["link_seed"] == 3
    assert set(record["links"]["validation"]) == {"warmup", "one round", "all rounds"}
    built = RecursiveMAS.from_pretrained(tmp_path / "lab")
    rows = [json.loads(line) for line in (tmp_path / "lab" / "questions.jsonl").read_text().splitlines()]
    assert len(built.answer(rows[:2])) == 2
    stored = (tmp_path / "lab" / "links").rglob("*.safetensors")
    assert {tensor.dtype for path in stored for tensor in _tensors(path)} == {torch.float16}

    again = build(tmp_path / "again", 3, link_seed=4, agents=tmp_path / "lab", settings=settings, progress=False)
    assert again["pretraining"] == record["pretraining"]
    relinked = RecursiveMAS.from_pretrained(tmp_path / "again")
    for role in ROLES:
        ours, theirs = (system.agents[role].model.state_dict() for system in (built, relinked))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _tensors(path: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(path).values())
