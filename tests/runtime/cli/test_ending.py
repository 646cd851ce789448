"""Commands that end before they are done: by a signal, by SIGKILL, or because another process writes there."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import time

import pytest

from recmas.cli import main
from recmas.training import checkpoint
from tests.runtime.commands import recmas, started
from tests.runtime.killing import another_writer
from tests.runtime.lean import contents, write_lean

INNER = (
    "train",
    "inner",
    "system",
    "--data",
    "rows.jsonl",
    "--steps",
    "200",
    "--batch-size",
    "2",
    "--roles",
    "planner",
)
RUN = ("run", "system", "--questions", "rows.jsonl", "--max-new-tokens", "4", "--batch-size", "2")
EVAL = ("eval", "system", "--data", "rows.jsonl", "--max-new-tokens", "4", "--batch-size", "2", "--mode", "latent,text")
ENDING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_lean(tmp_path_factory.mktemp("ending"))


@pytest.fixture(scope="module")
def whole(made):
    """The training and the answers that nothing ended."""
    assert main(["train", "inner", str(made / "system"), "--data", str(made / "rows.jsonl"), *INNER[5:],
                 "--output", str(made / "whole")]) == 0  # fmt: skip
    for words, output in ((RUN, "answers"), (EVAL, "records")):
        asked = [str(made / word) if word in ("system", "rows.jsonl") else word for word in words]
        assert main([*asked, "--output", str(made / output)]) == 0
    return made


def until_written(path, process):
    """Wait until the file has a line; fail if the process ends before."""
    while not (path.exists() and path.read_bytes()):
        assert process.running, process.wait().err
        time.sleep(0.002)


def said(number):
    return "recmas: interrupted\n" if number == signal.SIGINT else f"recmas: ended by {number.name}\n"


@pytest.mark.parametrize(("number", "status"), [(number, 0 if number == signal.SIGTERM else s) for number, s in ENDING])
def test_a_signal_ends_a_training_with_its_status_and_a_whole_checkpoint(whole, number, status):
    """SIGTERM, by which schedulers make room, is no failure: the run goes on where it stopped."""
    name = f"cut-{status}"
    log = whole / name / "training" / "inner-planner" / "log.jsonl"
    process = started(whole, *INNER, "--output", name)
    until_written(log, process)
    process.kill(number)
    ended = process.wait()
    assert ended.status == status
    stopped = f"recmas: ended by SIGTERM, all steps are in {name}/training; --resume goes on\n"
    assert ended.err.endswith(said(number) if status else stopped)
    steps = log.read_text().count("\n")
    found = checkpoint.load(log.parent)
    assert found is not None
    assert found.step == steps < 200
    assert recmas(whole, *INNER, "--output", name, "--resume").status == 0
    trained, expected = (contents(whole / each / "links") for each in (name, "whole"))
    assert trained == expected


@pytest.mark.parametrize("words", [RUN, EVAL], ids=["run", "eval"])
@pytest.mark.parametrize(("number", "status"), [*ENDING, (signal.SIGKILL, -signal.SIGKILL)])
def test_answers_go_on_after_a_signal_and_are_the_same(whole, tmp_path, words, number, status):
    output = tmp_path / "cut"
    ended = started(whole, *words, "--output", str(output), signal_at=(number, 2)).wait()
    assert ended.status == status
    assert number == signal.SIGKILL or ended.err.endswith(said(number))
    cut = output.read_text()
    assert cut.count("\n") == 4  # two batches
    output.write_text(cut + cut.splitlines()[0][:20])  # as if the last line had been cut short
    assert recmas(whole, *words, "--output", str(output)).status == 0
    expected = (whole / ("answers" if words is RUN else "records")).read_text()
    assert list(map(told, output.read_text().splitlines())) == list(map(told, expected.splitlines()))


def told(line):
    """A line without what depends on the machine."""
    return {key: value for key, value in json.loads(line).items() if key not in ("seconds", "peak_memory")}


@pytest.mark.parametrize("words", [RUN, EVAL], ids=["run", "eval"])
def test_a_second_writer_of_answers_is_refused(whole, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(whole)
    output = tmp_path / "answers.jsonl"
    output.write_bytes(b"")
    with another_writer(output):
        assert main([*words, "--output", str(output)]) == 2
    assert capsys.readouterr().err == (
        f"recmas: error: {output}: another process is writing there; wait for it, or choose another place\n"
    )
    assert output.read_bytes() == b""


def test_answers_of_another_run_are_neither_taken_nor_written_over(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(whole)
    for words, kept in ((RUN, "answers"), (EVAL, "records")):
        output = tmp_path / kept
        output.write_bytes((whole / kept).read_bytes())
        assert main([*words, "--seed", "7", "--output", str(output)]) == 2
        assert "of another system, other settings or other rows; use another file" in capsys.readouterr().err
        assert output.read_bytes() == (whole / kept).read_bytes()


def test_a_run_that_ended_when_its_folder_was_there_is_resumed(whole, tmp_path):
    """The output is in place with the folder of its run, before the run itself has begun."""
    process = started(whole, *INNER, "--output", str(tmp_path / "cut"))
    while not (tmp_path / "cut").exists():
        assert process.running, "ended before its output was there"
        time.sleep(0.0005)
    process.kill()
    assert process.wait().status == -signal.SIGKILL
    assert (tmp_path / "cut" / "training" / "inner-planner").is_dir()
    assert recmas(whole, *INNER, "--output", str(tmp_path / "cut"), "--resume").status == 0
    assert contents(tmp_path / "cut" / "links") == contents(whole / "whole" / "links")


@pytest.mark.parametrize("words", [RUN, EVAL], ids=["run", "eval"])
def test_a_full_disk_is_told_and_the_answers_before_it_stay(whole, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(whole)
    output, real, calls = tmp_path / "answers.jsonl", os.fsync, itertools.count(1)

    def full(handle):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main([*words, "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"recmas: error: {output}: No space left on device\n"
    assert output.read_text().count("\n") >= 4
    assert main([*words, "--output", str(output)]) == 0
    expected = (whole / ("answers" if words is RUN else "records")).read_text()
    assert list(map(told, output.read_text().splitlines())) == list(map(told, expected.splitlines()))
