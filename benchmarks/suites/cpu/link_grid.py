"""The grid of links on a CPU: which cells are measured, against whom, and what is claimed of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.harness.goals import Goal
from benchmarks.harness.names import EAGER_FLOAT32, PRODUCTS, ZENTORCH
from benchmarks.harness.shapes import DTYPES, INNER, NARROW, OUTER, SMALL_INNER, SMALL_OUTER
from benchmarks.peers.link import zentorch_serves
from recmas_kernels import LinkConfig

PLAIN_PEERS = ("eager", "addmm")
# Compiling takes from seconds to a minute per cell, so these peers run where the claims about them are made.
COMPILE_TOKENS = (1, 8, 32, 128, 512)
FROZEN_TOKENS = (4, 8, 16, 32)


@dataclass(frozen=True)
class LinkCase:
    """One cell of the link grid.

    Attributes:
        config: the link.
        dtype: of x and of the parameters.
        tokens: rows of x.
        training: forward and backward with every gradient; else forward without grad.
        cold: caches emptied before every call, as a model's body would between two steps of a rollout.
        unpacked: without grad, outside of a `packed` scope: the weights are read as they are stored.
        peers: names of `peers.link.PEERS`.
    """

    config: LinkConfig
    dtype: torch.dtype
    tokens: int
    training: bool = False
    cold: bool = False
    unpacked: bool = False
    peers: tuple[str, ...] = PLAIN_PEERS

    @property
    def shape(self) -> str:
        return f"{self.config.in_features}x{self.config.hidden_features}x{self.config.out_features}"

    @property
    def id(self) -> str:
        mode = "train" if self.training else "infer"
        dtype = str(self.dtype).removeprefix("torch.")
        cold, unpacked = "-cold" if self.cold else "", "-unpacked" if self.unpacked else ""
        return f"cpu-{self.config.kind}-{self.shape}-{dtype}-T{self.tokens}-{mode}{unpacked}{cold}"

    @property
    def mode(self) -> str:
        """The record's name of the pass."""
        return "forward+backward" if self.training else "forward, unpacked" if self.unpacked else "forward"

    def goal(self, bf16_products: bool) -> Goal:
        """What is claimed of this cell; ``bf16_products`` says that the chip multiplies bfloat16 itself."""
        if self.config.kind == "outer" or self.cold:
            return Goal()
        if self.unpacked:
            return Goal(1.1) if self.dtype is torch.float32 else Goal() if bf16_products else Goal(4.0)
        if self.dtype is torch.bfloat16:
            if bf16_products or self.config != INNER:
                return Goal()
            if self.training:
                return Goal(3.0, 4.0) if self.tokens == 512 else Goal()
            return _first(self.tokens, {1: Goal(1.7, 2.0), 32: Goal(4.0, 6.0), 512: Goal(4.0, 5.0)})
        if self.training:
            return Goal()
        if self.config == NARROW:
            return Goal(1.4, 2.0) if self.tokens <= 32 else Goal()
        bounds = {
            1: Goal(1.1, 1.2),
            8: Goal(2.0, 2.4),
            16: Goal(1.8, 2.1),
            32: Goal(1.45, 1.7),
            64: Goal(1.25, 1.4),
            128: Goal(1.1, 1.2),
            512: Goal(0.97, 1.05),
        }
        return _first(self.tokens, bounds) if self.config == INNER else Goal()


def _first(tokens: int, bounds: dict[int, Goal]) -> Goal:
    """The goal of the smallest bound that is not below ``tokens``."""
    return next((goal for bound, goal in bounds.items() if tokens <= bound), Goal())


def link_cases(full: bool) -> list[LinkCase]:
    """The link grid; the small one checks every kind of cell in seconds and claims nothing."""
    if not full:
        return [
            LinkCase(config, dtype, tokens, training, peers=_peers(dtype, PRODUCTS))
            for config in (SMALL_INNER, SMALL_OUTER)
            for dtype in DTYPES
            for tokens in (1, 7)
            for training in (False, True)
        ] + [LinkCase(SMALL_OUTER, dtype, 7, unpacked=True, peers=_peers(dtype)) for dtype in DTYPES]
    cases = []
    for dtype in DTYPES:
        plain, measured = _peers(dtype), _peers(dtype, PRODUCTS)
        for tokens in (1, 4, 8, 16, 32, 64, 128, 256, 512):
            cases.append(LinkCase(INNER, dtype, tokens, peers=_peers(dtype, *_compiled(tokens), PRODUCTS)))
        cases += [LinkCase(INNER, dtype, tokens, cold=True, peers=plain) for tokens in (1, 8, 32)]
        cases += [LinkCase(INNER, dtype, tokens, unpacked=True, peers=plain) for tokens in (1, 8, 32)]
        for config in (NARROW, OUTER):
            cases += [LinkCase(config, dtype, tokens, peers=measured) for tokens in (1, 8, 32, 512)]
        cases += [
            LinkCase(INNER, dtype, 1, training=True, peers=measured),
            LinkCase(INNER, dtype, 32, training=True, peers=measured),
            LinkCase(INNER, dtype, 512, training=True, peers=_peers(dtype, "compile", PRODUCTS)),
            LinkCase(OUTER, dtype, 128, training=True, peers=measured),
        ]
    return cases


def _peers(dtype: torch.dtype, *more: str) -> tuple[str, ...]:
    """The plain peers and ``more``; beside 16-bit cells float32, which a user of a slow 16-bit library would choose."""
    eager, *others = PLAIN_PEERS
    return (eager, *([] if dtype is torch.float32 else [EAGER_FLOAT32]), *others, *more)


def _compiled(tokens: int) -> list[str]:
    """Those that compile for so many tokens, as far as they are installed."""
    compiled = ["compile"] if tokens in COMPILE_TOKENS else []
    if tokens in FROZEN_TOKENS:
        compiled.append("compile-frozen")
    if tokens in COMPILE_TOKENS and zentorch_serves():
        compiled.append(ZENTORCH)
    return compiled
