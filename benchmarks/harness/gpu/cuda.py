"""Every call of the GPU benchmarks that needs a CUDA device: graphs, events, clocks, facts. It holds no policy."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from time import monotonic
from typing import Any

import torch

from benchmarks.harness.timing import Call
from recmas_kernels.backends import native

SPIN_CYCLES = 200_000  # about 100 us: the host enqueues behind it, so that no event waits for the host


def available() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where the measured tensors live."""
    return torch.device("cuda")


def facts() -> dict[str, Any]:
    """What the device is: name, compute capability, multiprocessors, L2 and memory bytes, driver, toolkit."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _ask("driver_version"),
        "cuda": torch.version.cuda,
    }


def clock_and_temperature() -> tuple[float | None, float | None]:
    """Present SM clock in MHz and temperature in degrees Celsius; None where nvidia-smi does not say."""
    return _number(_ask("clocks.sm")), _number(_ask("temperature.gpu"))


def _ask(field: str) -> str | None:
    """One field of nvidia-smi about the current device; reads only, never sets."""
    device = torch.cuda.current_device()
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={device}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # "[N/A]"
        return None


@contextmanager
def side_stream() -> Iterator[None]:
    """Everything inside runs on a stream of its own, which graphs can be captured on, forwards of backwards too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@contextmanager
def blas(library: str) -> Iterator[None]:
    """Plain products inside run in "cublas" or "cublaslt"; without a device in whatever there is."""
    if not available():
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@contextmanager
def launched(overlap: str, carveout: int) -> Iterator[None]:
    """Few-token links inside are launched as csrc/link.h's set_launches says; without a device as ever."""
    if not available():
        yield
        return
    module = native.load("cuda")
    module.set_launches(overlap, carveout)
    try:
        yield
    finally:
        module.set_launches()


class Graph:
    """``count`` calls, ``calls`` again and again, recorded as one CUDA graph; the stream must be a `side_stream`.

    Every call runs twice before: the first may compile, tune and allocate, which a recording must not.
    """

    def __init__(self, calls: Sequence[Call], count: int) -> None:
        for call in (*calls, *calls):
            call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            for call in islice(cycle(calls), count):
                call()
        self._graph.replay()
        torch.cuda.synchronize()

    def seconds(self) -> float:
        """Time of one replay between two events on the device."""
        return seconds(self._graph.replay)


def seconds(call: Call) -> float:
    """Time between two events around ``call``, all of it enqueued while the device spins."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def settle(seconds: float) -> None:
    """Multiply for so long, until the device's clocks hold."""
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = monotonic() + seconds
    while monotonic() < end:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()


def synchronize() -> None:
    torch.cuda.synchronize()


def release() -> None:
    """Give the allocator's unused memory back, the pools of dropped graphs included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def peak_bytes(call: Call) -> int:
    """Most memory that torch's allocator held at once during ``call``, beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(call: Call) -> int:
    """Kernels, copies and fills that ``call`` starts on the device, as torch's profiler counts them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        for event in profile.events()
    )
