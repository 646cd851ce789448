"""system.json: a round trip, and one line for everything that can be wrong with it."""

from __future__ import annotations

import copy
import json
import re

import pytest

from recmas import Pattern
from recmas.config.system_json import AgentSpec, Decoding, Defaults, PromptSpec, SystemSpec, read_spec, write_spec

FULL = SystemSpec(
    Pattern((("a", "b"), ("c",)), combine="weighted", exchange="all"),
    {
        "a": AgentSpec("agents/a", PromptSpec("first", "later"), "bfloat16", "links/a", 4, False),
        "b": AgentSpec("org/model", PromptSpec(None, "ünïcode {{from:c}}"), system="Be brief."),
        "c": AgentSpec("agents/c", PromptSpec("only"), decoding=Decoding(7, 0.5, 0.9)),
    },
    {("a", "c"): "links/a-c", ("c", "b"): "links/c-b"},
    Defaults(2, 9),
)
SMALL = {
    "format": 1,
    "pattern": {"stages": [["a"], ["b"]]},
    "agents": {role: {"model": f"agents/{role}", "prompt": {"later": "x"}} for role in "ab"},
}


def test_round_trip(tmp_path):
    write_spec(tmp_path, FULL)
    assert read_spec(tmp_path) == FULL


def test_what_is_left_out_has_its_default(tmp_path):
    (tmp_path / "system.json").write_text(json.dumps(SMALL))
    spec = read_spec(tmp_path)
    assert spec.defaults == Defaults(1, 32)
    assert spec.outer_links == {}
    assert spec.agents["a"] == AgentSpec("agents/a", PromptSpec(None, "x"), "auto", None, None, True, None, Decoding())


def test_prompts_by_round():
    assert [PromptSpec("f", "l").at(round) for round in (1, 2, 3)] == ["f", "l", "l"]
    assert [PromptSpec("f").at(round) for round in (1, 2)] == ["f", "f"]
    assert [PromptSpec(None, "l").at(round) for round in (1, 2)] == ["l", "l"]


BROKEN = {
    "format": (2, "format: 2 is not 1"),
    "pattern": (None, "pattern: missing key"),
    "colour": ("red", "colour: unknown key"),
    "pattern.stages": ([["a"], "b"], "pattern.stages: 'b' is not a list"),
    "pattern.combine": ("median", "pattern: combine: 'median'"),
    "pattern.stages.0": (["b"], "pattern: stages: role 'b' occurs twice"),
    "agents.a.model": (3, "agents.a.model: 3 is not a string"),
    "agents.b": (None, "agents.b: missing key"),
    "agents.c": ({"model": "x", "prompt": {"later": "x"}}, "agents.c: unknown role, the pattern has a, b"),
    "agents.a.dtype": ("float8", "agents.a.dtype: 'float8' is not one of"),
    "agents.a.chat": ("yes", "agents.a.chat: 'yes' is not true or false"),
    "agents.a.latent_steps": (True, "agents.a.latent_steps: True is not an integer"),
    "agents.b.latent_steps": (-1, "agents.b.latent_steps: -1 is less than 0"),
    "agents.a.prompt": ({}, "agents.a.prompt: has neither first nor later"),
    "agents.a.prompt.middle": ("x", "agents.a.prompt.middle: unknown key"),
    "agents.a.decoding": ({"temperature": -1}, "agents.a.decoding: temperature: -1"),
    "agents.b.decoding": ({"max_new_tokens": "9"}, "agents.b.decoding.max_new_tokens: '9' is not an integer"),
    "outer_links": ({"a->z": "x"}, "outer_links.a->z: is not of the form source->target"),
    "defaults": ({"rounds": 0}, "defaults.rounds: 0 is less than 1"),
}


@pytest.mark.parametrize(("value", "message"), BROKEN.values(), ids=BROKEN)
def test_one_line_names_file_and_key(tmp_path, request, value, message):
    content = copy.deepcopy(SMALL)
    *path, last = request.node.callspec.id.split(".")
    place = content
    for name in path:
        place = place[name]
    place[int(last) if isinstance(place, list) else last] = value
    (tmp_path / "system.json").write_text(json.dumps(content))
    start = re.escape(f"{tmp_path / 'system.json'}: {message}")
    with pytest.raises(ValueError, match=f"^{start}[^\n]*$"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "cannot be read as JSON"), ("[]", r"the file: \[\] is not an object")],
)
def test_no_json(tmp_path, content, message):
    if content is not None:
        (tmp_path / "system.json").write_text(content)
    with pytest.raises(ValueError, match=f"system.json: {message}"):
        read_spec(tmp_path)
