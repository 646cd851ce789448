"""The latent rollout's loop, and how it is run: step by step, at fixed shapes, or as one captured CUDA graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recmas.engine.continuation import Continuation, Past
from recmas.engine.fixed_shapes import FixedShapeContinuation, bucket, unfit
from recmas.engine.messages import run_link

Link = Callable[[Tensor], Tensor]
BUCKETS = 2
"""Buckets whose buffers an agent keeps, each as large as a batch's cache; the one unused for longest goes first."""
_BUFFERS = threading.Lock()
"""Held from filling a bucket's buffers to copying its states out: threads, on one stream, may share an agent."""
MOVES = 2
"""Times that weights may be found elsewhere before no more graphs are captured: they come and go with every visit."""


def loop(step: Callable[[Tensor], Tensor], hidden: Tensor, steps: int, link: Link) -> Tensor:
    """e_1..e_m, ``[B, m, d]``, from the hidden states ``[B, d]`` at the last prompt position.

    ``e_k = link(h_k)``, ``h_(k+1) = step(e_k)``; the last e is not fed back.
    """
    states = [run_link(link, hidden)]
    for _ in range(steps - 1):
        states.append(run_link(link, step(states[-1])))
    return torch.stack(states, dim=1)


class Rollouts:
    """Runs the rollouts of one agent.

    On CUDA the whole loop is captured once per bucket, link and number of steps, and replayed for every batch that fits
    the bucket. A graph reads weights where they were: it is captured again when a model or link was moved, not when
    parameters change in place. Elsewhere, and where a model cannot run at fixed shapes, the loop runs as it stands.

    Args:
        compiled: run the step through `torch.compile`, at fixed shapes, on any device.
        graphs: capture graphs on CUDA.
        fixed_shapes: fixed shapes even where nothing is captured or compiled.

    Attributes:
        reason: why the latest rollout was not captured; empty if it was.
        captures: graphs captured so far.
    """

    def __init__(self, *, compiled: bool = False, graphs: bool = True, fixed_shapes: bool = False) -> None:
        self.compiled, self.graphs, self.fixed_shapes = compiled, graphs, fixed_shapes
        self.reason = ""
        self.captures = 0
        self._moves, self._failed = 0, ""
        self._buckets: dict[tuple[object, ...], _Bucket] = {}

    def __call__(self, past: Past, hidden: Tensor, steps: int, link: Link, *, weights_stay: bool = True) -> Tensor:
        """The rollout ``[B, m, d]`` of a batch whose prompt `past` has read; `steps` at least 1.

        A graph captured over weights that do not stay (offload) would hold addresses of memory that is freed.
        """
        self.reason = self._uncaptured(hidden, steps, link, weights_stay)
        fixed = steps > 1 and (self.fixed_shapes or self.compiled)
        if fixed or not self.reason:
            unfitting = unfit(past)
            self.reason, fixed = self.reason or unfitting, fixed and not unfitting
        if not self.reason:
            assert isinstance(link, nn.Module)
            assert isinstance(past, Continuation)
            try:
                with _BUFFERS:
                    return self._bucket(past, steps).replay(past, hidden, steps, link, self)
            except Exception as error:  # whatever a model does that cannot be captured, and memory that is short
                self._buckets.clear()
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self._failed = self.reason = f"no graph could be captured: {reason}"
                warnings.warn(f"the latent rollout goes on without CUDA graphs: {self.reason}", stacklevel=2)
        if fixed:
            assert isinstance(past, Continuation)
            with _BUFFERS:
                return self._bucket(past, steps).run(past, hidden, steps, link)
        dtype = past.decoder.get_input_embeddings().weight.dtype
        return loop(lambda state: past.feed(state[:, None].to(dtype)), hidden, steps, link)

    def _uncaptured(self, hidden: Tensor, steps: int, link: Link, weights_stay: bool) -> str:
        if not weights_stay:
            return "weights are on the device for visits only"
        if not hidden.is_cuda:
            return f"graphs are captured on CUDA; this is {hidden.device.type}"
        if not self.graphs:
            return "graphs are off"
        if steps == 1:
            return "a single step feeds nothing back"
        if not isinstance(link, nn.Module):
            return "the link is not a module, so a change of its weights cannot be noticed"
        if self._moves > MOVES:
            return "weights move between rollouts"
        return self._failed

    def _bucket(self, past: Continuation, steps: int) -> _Bucket:
        batch, length = past.mask.shape
        weight = past.decoder.get_input_embeddings().weight
        key = (*bucket(batch, length + steps - 1), weight.device, weight.dtype, self.compiled)
        held = self._buckets.pop(key, None)
        if held is None:
            while len(self._buckets) >= BUCKETS:
                del self._buckets[next(iter(self._buckets))]
            held = _Bucket(FixedShapeContinuation(past, *key[:2], compiled=self.compiled))
        self._buckets[key] = held
        return held

    def forget(self) -> None:
        """Drop all buffers and graphs, as before the agent is moved or cast."""
        self._buckets.clear()

    def captured(self, moved: bool) -> None:
        """Count one more graph; `moved`: it replaces one whose weights are elsewhere now."""
        self.captures += 1
        self._moves += moved


class _Bucket:
    """The buffers of one bucket, and the graphs captured on them."""

    def __init__(self, continuation: FixedShapeContinuation) -> None:
        self.continuation = continuation
        self._graphs: dict[tuple[nn.Module, int], tuple[object, Any, Tensor, Tensor]] = {}

    def run(self, past: Continuation, hidden: Tensor, steps: int, link: Link) -> Tensor:
        self.continuation.load(past)
        return loop(self.continuation.step, self._rows(hidden), steps, link)[: hidden.shape[0]]

    def replay(self, past: Continuation, hidden: Tensor, steps: int, link: nn.Module, rollouts: Rollouts) -> Tensor:
        key = (link, steps)
        modules = (link, past.decoder)
        tensors = [kept for module in modules for kept in (*module.parameters(), *module.buffers())]
        where = tuple((kept.data_ptr(), kept.dtype) for kept in tensors)
        found = self._graphs.get(key)
        if found is None or found[0] != where:
            moved = self._graphs.pop(key, None) is not None
            found = (where, *self._capture(past, self._rows(hidden), steps, link))
            self._graphs[key] = found
            rollouts.captured(moved)
        _, graph, start, states = found
        self.continuation.load(past)
        start.copy_(self._rows(hidden))
        graph.replay()
        return states[: hidden.shape[0]].clone()

    def _capture(self, past: Continuation, hidden: Tensor, steps: int, link: nn.Module) -> tuple[Any, Tensor, Tensor]:
        """The graph, the buffer it reads its first hidden states from, and the one it leaves its states in."""
        start = hidden.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(hidden.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles, tunes and allocates what the capture must not
                for _ in range(2):
                    self.continuation.load(past)
                    loop(self.continuation.step, start, steps, link)
            torch.cuda.current_stream().wait_stream(side)
            self.continuation.load(past)
            with torch.cuda.graph(graph):
                states = loop(self.continuation.step, start, steps, link)
        return graph, start, states

    def _rows(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[B, d]`` for all rows of the bucket."""
        return hidden[torch.arange(self.continuation.rows, device=hidden.device).clamp_(max=hidden.shape[0] - 1)]
