"""Checkpoints: whole, compared on loading, and one older one to go back to, whenever the process ends."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from recmas.training.checkpoint import checkpoints
from recmas.training.loop import train
from recmas.training.step_log import LOG
from tests.runtime.killing import another_writer, killed_at
from tests.runtime.training.test_loop import SmallConfig, regression, run


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_newest_and_one_older_checkpoint_stay(tmp_path):
    run(SmallConfig(), output=tmp_path)
    assert [path.name[:19] for path in checkpoints(tmp_path)] == ["checkpoint-00000012", "checkpoint-00000010"]


def test_resuming_removes_what_a_run_killed_while_it_swept_left_behind(tmp_path):
    run(SmallConfig(), output=tmp_path)
    newest, older = checkpoints(tmp_path)
    (tmp_path / f"checkpoint-00000008-{'0' * 16}.safetensors").write_bytes(b"")
    run(SmallConfig(), output=tmp_path, resume=True)
    assert checkpoints(tmp_path) == [newest, older]


@pytest.mark.parametrize("place", [20, -5], ids=["header", "weights"])
def test_a_flipped_bit_names_the_older_checkpoint_and_resuming_from_that_ends_the_same(tmp_path, place):
    whole, _ = run(SmallConfig(), output=tmp_path)
    newest, older = checkpoints(tmp_path)
    content = bytearray(newest.read_bytes())
    content[place] ^= 4
    newest.write_bytes(bytes(content))
    message = (
        rf"{newest.name}: is damaged, its sha256 is not the one in its name; delete it to go on from {older.name}$"
    )
    with pytest.raises(ValueError, match=message):
        run(SmallConfig(), output=tmp_path, resume=True)
    newest.unlink()
    again, result = run(SmallConfig(), output=tmp_path, resume=True)
    assert same(whole, again)
    assert [record.step for record in result.records] == list(range(1, 13))
    assert checkpoints(tmp_path) == [newest, older]  # the same name: the same bits


def test_the_only_checkpoint_damaged(tmp_path):
    run(SmallConfig(steps=3), output=tmp_path)
    (only,) = checkpoints(tmp_path)
    only.write_bytes(only.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged, .*; there is no older one$"):
        run(SmallConfig(steps=3), output=tmp_path, resume=True)


def test_a_checkpoint_of_an_earlier_version_is_not_passed_over(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint.pt: was made by an earlier version"):
        run(SmallConfig(), output=tmp_path, resume=True)


def test_a_checkpoint_of_other_shapes_changes_no_parameter(tmp_path):
    run(SmallConfig(steps=3), output=tmp_path)
    path = checkpoints(tmp_path)[0]
    path.unlink()
    save_file({"parameter.0.weight": torch.zeros(2)}, path, metadata={"run": '{"step": 3, "settings": {}}'})
    with pytest.raises(ValueError, match="is damaged"):  # its name tells
        run(SmallConfig(steps=3), output=tmp_path, resume=True)


@pytest.mark.parametrize("moved", [False, True], ids=["before the call", "after the call"])
def test_a_run_killed_at_any_call_goes_on_and_ends_the_same(tmp_path, moved):
    config = SmallConfig(checkpoint_every=2)
    whole, _ = run(config, output=tmp_path / "whole")
    for stop in range(1, 1000):
        folder = tmp_path / str(stop)
        killed = killed_at(stop, moved, partial(run, config, output=folder), ("replace", "fsync", "unlink"))
        again, result = run(config, output=folder, resume=True)
        assert same(whole, again), stop
        assert len(result.records) == 12
        assert not [path for path in folder.iterdir() if path.name.startswith(f".{LOG}.")]
        if not killed:
            break
    assert stop > 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_or_inside_steps_leaves_a_checkpoint_of_the_step_it_came_in(tmp_path, number):
    """In a process of its own: outside of the command line, SIGTERM and SIGHUP end it, after the checkpoint."""
    whole, _ = run(SmallConfig(), output=tmp_path / "whole")
    child = os.fork()
    if child == 0:
        module, loss = regression()

        def interrupted(index, step):
            if step == 6:
                signal.raise_signal(number)
            return loss(index, step)

        try:
            train(dict(module.named_parameters()), interrupted, SmallConfig(), name="x", output=tmp_path / "cut")
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (130 if number == signal.SIGINT else -number)
    assert checkpoints(tmp_path / "cut")[0].name.startswith("checkpoint-00000007")
    again, _ = run(SmallConfig(), output=tmp_path / "cut", resume=True)
    assert same(whole, again)


def test_a_second_signal_takes_effect_at_once(tmp_path):
    module, loss = regression()

    def interrupted(index, step):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return loss(index, step)

    with pytest.raises(KeyboardInterrupt):
        train(dict(module.named_parameters()), interrupted, SmallConfig(), name="x", output=tmp_path, progress=False)
    assert checkpoints(tmp_path)[0].name.startswith("checkpoint-00000005")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _, result = run(SmallConfig(), output=tmp_path, on_step=lambda record: signal.raise_signal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.steps == 12


def test_a_full_disk_is_told_with_the_file_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    whole, _ = run(SmallConfig(), output=tmp_path / "whole")
    fsync = os.fsync

    def full(record):
        if record.step == 10:
            monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))

    with pytest.raises(OSError, match=r"cut/checkpoint-00000010-\w+\.safetensors") as raised:
        run(SmallConfig(), output=tmp_path / "cut", on_step=full)
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, "fsync", fsync)
    assert [path.name[:19] for path in checkpoints(tmp_path / "cut")] == ["checkpoint-00000005"]
    again, _ = run(SmallConfig(), output=tmp_path / "cut", resume=True)
    assert same(whole, again)


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    run(SmallConfig(steps=3), output=tmp_path)
    with another_writer(tmp_path), pytest.raises(ValueError, match="another process is writing there"):
        run(SmallConfig(steps=3), output=tmp_path, resume=True)


def test_a_log_that_leads_elsewhere_is_not_written(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("")
    (tmp_path / "run" / LOG).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="leads out of .* by a symbolic link"):
        run(SmallConfig(), output=tmp_path / "run", resume=True)
    assert (tmp_path / "precious").read_text() == ""
