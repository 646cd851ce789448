"""system.json: a round trip, and one line for everything that can be wrong with it."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

from recmas import Pattern
from recmas.config.pattern import MAX_NAME, MAX_ROLES, MAX_ROUNDS
from recmas.config.system_json import (
    MAX_STEPS,
    MAX_TEMPLATE,
    MAX_TOKENS,
    AgentSpec,
    Decoding,
    Defaults,
    PlacementSpec,
    PromptSpec,
    SystemSpec,
    read_spec,
    steps_by_role,
    write_spec,
)
from recmas.files.reading import LARGEST_JSON

PLACED = PlacementSpec(2, cpus=4, threads=3, gpus=0.5, resources={"rack": 0.25})
FULL = SystemSpec(
    Pattern((("a", "b"), ("c",)), combine="weighted", exchange="all"),
    {
        "a": AgentSpec("agents/a", PromptSpec("first", "later"), "bfloat16", "links/a", 4, False, placement=PLACED),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bf16"}, "agents.a.dtype: 'bf16' is not one of auto"),
        ({"dtype": object}, "agents.a.dtype: "),
        ({"latent_steps": 1.5}, "agents.a.latent_steps: 1.5 is not an integer"),
        ({"model": ""}, "agents.a.model: '' is no path"),
        ({"prompt": PromptSpec()}, "agents.a.prompt: has neither first nor later"),
        ({"system": "x" * (MAX_TEMPLATE + 1)}, "agents.a.system: has "),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, change, message):
    write_spec(tmp_path, FULL)
    before = (tmp_path / "system.json").read_text()
    changed = copy.deepcopy(FULL)
    vars(changed.agents["a"]).update(change)
    with pytest.raises(ValueError, match=re.escape(f"system.json: {message}")):
        write_spec(tmp_path, changed)
    assert (tmp_path / "system.json").read_text() == before


@pytest.mark.parametrize(
    ("rounds", "steps", "message"),
    [
        (0, 1, "rounds: 0 is not a positive integer"),
        (MAX_ROUNDS + 1, 1, f"rounds: {MAX_ROUNDS + 1} is more than {MAX_ROUNDS}"),
        (1.5, 1, "rounds: 1.5 is not a positive integer"),
        (1, 1.5, "latent_steps: 1.5 is not an integer >= 0"),
        (1, -1, "latent_steps: -1 is not an integer >= 0"),
        (1, MAX_STEPS + 1, f"latent_steps: {MAX_STEPS + 1} is more than {MAX_STEPS}"),
    ],
)
def test_defaults_are_checked(rounds, steps, message):
    with pytest.raises(ValueError, match=message):
        Defaults(rounds, steps)


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("temperature", True), ("top_p", "1")])
def test_decoding_takes_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}: {value!r} is not a number"):
        Decoding(**{name: value})
    assert Decoding(temperature=np.float32(0.5)).temperature == 0.5


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
    "agents.a.placement": ({"replicas": 0}, "agents.a.placement: replicas: 0 is not between 1 and 256"),
    "agents.a.placement.cpus": (-1, "agents.a.placement: cpus: -1 is not between 0 and 1024"),
    "agents.a.placement.threads": (2.5, "agents.a.placement.threads: 2.5 is not an integer"),
    "agents.a.placement.gpus": (2, "agents.a.placement: gpus: 2.0 is not between 0 and 1"),
    "agents.a.placement.resources": ({"rack": "much"}, "agents.a.placement: resources.rack: 'much' is not a number"),
    "agents.b.placement": ({"resources": {"GPU": 1}}, "agents.b.placement: resources.GPU: is asked for as gpus"),
    "agents.b.placement.node": ("x", "agents.b.placement.node: unknown key"),
    "outer_links": ({"a->z": "x"}, "outer_links.a->z: is not of the form source->target"),
    "outer_links.a->b@0": ("x", "outer_links.a->b@0: 'a->b@0' is not of the form source->target or source->target@ro"),
    "outer_links.a->b@": ("x", "outer_links.a->b@: 'a->b@' is not of the form"),
    "defaults": ({"rounds": 0}, "defaults.rounds: 0 is less than 1"),
    "sha256": ({"links/a": 3}, "sha256.links/a: 3 is not a string"),
}
FAR = {
    "defaults": ({"rounds": MAX_ROUNDS + 1}, "defaults.rounds: 257 is more than 256"),
    "defaults.latent_steps": (10**30, f"defaults.latent_steps: {10**30} is more than 65536"),
    "agents.a.latent_steps": (MAX_STEPS + 1, "agents.a.latent_steps: 65537 is more than 65536"),
    "agents.a.decoding": ({"max_new_tokens": MAX_TOKENS + 1}, "agents.a.decoding: max_new_tokens: 1048577 is more"),
    "agents.a.decoding.temperature": (1e-320, "agents.a.decoding: temperature: 1e-320 is less than 1e-06"),
    "agents.a.prompt.later": (
        "x" * (MAX_TEMPLATE + 1),
        "agents.a.prompt.later: has 1048577 characters, at most 1048576",
    ),
    "agents.a.system": ("x" * (MAX_TEMPLATE + 1), "agents.a.system: has 1048577 characters, at most 1048576 are read"),
    "pattern.stages": ([[f"r{n}" for n in range(MAX_ROLES)], ["b"]], "pattern: stages: 65 roles, at most 64"),
    "pattern.stages.0": (
        ["a" * (MAX_NAME + 1)],
        f"pattern: stages: role {'a' * MAX_NAME}... has more than 64 characters",
    ),
    "agents.a.model": ("x" * 5000, "agents.a.model: 'xxx"),
    "agents.b.model": ("a\0b", r"agents.b.model: 'a\x00b' is no path of 1 to 1024 printable characters"),
    "agents.a.inner_link": ("", "agents.a.inner_link: '' is no path of 1 to 1024 printable characters"),
    "outer_links.a->b@257": ("x", "outer_links.a->b@257: 'a->b@257' is the link of a round after 256"),
    "outer_links": ({"a->b": "x\n"}, r"outer_links.a->b: 'x\n' is no path"),
    "edge_scores": ("x" * 1025, "edge_scores: 'xxx"),
    "sha256": ({"\x1b": "0"}, r"sha256: '\x1b' is no path"),
    "agents.a." + "k" * 5000: (1, "agents.a.kkk"),
}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [(key, *broken) for table in (BROKEN, FAR) for key, broken in table.items()],
    ids=[f"{what}{key[:40]}" for what, table in (("", BROKEN), ("far ", FAR)) for key in table],
)
def test_one_line_names_file_and_key(tmp_path, key, value, message):
    content = copy.deepcopy(SMALL)
    *path, last = key.split(".")
    place = content
    for name in path:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    place[int(last) if isinstance(place, list) else last] = value
    (tmp_path / "system.json").write_text(json.dumps(content))
    start = re.escape(f"{tmp_path / 'system.json'}: {message}")
    with pytest.raises(ValueError, match=f"^{start}[^\n]*$") as raised:
        read_spec(tmp_path)
    assert len(str(raised.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", r"the file: \[\] is not an object"),
        ("[" * 100_000, "cannot be read as JSON: nested too deeply"),
        ('{"format": NaN}', "cannot be read as JSON: NaN is not a JSON number"),
        ('{"format": 1e999}', "cannot be read as JSON: the number 1e999 is too large"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be read as JSON: Exceeds the limit"),
        (" " * (LARGEST_JSON + 1), f"{LARGEST_JSON + 1} bytes are too many, at most {LARGEST_JSON} are read"),
    ],
    ids=["absent", "cut short", "a list", "deep", "NaN", "infinite", "5000 digits", "large"],
)
def test_no_json(tmp_path, content, message):
    if content is not None:
        (tmp_path / "system.json").write_text(content)
    with pytest.raises(ValueError, match=f"system.json: {message}"):
        read_spec(tmp_path)


def test_a_run_asks_for_no_more_than_a_system_may():
    with pytest.raises(ValueError, match="latent_steps: 65537 for 'a' is more than 65536"):
        steps_by_role(FULL.agents, FULL.defaults, {"a": MAX_STEPS + 1})
    with pytest.raises(ValueError, match="rounds: 257 is more than 256"):
        next(FULL.pattern.visits(MAX_ROUNDS + 1))
    with pytest.raises(ValueError, match="rounds: 257 is more than 256"):
        FULL.pattern.edges(MAX_ROUNDS + 1)
