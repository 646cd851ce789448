"""Processes that die in the middle of what they write."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from recmas.files.locks import one_writer

CALLS = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir", "truncate")
"""What changes names on the disk, or makes contents durable."""


@contextmanager
def seen_at_calls(look: Callable[[], object], moved: bool) -> Iterator[None]:
    """Within, `look` is called at each of these calls (after it, if `moved`).

    It sees what a process killed there would leave: SIGKILL changes nothing on the disk.
    """
    looking = False

    def seen(real):
        def call(*arguments, **options):
            nonlocal looking
            if looking:
                return real(*arguments, **options)
            looking = True
            try:
                if not moved:
                    look()
                result = real(*arguments, **options)
                if moved:
                    look()
                return result
            finally:
                looking = False

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, seen(getattr(os, name)))
        yield


def killed_at(stop: int, moved: bool, action: Callable[[], object], calls: Sequence[str] = CALLS) -> bool:
    """Whether a process of its own died by SIGKILL at the `stop`-th of these calls (after it, if `moved`), or ended."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    gc.freeze()  # no collection need look through what the tests before have left, nor copy its pages
    count = 0

    def deadly(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == stop and not moved:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **options)
            finally:
                if count == stop:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in calls:
        setattr(os, name, deadly(getattr(os, name)))
    try:
        action()
    finally:
        os._exit(0)


@contextmanager
def another_writer(output: Path) -> Iterator[None]:
    """Within, another process writes to `output`."""
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with one_writer(output):
            os.write(ready[1], b".")
            os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        yield
    finally:
        os.write(release[1], b".")
        os.waitpid(child, 0)
        for end in (*ready, *release):
            os.close(end)
