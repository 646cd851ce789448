"""``python -m benchmarks.gpu.repeat``: thousands of link calls with a cache-thrashing kernel between; all equal bits.

Launches of a link overlap, and a race between two of them shows in the bits of some call, if at all: a sanitizer lets
one kernel run at a time. Eager and replayed, few tokens and norms on both sides.
"""

from __future__ import annotations

import argparse
import sys

import torch

from recmas_kernels import LinkConfig
from recmas_kernels.testing import make_link, make_rows

CALLS = 5000
PER_GRAPH = 50
THRASHED = 2**26  # floats that pass through L2 between two calls: more than it holds
CONFIGS = (
    LinkConfig("inner", 2048, 2048, 2048, "identity"),
    LinkConfig("outer", 2048, 3072, 1536, "linear"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=CALLS)
    options = parser.parse_args(arguments)
    device, wrong = torch.device(options.device), 0
    other = torch.ones(THRASHED if device.type == "cuda" else 64, device=device)
    for config in CONFIGS:
        for tokens in (1, 8, 32):
            link = make_link(config, torch.bfloat16).to(device)
            x = make_rows(tokens, config.in_features, dtype=torch.bfloat16).to(device)
            with torch.no_grad():
                found = _different(link, x, other, options.calls // (len(CONFIGS) * 3))
            wrong += found
            print(f"{config.kind}, {tokens} tokens: {found} calls with other bits")
    return 1 if wrong else 0


def _different(link: torch.nn.Module, x: torch.Tensor, other: torch.Tensor, calls: int) -> int:
    expected, differs = link(x), torch.zeros((), dtype=torch.int64, device=x.device)

    def one() -> None:
        other.mul_(1.0)
        differs.add_((link(x) != expected).any())

    for _ in range(calls // 2):
        one()
    if x.is_cuda:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(PER_GRAPH):
                one()
        for _ in range(max(1, calls // 2 // PER_GRAPH)):
            graph.replay()
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
