"""Several processes: the same links as one gives, however many go on with a run, and one line where one is lost."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recmas import RecursiveMAS
from recmas.training import AllConfig, train_all
from recmas.training.processes import Processes
from tests.runtime.commands import recmas
from tests.runtime.lean import lean_rows, lean_system, write_lean

ROOT = Path(__file__).parents[3]
SETTINGS = {"steps": 4, "batch_size": 2, "accumulation": 2, "checkpoint_every": 1}


def launched(folder: Path, *words: str, count: int = 2) -> subprocess.Popen:
    """``recmas WORDS`` in so many processes of one thread each."""
    places = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    return subprocess.Popen(
        [*command, "-m", "recmas", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(run: subprocess.Popen) -> list[int]:
    """Processes of a run, in the order of their numbers."""
    found = {}
    for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found.update({int(entry[5:]): int(child) for entry in entries if entry.startswith(b"RANK=")})
    return [found[index] for index in sorted(found)]


def options(**settings: object) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def links(folder: Path) -> dict[str, list[float]]:
    mas = RecursiveMAS.from_pretrained(folder)
    found = mas.inner_links | {"->".join(edge): link for edge, link in mas.outer_links.items()}
    return {f"{name}.{key}": p.flatten().tolist() for name, link in found.items() for key, p in link.named_parameters()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process of as many threads makes of it: the sum of two batches' gradients has one order only."""
    folder = write_lean(tmp_path_factory.mktemp("alone"))
    mas = RecursiveMAS.from_pretrained(folder / "system")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `launched` does: torch's own products sum by the number of threads
    try:
        train_all(mas, lean_rows(), AllConfig(**SETTINGS), cache=folder / "pairs", progress=False)
    finally:
        torch.set_num_threads(threads)
    mas.save_pretrained(folder / "out")
    return folder


def test_two_processes_make_the_links_of_one_to_the_bits(alone, tmp_path):
    write_lean(tmp_path)
    done = launched(tmp_path, "train", "all", "system", "--data", "rows.jsonl", "--output", "out", *options(**SETTINGS))
    out, err = done.communicate(timeout=200)
    assert done.returncode == 0, err
    assert out.count("trained system in out") == 1  # one of them writes
    assert links(tmp_path / "out") == links(alone / "out")


def test_a_lost_process_ends_the_run_in_one_line_and_one_process_goes_on_with_it(tmp_path):
    write_lean(tmp_path)
    settings = SETTINGS | {"steps": 80}
    words = ["train", "inner", "system", "--data", "rows.jsonl", "--roles", "planner", "--output", "out"]
    words += [*options(**settings)]
    run = launched(tmp_path, *words)
    while not list((tmp_path / "out").glob("training/*/checkpoint-*-*.safetensors")):
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    os.kill(workers(run)[1], signal.SIGKILL)
    _, err = run.communicate(timeout=200)
    assert run.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("recmas: ")]
    assert len(told) == 1, err
    assert "another process of this run has ended" in told[0] or "ended by SIGTERM" in told[0]

    resumed = recmas(tmp_path, *words, "--resume")
    assert resumed.status == 0, resumed.err
    (tmp_path / "whole").mkdir()
    whole = write_lean(tmp_path / "whole")
    assert recmas(whole, *words).status == 0
    stored = [next(iter((place / "out").glob("links/planner*/*.safetensors"))) for place in (tmp_path, whole)]
    ours, theirs = map(load_file, stored)
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_a_signal_ends_all_processes_with_one_checkpoint_and_status_0(tmp_path):
    write_lean(tmp_path)
    settings = SETTINGS | {"steps": 3000, "checkpoint_every": 0}
    words = ["train", "inner", "system", "--data", "rows.jsonl", "--roles", "planner", "--output", "out"]
    run = launched(tmp_path, *words, *options(**settings))
    while not [log for log in (tmp_path / "out").glob("training/*/log.jsonl") if log.read_text().count("\n") > 3]:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    for child in workers(run):
        os.kill(child, signal.SIGTERM)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    (stored,) = (tmp_path / "out").glob("training/*/checkpoint-*-*.safetensors")
    steps = (stored.parent / "log.jsonl").read_text().count("\n")
    assert 3 < steps < settings["steps"]
    assert stored.name.startswith(f"checkpoint-{steps:08d}-")


def test_batches_that_cannot_be_dealt_out_are_refused():
    class Joined:
        num_processes, process_index = 3, 1

    with pytest.raises(ValueError, match="4 batches per step cannot be dealt out among 3 processes"):
        Processes(Joined()).check(4)
    assert list(Processes(Joined()).share(6)) == [1, 4]
    assert not Processes(Joined()).writes


def test_gradients_and_numbers_are_summed_in_one_message(monkeypatch):
    met, sent, messages = threading.Barrier(2), {}, [0, 0]

    def of_both(self, tensor):
        messages[self.index] += 1
        sent[self.index] = tensor.clone()
        met.wait(timeout=20)
        total = sent[0] + sent[1]
        met.wait(timeout=20)
        return total

    def summed(index):
        joined = SimpleNamespace(num_processes=2, process_index=index, device=torch.device("cpu"))
        parameters = [nn.Parameter(torch.zeros(size)) for size in ((2, 3), (3,), (1,))]
        parameters[0].grad = torch.full((2, 3), 1.5 + index)
        parameters[1].grad = torch.ones(3) if index else None
        numbers = [(0.1, 2.0**53), (0.2, -1.0)][index] + ((1e300, math.inf)[index],)
        return Processes(joined).sum_gradients(parameters, numbers), parameters

    monkeypatch.setattr(Processes, "_sum", of_both)
    with ThreadPoolExecutor(2) as pool:
        for numbers, parameters in pool.map(summed, range(2)):
            assert parameters[0].grad.tolist() == [[4.0] * 3] * 2
            assert parameters[1].grad.tolist() == [1.0] * 3
            assert parameters[2].grad is None
            assert numbers == [0.1 + 0.2, 2.0**53 - 1.0, math.inf]
    assert messages == [1, 1]


def test_bfloat16_computes_in_half_and_keeps_masters(tmp_path):
    mas, plain = lean_system(), lean_system()
    settings = SETTINGS | {"steps": 8}
    halves = train_all(mas, lean_rows(), AllConfig(**settings, precision="bfloat16"), progress=False)
    wholes = train_all(plain, lean_rows(), AllConfig(**settings), progress=False)
    for name, result in halves.items():
        assert result.records != wholes[name].records
        assert result.loss == pytest.approx(wholes[name].loss, rel=0.05)
    trained = [*mas.inner_links.values(), *mas.outer_links.values()]
    assert {p.dtype for link in trained for p in link.parameters()} == {torch.float32}
