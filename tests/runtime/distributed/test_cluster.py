"""A cluster begins and ends whole, whichever signal comes in between; its key is nowhere but in its processes."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from recmas import DISTILLATION
from recmas.config.system_json import PlacementSpec
from recmas.distributed.order import Loading
from tests.runtime.distributed.conftest import Pool, saved
from tests.runtime.lean import write_lean
from tests.torture.amounts import FULL, SEED

ENDS = 9
MARK = "RECMAS_TEST_MARK"


class Terminated(BaseException):
    """As the command line raises it."""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a Ray is told that takes its time to start, while SIGTERM comes."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    told: list[str] = []
    arrived = threading.Event()

    def arrive(number: int, frame: FrameType | None) -> None:
        arrived.set()
        raise Terminated

    def init(**settings: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        told.append("starts")
        os.kill(os.getpid(), signal.SIGTERM)
        assert arrived.wait(30)
        told.append("has started")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda **settings: told.append("has ended"))
    before = signal.signal(signal.SIGTERM, arrive)
    yield told
    assert signal.signal(signal.SIGTERM, before) is arrive


def test_a_signal_while_a_cluster_starts_ends_it_when_it_has_started(events: list[str]) -> None:
    from recmas.distributed.cluster import cluster

    with pytest.raises(Terminated), cluster():
        events.append("is used")
    assert events == ["starts", "has started", "has ended"]


def test_a_cluster_that_does_not_answer_is_one_line(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from recmas.distributed.cluster import cluster

    def refuse(**settings: Any) -> None:
        raise RuntimeError("no\nroute")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConnectionError, match="no Ray cluster answers at '192.0.2.1:6379': no route"):  # noqa: SIM117
        with cluster("192.0.2.1:6379"):
            events.append("is used")
    with pytest.raises(RuntimeError, match="no\nroute"), cluster():
        events.append("is used")
    assert events == ["has ended"] * 2


@pytest.mark.usefixtures("ray_cluster")
def test_a_new_cluster_has_no_process_for_tasks_that_nobody_has() -> None:
    import ray

    [raylet] = ray._private.worker.global_worker.node.all_processes["raylet"]
    threads = Path(f"/proc/{raylet.process.pid}/task").glob("*/children")
    children = [child for path in threads for child in path.read_text().split()]
    titles = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
    assert titles  # those of the machine itself
    assert not [title for title in titles if "IDLE" in title or "default_worker" in title]


@pytest.mark.usefixtures("ray_cluster")
def test_processes_of_a_new_cluster_yield_to_nothing() -> None:
    import ray

    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


@pytest.mark.usefixtures("pooled")
def test_the_key_is_in_no_file_command_line_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from recmas.distributed import executor
    from recmas.distributed.system import RaySystem

    key = bytes(range(97, 129))
    monkeypatch.setattr(executor.secrets, "token_bytes", lambda count: key[:count])
    saved(tmp_path / "system", DISTILLATION)
    forms = [key, key.hex().encode(), base64.b64encode(key), repr(key).encode()]
    with RaySystem(Loading(folder=str(tmp_path / "system"))) as cluster:
        cluster.answer(["fox"])
        assert cluster.executor._replicas["expert"][0]._loading[-1] == key
        session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
        places = [path for folder in (session, Path("/dev/shm")) for path in folder.rglob("*") if path.is_file()]
        assert len(places) > 5
        processes = [path for path in Path("/proc").glob("[0-9]*") if path.stat().st_uid == os.getuid()]
        found = []
        for path in places + [process / name for process in processes for name in ("cmdline", "environ")]:
            try:
                content = path.read_bytes()
            except OSError:  # a process has ended, or a file has gone
                continue
            found += [path for form in forms if form in content]
        assert not found
        assert not [name for name, value in os.environb.items() for form in forms if form in value]


class Arrived(BaseException):
    """A signal, as the command line raises it."""


@contextlib.contextmanager
def a_signal(seconds: float) -> Iterator[None]:
    """Within, a signal arrives after so many seconds."""

    def arrive(number: int, frame: FrameType | None) -> None:
        raise Arrived

    before = signal.signal(signal.SIGALRM, arrive)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def groups() -> set[str]:
    """Names of the placement groups that the cluster still knows as more than removed."""
    from ray.util import placement_group_table

    return {one["name"] for one in placement_group_table().values() if one["state"] != "REMOVED"}


@pytest.mark.usefixtures("ray_cluster")
def test_a_signal_while_places_are_reserved_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are waited for, and when they have just been reserved and nobody here knows the group yet."""
    import ray.util

    from recmas.distributed.cluster import Reserved

    all_cores = int(ray.cluster_resources()["CPU"])
    first = Reserved({"a": PlacementSpec(cpus=all_cores)})
    second = Reserved({"a": PlacementSpec(cpus=1)})
    try:
        first.take()
        begun = time.monotonic()
        with pytest.raises(Arrived), a_signal(0.3):
            second.take()
        assert time.monotonic() - begun < 10  # not as long as places are waited for
        assert len(groups()) == 2
        second.free()
        assert len(groups()) == 1
    finally:
        first.free()
    assert groups() == set()
    make = ray.util.placement_group

    def interrupted(*given: Any, **more: Any) -> None:
        make(*given, **more)
        raise Arrived

    monkeypatch.setattr(ray.util, "placement_group", interrupted)
    with pytest.raises(Arrived):
        second.take()
    assert len(groups()) == 1
    second.free()
    assert groups() == set()


@pytest.mark.usefixtures("ray_cluster")
def test_places_that_do_not_become_free_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from recmas.distributed import cluster

    wanted = {"a": PlacementSpec(cpus=int(ray.cluster_resources()["CPU"]))}
    first, second = cluster.Reserved(wanted), cluster.Reserved(wanted)
    try:
        first.take()
        monkeypatch.setattr(cluster, "PATIENCE", 0.0)
        with pytest.raises(ValueError, match=r"placement: the cluster has not had \d+ CPU free in 0 s"):
            second.take()
    finally:
        second.free()
        first.free()
    assert groups() == set()


def test_a_signal_while_agents_load_leaves_no_process(tmp_path: Path, pooled: Pool) -> None:
    from recmas.config.system_json import read_spec
    from recmas.distributed.executor import RayExecutor

    saved(tmp_path / "system", DISTILLATION)
    loading, before = Loading(folder=str(tmp_path / "system")), threading.active_count()
    taken = pooled.taken

    def load_again_and_again() -> None:
        while True:
            RayExecutor(read_spec(tmp_path / "system"), loading).close()

    with pytest.raises(Arrived), a_signal(0.1):
        load_again_and_again()
    assert pooled.taken > taken
    assert pooled.lent == 0
    assert threading.active_count() == before
    assert groups() == set()


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_no_machine_has_room_for_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recmas.config.system_json import read_spec
    from recmas.distributed import replica
    from recmas.distributed.executor import launch_process

    monkeypatch.setattr(replica, "RETURN", 0.2)
    saved(tmp_path / "system", DISTILLATION)
    far = PlacementSpec(threads=1, resources={"moon": 1.0})
    loading = (Loading(folder=str(tmp_path / "system")), read_spec(tmp_path / "system"), "expert", "cpu", b"k" * 32)
    one = replica.Replica("expert", lambda: launch_process(far, "DEFAULT", None), loading, None, print)
    try:
        one.load()
        with pytest.raises(ValueError, match="agent 'expert': no machine of the cluster has had room for its process"):
            one.begin()
    finally:
        one.close()


@pytest.mark.parametrize(
    ("failure", "said", "starts"),
    [
        # A tokenizer's class is in a module that only the agent's process has made.
        ("unread", r"agent 'expert': .* read by this process: No module named .*tokenizer", 1),
        ("memory", r"agent 'expert': its process ended before it had loaded; is there enough memory\?", 1),
        ("killed", r"agent 'expert': its process ended before it had loaded; is there enough memory\?", 3),
    ],
)
def test_an_agent_that_cannot_be_loaded_is_one_line(
    failure: str, said: str, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.exceptions import OutOfMemoryError, RaySystemError, RayTaskError

    from recmas.distributed import replica

    errors = {
        "unread": RaySystemError(ModuleNotFoundError("No module named 'transformers_modules'")),
        "memory": RayTaskError("load", "", MemoryError()),
        "killed": OutOfMemoryError("this machine's memory is almost full"),
    }

    def fail(ref: Any) -> None:
        raise errors[failure]

    ended = list[Any]()
    fake = SimpleNamespace(wait=lambda refs, timeout: (refs, []), get=fail, kill=ended.append)
    monkeypatch.setattr(replica, "ray", fake)
    loading: Any = (Loading(folder="x"), None, "expert", "cpu", b"")
    process = SimpleNamespace(__ray_ready__=MagicMock(), load=MagicMock(), watch=MagicMock())
    launched = list[Any]()
    one = replica.Replica("expert", lambda: launched.append(process) or process, loading, None, print)
    try:
        one.load()
        with pytest.raises(ValueError, match=said) as refused:
            one.begin()
        assert "\n" not in str(refused.value)
    finally:
        one.close()
    assert len(launched) == starts <= len(ended)


@pytest.mark.skipif(not FULL, reason="starts nine clusters: make torture")
def test_a_command_that_a_signal_ends_leaves_no_process(tmp_path: Path, record_property: Any) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    chance = random.Random(f"{SEED} ends")
    write_lean(tmp_path)
    words = [sys.executable, "-m", "recmas", "run", "system", "--questions", "rows.jsonl", "--engine", "ray"]
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(path for path in (str(root / "python"), str(root), os.environ.get("PYTHONPATH")) if path)
    for number in range(ENDS):
        sent, mark = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[number % 3], f"{os.getpid()}-{number}"
        environment = os.environ | {"PYTHONPATH": paths, MARK: mark}
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        many = chance.randrange(1, 9)  # while a cluster starts, agents load, and rows are answered
        while process.poll() is None and len(_marked(mark)) < many:
            time.sleep(0.01)
        time.sleep(chance.random())
        process.send_signal(sent)
        err = process.communicate(timeout=120)[1]
        told = f"seed {SEED}, {sent.name} with {many} processes: {process.returncode} {err}"
        assert process.returncode in (-sent if sent == signal.SIGKILL else 128 + sent, 0), told
        assert err.count("\n") <= 1, told
        # What is left when a process was killed notices it by itself, some of it when a minute has gone by.
        deadline = time.monotonic() + (150 if sent == signal.SIGKILL else 10)
        while left := _marked(mark):
            assert time.monotonic() < deadline, f"{told}; left: {left}"
            time.sleep(0.1)
    record_property("torture", ("signals to recmas run --engine ray", ENDS, "no process left behind"))


def _marked(mark: str) -> list[str]:
    """Processes that were started with this mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return found
