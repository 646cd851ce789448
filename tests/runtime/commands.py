"""The command line in processes of its own, forked from one that has imported everything: a start costs no imports."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

_PR_SET_CHILD_SUBREAPER = 36
_LONGEST = 120  # seconds of processor time, and four times as many of the clock: a command that hangs ends here

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.uncollected",
        "tests.unsynced",
        "recmas.cli.run",
        "recmas.cli.eval",
        "recmas.cli.train",
        "recmas.recursive_mas",
        "recmas.training.all_stages",
        "recmas.training.checkpoint",
        "recmas.evaluation.sweeps",
        "recmas_kernels._cpu",
        "transformers.generation.utils",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "attrs",
    ]
)


class Ended(NamedTuple):
    """How a process ended, and what it and the processes that it left took together."""

    status: int  # negative: the signal that ended it
    out: str
    err: str
    seconds: float  # of processor time
    peak: int  # bytes of the largest of them


class Started:
    """A process that calls ``action(*arguments)`` in `folder`; its result, an exit status, may be None for 0."""

    def __init__(self, folder: Path, action: Callable[..., int | None], *arguments: Any) -> None:
        self._ours, theirs = _context.Pipe()
        self._output = [folder / f".{name}.{id(self)}" for name in ("out", "err")]
        for path in self._output:
            path.touch()  # here: a process may be killed before it has begun
        self._keeper = _context.Process(target=_keep, args=(theirs, folder, self._output, action, arguments))
        self._keeper.start()
        theirs.close()
        self.pid: int = self._ours.recv()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; a process that has ended meanwhile gets none."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        return not self._ours.poll()

    def wait(self) -> Ended:
        if not self._ours.poll(4 * _LONGEST):
            self.kill()
        status, seconds, peak = self._ours.recv()
        self._keeper.join()
        out, err = (path.read_text(errors="replace") for path in self._output)
        for path in self._output:
            path.unlink()
        return Ended(status, out, err, seconds, peak)


def started(folder: Path, *words: str, signal_at: tuple[int, int] | None = None) -> Started:
    """``recmas WORDS`` in `folder`; `signal_at` is a signal, and after which call of `os.fsync` it arrives."""
    return Started(folder, _command, words, signal_at)


def recmas(folder: Path, *words: str) -> Ended:
    """``recmas WORDS`` in `folder`, at its end."""
    return started(folder, *words).wait()


def script(folder: Path, path: Path, *places: Path) -> Ended:
    """``python PATH`` in `folder`, with modules in `places`, at its end."""
    return Started(folder, _script, path, places).wait()


def module(folder: Path, name: str, *words: str, places: Sequence[Path]) -> Ended:
    """``python -m NAME WORDS`` in the first of `places`, with modules in all of them, at its end."""
    return Started(folder, _module, name, words, places).wait()


def _module(name: str, words: tuple[str, ...], places: Sequence[Path]) -> None:
    os.chdir(places[0])
    sys.argv, sys.path[:0] = [name, *words], [str(place) for place in places]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _script(path: Path, places: tuple[Path, ...]) -> None:
    sys.argv, sys.path[:0] = [str(path)], [str(place) for place in (path.parent, *places)]
    runpy.run_path(str(path), run_name="__main__")


def _command(words: tuple[str, ...], signal_at: tuple[int, int] | None) -> int:
    from recmas.cli import main

    if signal_at is not None:
        number, last = signal_at
        calls, fsync = itertools.count(1), os.fsync

        def deadly(handle: int) -> None:
            fsync(handle)
            if next(calls) == last:
                os.kill(os.getpid(), number)

        os.fsync = deadly
    return main(words)


def _keep(pipe: Connection, folder: Path, output: list[Path], action: Any, arguments: Any) -> None:
    """Fork the process, and wait for it and for all that it leaves behind."""
    gc.freeze()  # what was imported: no collection need look through it, nor copy its pages
    gc.enable()
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl")
    child = os.fork()
    if child == 0:
        pipe.close()
        _become(folder, output, action, arguments)
    pipe.send(child)
    status, seconds, peak = 0, 0.0, 0
    while True:
        try:
            ended, found, usage = os.wait4(-1, 0)
        except ChildProcessError:
            break
        status = os.waitstatus_to_exitcode(found) if ended == child else status
        seconds += usage.ru_utime + usage.ru_stime
        peak = max(peak, usage.ru_maxrss * 1024)
    pipe.send((status, seconds, peak))


def _become(folder: Path, output: list[Path], action: Any, arguments: Any) -> None:
    status = 70
    try:
        import torch

        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CPU, (_LONGEST, _LONGEST))
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(output, start=1):
            os.dup2(os.open(path, os.O_WRONLY), number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        status = action(*arguments) or 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(arguments: list[str]) -> int:
    """`recmas.cli.main`, imported when it is called: a machine for tests on a GPU may lack what it parses with."""
    from recmas.cli import main as run

    return run(arguments)
