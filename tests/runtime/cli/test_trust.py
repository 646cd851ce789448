"""What a system's folder leads to, and what stands where rows and outputs are expected: nothing is followed unasked."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from recmas.agents.agent import Agent
from recmas.cli import main
from tests.runtime.lean import contents, write_lean

QUICK = ["--max-new-tokens", "1", "--rounds", "1", "--latent-steps", "1"]
RUN = ["run", "system", "--questions", "rows.jsonl", *QUICK]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_lean(tmp_path_factory.mktemp("trust"))


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy, which is the current folder; ``outside`` has what the system's folder must not lead to."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "outside").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, words, *messages):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("recmas: error: ")
    assert err.count("\n") == 1
    for message in messages:
        assert message in err


def change(place, edit):
    path = place / "system" / "system.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    edit(content)
    path.write_text(json.dumps(content))


def move(place, name):
    """Move a part of the system outside, and leave a symbolic link in its place."""
    target = place / "outside" / name.replace("/", "-")
    shutil.move(place / "system" / name, target)
    (place / "system" / name).symlink_to(target)


def agents(content, name):
    for agent in content["agents"].values():
        agent["model"] = name


HOME = "agents/planner"
OUTSIDE = {
    "a model by an absolute path": lambda place: (
        shutil.move(place / "system" / HOME, place / "outside" / "model"),
        change(place, lambda content: agents(content, str(place / "outside" / "model"))),
    ),
    "a model by dots": lambda place: (
        shutil.move(place / "system" / HOME, place / "outside" / "model"),
        change(place, lambda content: agents(content, "../outside/model")),
    ),
    "a model by a link": lambda place: move(place, HOME),
    "all models by a link": lambda place: move(place, "agents"),
    "a model's weights by a link": lambda place: move(place, f"{HOME}/model.safetensors"),
    "a model's configuration by a link": lambda place: move(place, f"{HOME}/config.json"),
    "a tokenizer by a link": lambda place: move(place, f"{HOME}/tokenizer.json"),
    "an inner link by an absolute path": lambda place: (
        shutil.copytree(place / "system" / "links" / "planner", place / "outside" / "link"),
        change(place, lambda content: content["agents"]["planner"].update(inner_link=str(place / "outside" / "link"))),
    ),
    "an outer link by dots": lambda place: (
        shutil.copytree(place / "system" / "links" / "planner-critic", place / "outside" / "link"),
        change(place, lambda content: content["outer_links"].update({"planner->critic": "links/../../outside/link"})),
    ),
    "a link's weights by a link": lambda place: move(place, "links/planner/model.safetensors"),
    "all links by a link": lambda place: move(place, "links"),
}


_opened: list[Path] | None = None


def _note(event, arguments):
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(Path(os.path.realpath(os.fsdecode(arguments[0]))))


@contextlib.contextmanager
def opening():
    """What Python opens within; a hook of the interpreter's can be neither removed nor passed by."""
    global _opened
    if not hasattr(_note, "hooked"):
        sys.addaudithook(_note)
        _note.hooked = True
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_outside_of_the_folder_is_read_unless_allowed(place, capsys, name):
    assert main(RUN) == 0
    expected = [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit() and ":" in line]
    OUTSIDE[name](place)
    with opening() as opened:
        refused(capsys, RUN, "--allow-outside")
    assert place / "system" / "system.json" in opened
    assert not [path for path in opened if path.is_relative_to(place / "outside")]
    assert main([*RUN, "--allow-outside"]) == 0
    assert capsys.readouterr().out.splitlines()[: len(expected)] == expected


def test_the_hub_is_asked_nothing_unless_allowed(place, capsys, monkeypatch):
    """Neither for a model that the system names there, nor for anything else: no socket is opened."""
    change(place, lambda content: agents(content, "somebody/model"))
    connected = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connected.append(address))
    refused(capsys, RUN, "agents.planner.model: somebody/model is a model on the hub", "--allow-hub")
    refused(capsys, [*RUN, "--allow-outside"], "--allow-hub")
    assert not connected
    asked = []

    def from_hub(source, *arguments, offline, **options):
        asked.append((source, offline))
        raise ValueError("asked")

    monkeypatch.setattr(Agent, "from_pretrained", from_hub)
    refused(capsys, [*RUN, "--allow-hub"], "asked")
    assert asked == [("somebody/model", False)]


def test_a_local_system_is_loaded_offline(place, capsys, monkeypatch):
    asked, real = [], Agent.from_pretrained

    def noted(*arguments, offline, **options):
        asked.append(offline)
        return real(*arguments, offline=offline, **options)

    monkeypatch.setattr(Agent, "from_pretrained", noted)
    assert main(RUN) == 0
    assert asked == [True]


SPECIAL = {
    "FIFO": lambda path: os.mkfifo(path),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "words",
    [
        ["run", "system", "--questions", "HERE"],
        ["run", "system", "--question", "fox", "--output", "HERE"],
        ["eval", "system", "--data", "HERE"],
        ["eval", "system", "--data", "rows.jsonl", "--output", "HERE"],
        ["train", "inner", "system", "--data", "HERE"],
        ["train", "warmup", "system", "--texts", "HERE"],
        ["train", "outer", "system", "--data", "rows.jsonl", "--rounds", "1", "--validation", "HERE"],
    ],
    ids=" ".join,
)
def test_what_is_no_regular_file_is_neither_waited_for_nor_written(place, capsys, kind, words):
    SPECIAL[kind](place / "here.jsonl")
    before = contents(place)
    refused(capsys, ["here.jsonl" if word == "HERE" else word for word in words], "here.jsonl", f"is a {kind}")
    assert contents(place) == before


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_training_is_not_written_where_something_else_stands(place, capsys, kind):
    SPECIAL[kind](place / "out")
    if kind == "folder":
        (place / "out" / "thesis.tex").write_text("precious")
    before = contents(place)
    refused(capsys, ["train", "inner", "system", "--data", "rows.jsonl", "--output", "out"], "out: ")
    assert contents(place) == before


HUGE = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 32,
    "num_hidden_layers": 1 << 20,
    "vocab_size": 1 << 40,
    "num_attention_heads": 1 << 20,
    "head_dim": 1 << 40,
}


@pytest.mark.parametrize("key", HUGE)
def test_a_model_has_no_more_weights_than_its_files_hold(place, capsys, key):
    change(place, lambda content: None)
    path = place / "system" / HOME / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: HUGE[key]}))
    refused(capsys, RUN, "planner")
