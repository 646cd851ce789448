"""The GPU grid: which cells, in which order, against whom, and which row of the forecast each one answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.harness.gpu.bench import PRODUCTS_LT
from benchmarks.harness.gpu.forecast import COMPILE, COMPILE_MAX, ROWS, Forecast
from benchmarks.harness.names import PRODUCTS
from benchmarks.peers.link_gpu import BACKWARD, FORWARD, LAUNCHES, REDUCE_OVERHEAD
from recmas_kernels import LinkConfig

INNER = LinkConfig("inner", 2048, 2048, 2048, "identity", norm=False)
INNER_NORMS = LinkConfig("inner", 2048, 2048, 2048, "identity")
OUTER = LinkConfig("outer", 2048, 1536, 1536, "linear", norm=False)
OUTER_RELEASED = LinkConfig("outer", 2048, 3072, 1536, "linear")
SMALL_INNER = LinkConfig("inner", 64, 64, 64, "identity")
SMALL_OUTER = LinkConfig("outer", 64, 48, 48, "linear", norm=False)

PLAIN = ("eager", "addmm", COMPILE, PRODUCTS, PRODUCTS_LT)
AUTOTUNED = ("eager", "addmm", COMPILE, COMPILE_MAX, PRODUCTS, PRODUCTS_LT)
BARE = ("eager", "addmm", COMPILE, REDUCE_OVERHEAD)
UNCOMPILED = ("eager", "addmm", PRODUCTS, PRODUCTS_LT)
LAUNCHED = ("eager", PRODUCTS, *LAUNCHES)
# Seconds that a cell is expected to take; nearly all of it compiles its peers, where there is anything to compile.
UNCOMPILED_SECONDS, LAUNCHED_SECONDS, PLAIN_SECONDS, AUTOTUNED_SECONDS = 4, 5, 15, 60
# Where the second pass, with max-autotune, begins; and what answers no row of the forecast.
LAUNCHED_RANK, TRITON_RANK, AUTOTUNED_RANK, MORE_RANK = 12, 16, 100, 200


def narrow(hidden_features: int) -> LinkConfig:
    return LinkConfig("inner", 2048, hidden_features, 2048, "identity", norm=False)


@dataclass(frozen=True)
class LinkCase:
    """One cell.

    Attributes:
        config: the link.
        tokens: rows of x.
        rank: place in the order of importance, the first first.
        mode: FORWARD without grad, or BACKWARD alone.
        cold: operands out of memory, else out of L2 where it holds them.
        peers: names of `peers.link_gpu.GPU_PEERS`.
        forecast: the row that it answers; None for none.
        graph: recorded as a CUDA graph; else bare, the host's time included.
        agents: links called in one call.
        dtype: of x and of the parameters.
    """

    config: LinkConfig
    tokens: int
    rank: int
    mode: str = FORWARD
    cold: bool = True
    peers: tuple[str, ...] = PLAIN
    forecast: Forecast | None = None
    graph: bool = True
    agents: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def seconds(self) -> float:
        if COMPILE_MAX in self.peers:
            return AUTOTUNED_SECONDS
        if {COMPILE, REDUCE_OVERHEAD} & set(self.peers):
            return PLAIN_SECONDS
        return LAUNCHED_SECONDS if self.peers == LAUNCHED else UNCOMPILED_SECONDS

    @property
    def op(self) -> str:
        return self.config.kind if self.agents == 1 else f"{self.agents} {self.config.kind} links"

    @property
    def shape(self) -> str:
        sizes = f"{self.config.in_features}x{self.config.hidden_features}x{self.config.out_features}"
        return sizes + (" norms" if self.config.norm else "")

    @property
    def id(self) -> str:
        words = (self.op, self.shape, str(self.dtype).removeprefix("torch."), f"T{self.tokens}", self.mode)
        state = ("cold" if self.cold else "warm", "graph" if self.graph else "bare")
        return "-".join(("gpu", *words, *state, str(self.rank))).replace(" ", "-")


def forecast_cases() -> list[LinkCase]:
    """A cell per link row of the forecast, in the order of what they decide."""
    cases = [
        LinkCase(INNER, 1, 1, forecast=ROWS["inner T=1, cold"]),
        LinkCase(INNER, 32, 2, forecast=ROWS["inner T=32, cold"]),
        LinkCase(narrow(128), 16384, 3, forecast=ROWS["inner hidden 128, T=16384"]),
        LinkCase(OUTER, 1536, 4, forecast=ROWS["outer T=1536 forward"]),
        LinkCase(OUTER, 1536, 5, BACKWARD, forecast=ROWS["outer T=1536 backward"]),
        LinkCase(INNER, 4096, 6, forecast=ROWS["inner T=4096"]),
        LinkCase(INNER_NORMS, 4096, 7, forecast=ROWS["inner T=4096, norms"]),
        LinkCase(OUTER, 16384, 8, forecast=ROWS["outer T=16384 forward"]),
        LinkCase(OUTER, 16384, 9, BACKWARD, forecast=ROWS["outer T=16384 backward"]),
        LinkCase(INNER, 1, 10, cold=False, forecast=ROWS["inner T=1, warm"]),
        LinkCase(narrow(256), 16384, 11, forecast=ROWS["inner hidden 256, T=16384"]),
        LinkCase(INNER, 32, 12, agents=4, forecast=ROWS["four agents, inner T=32"]),
    ]
    again = [replace(case, peers=AUTOTUNED, rank=_second_rank(case)) for case in cases if case.agents == 1]
    return cases + again


def _second_rank(case: LinkCase) -> int:
    """Rows whose claim names max-autotune come first."""
    claimed = case.forecast is not None and COMPILE_MAX in case.forecast.claims
    return AUTOTUNED_RANK + case.rank - (50 if claimed else 0)


def launch_cases() -> list[LinkCase]:
    """Few tokens under every kind of launch, weights cold and warm, with norms and without."""
    answers = {(INNER, 32, True): ROWS["inner T=32, cold"], (INNER, 1, False): ROWS["inner T=1, warm"]}
    return [
        LinkCase(config, tokens, LAUNCHED_RANK, cold=cold, peers=LAUNCHED, forecast=answers.get((config, tokens, cold)))
        for cold in (True, False)
        for config in (INNER, INNER_NORMS)
        for tokens in (1, 8, 32)
    ]


def triton_cases() -> list[LinkCase]:
    """Triton's defaults at token counts that divide nothing, and in fp16."""
    cells = [(INNER, 129, torch.bfloat16), (INNER, 1000, torch.float16)]
    cells += [(narrow(128), 1000, torch.bfloat16), (narrow(128), 16384, torch.float16)]
    return [LinkCase(config, tokens, TRITON_RANK, peers=UNCOMPILED, dtype=dtype) for config, tokens, dtype in cells]


def more_cases() -> list[LinkCase]:
    """The released links, the sizes between, and calls without a graph."""
    bare = [
        LinkCase(config, tokens, 30 + index, cold=False, peers=BARE, graph=False)
        for index, (config, tokens) in enumerate(((INNER_NORMS, 1), (INNER_NORMS, 32), (OUTER_RELEASED, 1536)))
    ]
    sizes = [(INNER_NORMS, 1), (INNER_NORMS, 32), (OUTER_RELEASED, 1), (OUTER_RELEASED, 32), (OUTER_RELEASED, 1536)]
    sizes += [(INNER, tokens) for tokens in (2, 4, 8, 16, 64, 128, 266, 512, 1536)]
    graphed = [LinkCase(config, tokens, MORE_RANK + i, peers=UNCOMPILED) for i, (config, tokens) in enumerate(sizes)]
    half = LinkCase(INNER, 32, MORE_RANK + 50, peers=UNCOMPILED, dtype=torch.float16)
    return [*bare, *graphed, half, replace(half, dtype=torch.float32, rank=MORE_RANK + 51)]


def link_cases(full: bool) -> list[LinkCase]:
    """The grid; the small one runs every kind of cell once, on the CPU, and times nothing."""
    if full:
        return forecast_cases() + launch_cases() + triton_cases() + more_cases()
    return [
        LinkCase(SMALL_INNER, 1, 1, peers=("eager", "addmm", COMPILE, PRODUCTS)),
        LinkCase(SMALL_INNER, 7, 2, cold=False, peers=("eager", "addmm"), agents=4),
        LinkCase(SMALL_OUTER, 7, 3, peers=("eager", "addmm", PRODUCTS)),
        LinkCase(SMALL_OUTER, 7, 4, BACKWARD, peers=("eager", "addmm", PRODUCTS)),
        LinkCase(SMALL_INNER, 1, 5, cold=False, peers=("eager", "addmm"), graph=False),
        LinkCase(SMALL_INNER, 7, 6, peers=LAUNCHED),
    ]
