"""Rows that would end a run halfway, or teach nothing, are named before the first step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recmas.agents.model import PromptTooLongError
from recmas.config.pattern import Pattern
from recmas.config.system_json import PromptSpec
from recmas.training import (
    InnerConfig,
    OuterConfig,
    WarmupConfig,
    inner_loss,
    outer_loss,
    train_inner,
    train_outer,
    train_warmup,
    warmup_loss,
)
from tests.runtime.training.by_hand import ROWS, build

SHORT = {"steps": 1, "batch_size": 1, "rounds": 2}
STAGES = {
    "inner": (train_inner, InnerConfig(**SHORT), lambda *s: inner_loss(s[0], "critic", s[1], 2)),
    "warmup": (train_warmup, WarmupConfig(**SHORT), lambda *s: warmup_loss(s[0], ("critic", "solver"), s[1], 2)),
    "outer": (train_outer, OuterConfig(**SHORT), lambda *s: outer_loss(s[0], s[1], 2)),
    "outer, rollouts": (
        train_outer,
        OuterConfig(**SHORT, latents="rollout"),
        lambda *s: outer_loss(s[0], s[1], 2, latents="rollout"),
    ),
}


@pytest.fixture(params=STAGES)
def stage(request):
    return STAGES[request.param]


def refused(system, stage, rows, folder, **others):
    train, config, _ = stage
    with pytest.raises(ValueError, match="row") as raised:
        train(system, rows, config, output=folder, progress=False, **others)
    assert "\n" not in str(raised.value)
    assert not folder.exists()
    return str(raised.value)


def test_exactly_what_the_agents_refuse_themselves_is_refused_before_the_first_step(stage, tmp_path):
    """Of all contexts that the critic may have, those are refused in which a forward would fail."""
    train, config, loss = stage
    system, rows = build(), [ROWS[0]] * 3 + [ROWS[1] | {"sheet": "red " * 9}]
    shape = system.agents["critic"].model.config
    told = []
    for context in range(1, 40):
        shape.max_position_embeddings = context
        try:
            for row in rows:
                loss(system, [row])
        except PromptTooLongError:
            message = refused(system, stage, rows, tmp_path / "out")
            assert "agent 'critic': a prompt of " in message
            assert message.endswith(f"exceeds its context of {context}")
            told.append(context)
        else:
            break
    assert told == list(range(1, context))
    assert 2 < context < 39
    train(system, rows, config, progress=False)


def test_the_row_is_named_in_the_validation_rows_too(stage, tmp_path):
    system, long = build(), ROWS[1] | {"sheet": "red " * 70, "question": "red " * 70}
    for rows, others in (([ROWS[0]] * 20 + [long, ROWS[0]], {}), (ROWS, {"validation": [ROWS[0]] * 20 + [long]})):
        message = refused(system, stage, rows, tmp_path / "out", **others)
        assert message.startswith("row 20: agent '")


@pytest.mark.parametrize("latents", ["forced", "rollout"])
def test_answers_of_all_rounds_that_count_must_fit(latents, tmp_path):
    """Here that of round 1, in which the last agent would else say two tokens or think two steps."""
    system, rows = build(), [ROWS[0] | {"targets": ROWS[0]["targets"] | {"solver": ["1 " * 20, "0"]}}]
    system.agents["solver"].model.config.max_position_embeddings = 24
    config = OuterConfig(**SHORT, latents=latents, latent_steps=2)
    assert train_outer(system, rows, config, progress=False).steps == 1
    weights = (0.5, 1.0)
    with pytest.raises(PromptTooLongError):
        outer_loss(system, rows, 2, latent_steps=2, latents=latents, round_weights=weights)
    message = refused(system, (train_outer, replace(config, round_weights=weights), None), rows, tmp_path / "out")
    assert message.startswith("row 0: agent 'solver': a prompt of ")


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_target_is_named(stage, tmp_path, empty):
    rows = [ROWS[0]] * 20 + [ROWS[1] | {"targets": ROWS[1]["targets"] | {"solver": ["0", empty]}}]
    if stage[0] is train_warmup:  # the solver's outer link goes to the planner
        stage = (train_warmup, replace(stage[1], rounds=(1, 2)), None)
    message = refused(build(), stage, rows, tmp_path / "out")
    assert message == "row 20: the target of agent 'solver' in round 2 is empty"


def test_a_text_without_tokens_is_named(tmp_path):
    system = build()
    stage = (train_inner, InnerConfig(**SHORT), None)
    assert refused(system, stage, [{"text": "red"}, {"text": " "}], tmp_path / "out").startswith("row 1: the text ")


def test_messages_that_meet_in_one_slot_are_counted_before_the_first_step(tmp_path):
    prompts = {
        "planner": PromptSpec("<bos> {{question}} <out>"),
        "critic": PromptSpec("<bos> {{question}} <out>"),
        "solver": PromptSpec("<bos> {{from:planner,critic}} <out>"),
    }
    system = build(Pattern((("planner", "critic"), ("solver",)), combine="mean"), prompts, rounds=1)
    even = {"planner": "red blue", "critic": "1 cat", "solver": "dog"}
    rows = [{"question": "2", "targets": even}] * 3 + [{"question": "2", "targets": even | {"critic": ""}}]
    rows[3]["targets"]["critic"] = "cat"
    config = OuterConfig(steps=1, batch_size=1, rounds=1, latent_steps=3)
    message = refused(system, (train_outer, config, None), rows, tmp_path / "out")
    assert message == (
        "row 3: agent 'solver': {{from:planner,critic}} needs equally many latents of each, "
        "but has 3 of 'planner', 2 of 'critic'"
    )
    assert train_outer(system, rows, replace(config, latent_steps=2), progress=False).steps == 1
