"""Where the time of an agent's step goes on a CPU: microseconds of a step, by its pieces.

    python -m benchmarks.step_times --output benchmarks/results/step_times.json

Random float32 models of the benchmarks' shapes, on a prompt of 32 tokens. The clock itself takes about a tenth of a
microsecond, twice for each piece. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch

from benchmarks.harness.machine import Device, origin
from benchmarks.suites.cpu.frozen_cases import SHAPES, Case
from benchmarks.suites.cpu.frozen_steps import Made, Steps
from recmas.engine.growing_cache import Lent
from recmas.files import write_atomically
from recmas_kernels import DecoderSteps
from recmas_kernels.backends.cpu.decoder import DecoderLayers
from recmas_kernels.decoder.run import Known

PIECES: dict[str, tuple[Any, str]] = {
    "kernels": (DecoderLayers, "__call__"),
    "comparing the layers": (Known, "kept"),
    "comparing the cache": (Lent, "holds"),
    "all of the decoder": (DecoderSteps, "__call__"),
}
RUNS, STEPS = 5, 16  # medians of so many runs, each of so many steps


@contextmanager
def clocked(seconds: dict[str, float]) -> Iterator[None]:
    """Add the seconds of every piece to its name."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            begin = perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                seconds[name] += perf_counter() - begin

        return call

    with ExitStack() as stack:
        for name, (place, attribute) in PIECES.items():
            stack.enter_context(mock.patch.object(place, attribute, timed(name, getattr(place, attribute))))
        yield


@torch.no_grad()
def measure(steps: Steps) -> dict[str, float]:
    """Microseconds of a step, by piece, and of what lies around the decoder."""
    fed = steps.hidden[:, None].clone()
    found = defaultdict(list)
    for _ in range(RUNS + 1):  # the first one warms up
        seconds: dict[str, float] = defaultdict(float)
        begin = perf_counter()
        with clocked(seconds):
            for _ in range(STEPS):
                steps.feed(fed)
        seconds["around it"] = perf_counter() - begin - seconds["all of the decoder"]
        for name, total in seconds.items():
            found[name].append(1e6 * total / STEPS)
    return {name: round(median(values[1:]), 1) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    output = parser.parse_args().output
    made, rows = Made(), []
    for shape in SHAPES:
        for batch in (1, 4, 16):
            agent = made.of(shape).agent(torch.float32, True)
            with torch.no_grad():
                steps = Steps(agent, Case(shape, torch.float32, "think", batch))
            rows.append({"model": shape.name, "rows": batch, "microseconds": measure(steps)})
            print(json.dumps(rows[-1]))
    made.close()
    write_atomically(
        output, json.dumps({"made": {**origin(), "device": Device().describe()}, "steps": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
