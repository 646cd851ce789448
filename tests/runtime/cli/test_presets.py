"""`recmas init --pattern moa|textgrad|looplm`: systems that exchange texts, and a looped model, on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recmas import RecursiveMAS
from recmas.agents.agent import Agent
from recmas.cli import main
from recmas.cli.init import models_by_role
from recmas.config.pattern import Pattern
from recmas.config.presets import PRESETS
from recmas.config.system_json import read_spec
from recmas.engine.messages import Latents
from recmas.prompts.template import Template
from tests.runtime.tiny import tiny_model, tiny_tokenizer

ROWS = [{"question": "fox or dog?", "answer": "x"}, {"question": "lazy?", "answer": "y"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose context holds the longest of the prompts, and questions."""
    folder = tmp_path_factory.mktemp("presets")
    model = tiny_model("llama")
    model.config.max_position_embeddings = 2048
    Agent(model, tiny_tokenizer(), name="one").save_pretrained(folder / "one")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.mark.parametrize(("name", "rounds", "visits"), [("moa", 1, 7), ("textgrad", 3, 6)])
def test_a_preset_answers_in_texts_and_has_no_links(name, rounds, visits, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "system", "--pattern", name, "--models", f"*={home / 'one'}"]) == 0
    assert "no links" in capsys.readouterr().out
    spec = read_spec("system")
    assert (spec.defaults.rounds, spec.outer_links) == (rounds, {})
    assert all(agent.inner_link is None for agent in spec.agents.values())
    arguments = ["--mode", "text", "--max-new-tokens", "5"]
    assert main(["run", "system", "--questions", str(home / "rows.jsonl"), *arguments, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert len(made["seconds"]) == visits
    for answer in made["answers"]:
        assert answer["latent_steps"] == {}
        assert set(answer["text_tokens"]) == set(spec.pattern.roles)
        assert all(1 <= count <= 5 * rounds for count in answer["text_tokens"].values())
    evaluated = ["eval", "system", "--data", str(home / "rows.jsonl"), *arguments, "--json"]
    assert main(evaluated) == 0
    assert main(["run", "system", "--question", "fox?"]) == 2  # latents need links
    assert "needs outer links that the system lacks" in capsys.readouterr().err


def test_a_looped_model_reads_its_own_latents(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "system", "--pattern", "looplm", "--models", f"*={home / 'one'}", "--latent-steps", "2"]) == 0
    assert "2 untrained links" in (said := capsys.readouterr().out)
    assert "recmas train inner" in said
    mas = RecursiveMAS.from_pretrained("system")
    assert list(mas.outer_links) == [("thinker", "thinker")]
    answers = mas.answer(ROWS, max_new_tokens=3)
    assert [answer.latent_steps for answer in answers] == [{"thinker": 4}] * 2  # of three rounds the last one writes
    other = RecursiveMAS.create(
        {"thinker": mas.agents["thinker"]}, mas.pattern, prompts=PRESETS["looplm"].prompts, seed=9
    )
    _, again = mas.pattern.visits(2)
    heard = [one.prompt(again, ROWS, {"thinker": Latents(torch.ones(2, 2, 32))}).embeds for one in (mas, other)]
    assert (heard[0] != heard[1]).any(dim=2).sum(dim=1).tolist() == [2, 2]  # the slot holds what the link makes of them


def test_every_agent_reads_what_its_prompt_names(home):
    """What each agent wrote stands in the prompts of those that read it."""
    agent = Agent.from_pretrained(home / "one", name="one")
    for preset in PRESETS.values():
        mas = RecursiveMAS.create(
            dict.fromkeys(preset.pattern.roles, agent), preset.pattern, links=False, prompts=preset.prompts
        )
        read: dict[tuple[str, int], list[str]] = {}
        for turn in mas.walk(ROWS[:1], 2):
            visit = turn.visit
            turn.message = [f"{visit.role} said {visit.round}"]
            texts = {
                sender: f"{sender} said {at}" for sender, at in zip(visit.senders, visit.sender_rounds, strict=True)
            }
            segments = mas.segments(visit, ROWS[0], texts)
            read[visit.role, visit.round] = [agent.text(part) for part in segments if isinstance(part, list)]
            shown = "".join(read[visit.role, visit.round])
            assert "fox or dog?" in shown
            assert all(text in shown for text in texts.values())
            assert turn.prompt.mask.sum() == sum(len(part) for part in segments)
        assert len(read) == 2 * len(preset.pattern.roles)


def test_layers_of_a_mixture_and_steps_of_textual_gradients():
    moa, textgrad = PRESETS["moa"], PRESETS["textgrad"]
    assert [len(stage) for stage in moa.pattern.stages] == [3, 3, 1]
    for role in moa.pattern.stages[1]:
        assert Template(moa.prompts[role].at(1)).senders == moa.pattern.stages[0]
    assert Template(textgrad.prompts["evaluator"].at(1)).senders == ()
    assert Template(textgrad.prompts["evaluator"].at(2)).senders == ("optimizer",)


def test_a_star_stands_for_names_and_gives_way_to_a_whole_one():
    pattern = Pattern((("expert1", "expert2"), ("writer",)))
    given = {"writer": "w", "expert2": "two", "expert*": "e"}
    assert models_by_role(given, pattern) == {"expert1": "e", "expert2": "two", "writer": "w"}
    assert models_by_role({"*": "all"}, pattern) == dict.fromkeys(pattern.roles, "all")
    with pytest.raises(ValueError, match=r"--models: unknown role 'poet\*'; the pattern has expert1, expert2, writer"):
        models_by_role({"poet*": "x"}, pattern)


@pytest.mark.parametrize("option", ["--combine=mean", "--exchange=all"])
def test_a_presets_prompts_fit_its_own_slots_only(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "system", "--pattern", "moa", "--models", "*=one", option]) == 2
    assert "leave --combine and --exchange out" in capsys.readouterr().err
    assert not (tmp_path / "system").exists()
