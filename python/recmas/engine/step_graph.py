"""One step on buffers that stay in place, captured once as a CUDA graph and replayed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import torch

KIND = "cuda"
"""Devices on which graphs are captured."""
_SYNCHRONISES = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype"  # said once, to users who never asked for that mode


def current_stream(device: torch.device) -> Hashable:
    """The stream that orders this thread's work on a device; None where work needs none."""
    return torch.cuda.current_stream(device) if device.type == KIND else None


class StepGraph:
    """A step as one graph, on a stream and in a memory pool of its own.

    Args:
        step: reads and writes tensors that stay where they are; it is run twice before it is captured.
        reset: brings those tensors to where a step may begin.
        device: of all of them; need not be the current one.

    Raises:
        RuntimeError: the step cannot be captured; stream, allocator and random state are as they were before.
    """

    def __init__(self, step: Callable[[], object], reset: Callable[[], object], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            outer, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
            side.wait_stream(outer)
            try:
                # A capture that fails does not leave the stream it entered; leaving this block does.
                with torch.cuda.stream(side):
                    reset()
                    step()  # compiles, tunes and allocates what a capture must not
                    reset()
                    with _no_synchronisation():
                        step()
                    reset()
                    capture = torch.cuda.graph(self._graph, pool, side, capture_error_mode="thread_local")
                    with _restored(device, pool), capture:
                        step()
            finally:
                outer.wait_stream(side)

    def replay(self) -> None:
        """One more step, on the current stream of its device."""
        self._graph.replay()


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Fail after a block in which this thread waited for the device; a capture would fail in it, and less gently.

    Torch's mode counts for all threads, so it warns instead of raising, and what other threads do is passed on.
    """
    mode, thread, seen = torch.cuda.get_sync_debug_mode(), threading.get_ident(), []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if _SYNCHRONISES not in str(message):
                show(message, category, filename, lineno, file, line)
            elif threading.get_ident() == thread:
                seen.append(f"{filename}:{lineno}")

        warnings.showwarning = note
        warnings.filterwarnings("always", message=f".*{_SYNCHRONISES}")
        warnings.filterwarnings("ignore", message=f".*{_PROTOTYPE}")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if seen:
        raise RuntimeError(f"a step waits for the device at {seen[0]}")


@contextmanager
def _restored(device: torch.device, pool: Any) -> Iterator[None]:
    """Undo a capture that failed: torch leaves its allocator and its random generator as during one."""
    generator = torch.cuda.default_generators[device.index]
    state = generator.clone_state()
    try:
        yield
    except BaseException:
        try:
            torch._C._cuda_endAllocateToPool(device.index, pool)
        except RuntimeError:  # the capture itself did end
            pass
        else:
            torch._C._cuda_releasePool(device.index, pool)
        generator.graphsafe_set_state(state)
        raise
