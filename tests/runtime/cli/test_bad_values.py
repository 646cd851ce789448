"""Files and values that no command can use: one line that names what was wrong, and exit status 2."""

from __future__ import annotations

import gzip
import json
import os
import sys

import pytest

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.cli import main
from recmas.config.system_json import FILE_NAME
from tests.runtime.tiny import tiny_agent

SAID = {"planner": "fox", "critic": "dog", "solver": "lazy"}
ROWS = [
    {"question": "what is it?", "answer": "x", "targets": SAID},
    {"question": "fox", "answer": "y", "targets": SAID},
]


def with_all(**changes):
    """The rows as JSON lines, some fields of all of them changed."""
    return "".join(json.dumps({**row, **changes}) + "\n" for row in ROWS)


FILES = {
    "rows.jsonl": with_all(),
    "half.jsonl": with_all(question="\ud83d"),
    "twice.jsonl": '{"question": "a", "question": "b"}\n',
    "null.jsonl": with_all(question=None),
    "list.jsonl": with_all(question=["fox"]),
    "silent.jsonl": with_all(targets=dict.fromkeys(SAID, "")),
    "half_said.jsonl": with_all(targets=dict.fromkeys(SAID, "\ud83d")),
    "unanswered.jsonl": with_all(answer=""),
    "listed.jsonl": with_all(answer=["x"]),
    "steps.yaml": "latent_steps: 1.5\n",
    "rounds.yaml": "rounds: 1.5\n",
    "batch.yaml": "batch_size: 2.5\n",
    "train.yaml": "steps: 1.5\n",
}
RUN, ASK = ["run", "system", "--question", "fox"], ["run", "system", "--questions"]
EVAL = ["eval", "system", "--data"]
INNER, WARMUP, OUTER = (["train", stage, "system", "--data"] for stage in ("inner", "warmup", "outer"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    agents = {role: tiny_agent("llama", role, seed=seed) for seed, role in enumerate(SEQUENTIAL.roles)}
    system = RecursiveMAS.create(agents, SEQUENTIAL, rounds=3, latent_steps=1, seed=0)
    system.save_pretrained(folder / "system")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    packed = gzip.compress(FILES["rows.jsonl"].encode())
    (folder / "rows.jsonl.gz").write_bytes(packed)
    (folder / "cut.jsonl.gz").write_bytes(packed[:-12])
    os.mkfifo(folder / "fifo")
    (folder / "null").symlink_to(os.devnull)
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def ended(*words):
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*ASK, "half.jsonl"], r"row 0: field 'question' holds '\ud83d', half of a surrogate pair"),
        (["run", "system", "--question", "\udcff"], r"row 0: field 'question' holds '\udcff', half of a surrogate"),
        ([*ASK, "twice.jsonl"], "twice.jsonl, line 1: not valid JSON ('question' occurs twice in one object)"),
        ([*ASK, "null.jsonl"], "row 0: field 'question' is null"),
        ([*ASK, "list.jsonl"], "row 0: field 'question' is ['fox'], expected a text or a number"),
        ([*ASK, "cut.jsonl.gz"], "cut.jsonl.gz: is a damaged gzip file"),
        ([*ASK, "fifo"], "fifo: is a FIFO, expected a regular file"),
        ([*RUN, "--output", "fifo"], "fifo: is a FIFO, expected a regular file"),
        ([*RUN, "--output", "null"], "null: is a device, expected a regular file"),
        ([*EVAL, "rows.jsonl", "--output", "null"], "null: is a device, expected a regular file"),
        ([*RUN, "--config", "steps.yaml"], "--latent-steps: 1.5 is not an integer"),
        ([*RUN, "--config", "rounds.yaml"], "--rounds: "),
        ([*RUN, "--config", "batch.yaml"], "--batch-size: 2.5 is not an integer"),
        ([*EVAL, "rows.jsonl", "--config", "steps.yaml"], "--latent-steps: 1.5 is not an integer"),
        ([*EVAL, "rows.jsonl", "--config", "rounds.yaml"], "--rounds: 1.5 is not an integer"),
        ([*EVAL, "unanswered.jsonl"], "row 0: field 'answer' is empty; any text without an answer would count as ri"),
        ([*EVAL, "listed.jsonl"], "row 0: field 'answer' is ['x'], expected a text or a number"),
        ([*INNER, "null.jsonl"], "row 0: field 'question' is null"),
        ([*INNER, "half_said.jsonl"], "row 0: the target of agent 'planner' holds"),
        ([*INNER, "rows.jsonl", "--config", "train.yaml"], "--steps: Expected a int"),
        ([*WARMUP, "silent.jsonl"], "no token of what agent 'critic' says has a counterpart among those of 'solver'"),
        ([*OUTER, "rows.jsonl", "--latent-steps", "0"], "latent_steps: 0 for every agent that sends"),
        ([*RUN, "--engine", "cloud"], "argument --engine: invalid choice: 'cloud' (choose from 'local', 'ray')"),
        ([*RUN, "--cluster", "auto"], "--cluster: is for --engine ray"),
        ([*EVAL, "rows.jsonl", "--micro-batch", "2"], "--micro-batch: is for --engine ray"),
        ([*RUN, "--engine", "ray", "--device", "meta"], "--device: with --engine ray, placement in system.json says"),
        ([*RUN, "--engine", "ray", "--offload"], "--offload: with --engine ray, placement in system.json says"),
        ([*RUN, "--engine", "ray", "--stream"], "--stream: with --engine ray, many are answered at once"),
        (
            [*OUTER, "rows.jsonl", "--latent-steps", "planner=0", "--edges", "planner->critic"],
            "edges: planner->critic passes no latents: 'planner' has 0 latent steps",
        ),
        ([*OUTER, "rows.jsonl", "--config", "rounds.yaml"], "--rounds: 1.5 is not an integer"),
    ],
)
def test_what_no_command_can_use(here, capsys, words, message):
    before = sorted(here.rglob("*"))
    assert ended(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("recmas: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path for path in sorted(here.rglob("*")) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]


def test_packed_questions_are_answered(here, capsys):
    assert ended("run", "system", "--questions", "rows.jsonl.gz", "--max-new-tokens", "1") == 0
    assert "2 answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"rounds": 3', '"rounds": 3.0'), "defaults.rounds: 3.0 is not an integer"),
        (('"latent_steps": 1', '"latent_steps": 1.5'), "defaults.latent_steps: 1.5 is not an integer"),
        (('"format": 1', '"format": 1, "format": 1'), "cannot be read as JSON: 'format' occurs twice in one object"),
        (("Question: ", "Question \\ud83d: "), "half of a surrogate pair, which is no character"),
    ],
)
def test_what_no_system_may_say(here, tmp_path, capsys, change, message):
    content = (here / "system" / FILE_NAME).read_text()
    assert change[0] in content
    (tmp_path / FILE_NAME).write_text(content.replace(*change, 1))
    for kind in ("links", "agents"):
        (tmp_path / kind).symlink_to(here / "system" / kind)
    assert ended("run", str(tmp_path), "--question", "fox", "--allow-outside") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_the_ray_extra_is_named_where_it_is_missing(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert ended(*RUN, "--engine", "ray") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("recmas: error: --engine ray needs the ray extra: pip install 'recmas-kernels[ray]'")
    assert err.count("\n") == 1
