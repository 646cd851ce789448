"""How an agent's single positions are run, latent steps and tokens alike: at fixed shapes, and as CUDA graphs.

A program is what one step computes around the decoder's: a latent through the inner link, or a token through the LM
head. It works on buffers that stay in place, so that one captured step serves every step of every batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from recmas.engine import step_graph
from recmas.engine.buckets import Bucket, BucketPool, Program, Ready
from recmas.engine.continuation import Continuation, Past
from recmas.engine.fixed_shapes import FixedShapeContinuation, bucket, unfit
from recmas.engine.growing_cache import GROWTH
from recmas.errors import first_line

AT_ONCE = 64
"""Steps to come for which a graph is captured at once, as capturing takes about three; for fewer, when a bucket is used
a second time."""
SPARE = 4
"""Captures that need not have paid yet: two programs on two buckets. Beyond them no graph is captured while captures
outnumber the runs that found theirs, as with weights that move at every visit."""


P = TypeVar("P", bound=Program)


class Stepper:
    """Runs the steps of one agent.

    On CUDA a step is captured once per bucket and program, and replayed for every step of every batch that fits the
    bucket. A graph reads weights where they were and does what modules did: it is captured again when a weight moved or
    an adapter or a setting is another one (`ModelState`), not when a weight changes in place. Where modules have hooks,
    steps are neither replayed nor compiled.
    Elsewhere, and where a model cannot run at fixed shapes, steps run on the growing cache.

    Args:
        compiled: run the decoder's step through `torch.compile`, at fixed shapes, on any device.
        graphs: capture graphs on CUDA.
        fixed_shapes: fixed shapes even where nothing is captured or compiled.
        look: tokens after which the host looks for rows that ended; None is 8 on CUDA, where looking stops the device,
            and 1 elsewhere.

    Attributes:
        reason: why the latest run was not captured; empty if it was.
        captures: graphs captured so far.
        reuses: runs that found their graph captured.
    """

    def __init__(
        self, *, compiled: bool = False, graphs: bool = True, fixed_shapes: bool = False, look: int | None = None
    ) -> None:
        self.compiled, self.graphs, self.fixed_shapes, self.look = compiled, graphs, fixed_shapes, look
        self.reason = ""
        self.captures = self.reuses = 0
        self.pool = BucketPool()
        self._failed = ""

    @contextmanager
    def begin(
        self,
        past: Past,
        steps: int,
        name: Hashable,
        make: Callable[[FixedShapeContinuation], P],
        *,
        most: int | None = None,
        weights_stay: bool = True,
    ) -> Iterator[Running[P] | None]:
        """The batch whose prompt `past` has read, at fixed shapes; None where it goes on from `past`.

        Its buffers are this run's alone until the block is left.

        Args:
            past: of the prompt.
            steps: to come, for which there is room.
            name: of the program; one name, one computation.
            make: the program for a continuation.
            most: steps that are worth room when more are reserved; None is `steps`.
            weights_stay: False where weights are on the device for a visit only (offload): a graph would hold
                addresses of memory that is freed.
        """
        self.reason = self._uncaptured(past, steps, weights_stay)
        wanted = steps > 0 and (not self.reason or self.fixed_shapes or self.compiled)
        unfitting = unfit(past) if wanted else ""
        self.reason = self.reason or unfitting
        if not wanted or unfitting:
            yield None
            return
        assert isinstance(past, Continuation)
        run = Running(self, past, steps if most is None else most, name, make)
        try:
            run.reserve(steps)
            yield None if self._failed and not (self.fixed_shapes or self.compiled) else run
        finally:
            run.close()

    def forget(self) -> None:
        """Drop all buffers and graphs, as before the agent is moved or cast."""
        self.pool = BucketPool()

    def capture(
        self, held: Bucket, ready: Ready, source: Continuation | FixedShapeContinuation, steps: int
    ) -> step_graph.StepGraph | None:
        """The graph of a program on its bucket, if there is one or it is time to capture it.

        Args:
            held: the bucket.
            ready: the program.
            source: the batch that it will run.
            steps: of that batch to come.
        """
        if self._failed:
            return None
        if ready.program.modules is None:
            self.reason = "the link is not a module, so a change of its weights cannot be noticed"
            return None
        if ready.hooked():
            self.reason = "a module has hooks, which a graph would not call"
            return None
        if (found := ready.captured()) is not None:
            self.reuses += 1
            return found
        if held.sights == 0 and steps < AT_ONCE:
            self.reason = "a graph is captured when its bucket is used again"
            return None

        def reset() -> None:
            held.continuation.load(source)
            ready.program.reset()

        self.captures += 1
        try:
            graph = step_graph.StepGraph(ready.program, reset, source.mask.device)
        except Exception as error:  # whatever a model does that cannot be captured, and memory that is short
            self.forget()
            self._failed = self.reason = f"no graph could be captured: {first_line(error)}"
            warnings.warn(f"steps go on without CUDA graphs: {self.reason}", stacklevel=2)
            return None
        ready.keep(graph)
        return graph

    def _uncaptured(self, past: Past, steps: int, weights_stay: bool) -> str:
        device = past.mask.device.type
        if not weights_stay:
            return "weights are on the device for visits only"
        if device != step_graph.KIND:
            return f"graphs are captured on CUDA; this is {device}"
        if not self.graphs:
            return "graphs are off"
        if steps == 0:
            return "a single step feeds nothing back"
        if self.captures > self.reuses + SPARE:
            return "graphs were captured more often than they were used again"
        return self._failed


class Running(Generic[P]):
    """A batch in a bucket, which it leaves for a larger one when that is full.

    Args:
        stepper: whose buckets these are.
        past: of the prompt.
        most: steps that are worth room.
        name: of the program.
        make: the program for a continuation.
    """

    def __init__(
        self,
        stepper: Stepper,
        past: Continuation,
        most: int,
        name: Hashable,
        make: Callable[[FixedShapeContinuation], P],
    ) -> None:
        self._stepper, self._pool, self._name, self._make = stepper, stepper.pool, name, make
        self._captures = not stepper.reason
        self._batch: Continuation | FixedShapeContinuation = past
        self._most = past.length + most
        self._key: Hashable = None
        self._bucket: Bucket | None = None
        self._ready: Ready | None = None
        self._graph: step_graph.StepGraph | None = None

    @property
    def program(self) -> P:
        """On the batch's bucket: another one after `reserve` has moved it, whose buffers hold nothing."""
        if self._ready is None:
            raise ValueError("nothing was reserved")
        found: P = self._ready.program
        return found

    def reserve(self, steps: int) -> None:
        """Make room for so many more steps, all of which run before anybody may move weights."""
        needed = self._batch.length + steps
        if self._bucket is None:
            self._move(needed)
        elif needed > self._bucket.continuation.columns:
            self._move(max(needed, min(int(GROWTH * needed), self._most)))
        elif self._graph is not None and self._ready is not None:
            self._graph = self._ready.captured()
        assert self._bucket is not None
        self._bucket.continuation.look()

    def __call__(self) -> None:
        """One more step."""
        self._batch.length += 1
        if self._graph is not None:
            self._graph.replay()
        else:
            self.program()

    def close(self) -> None:
        """Give the bucket back."""
        if self._bucket is not None:
            self._pool.give(self._key, self._bucket)
            self._bucket = None

    def _move(self, length: int) -> None:
        """Into a bucket of so many columns or more.

        Buckets of two streams are two, as nothing orders what they run; and torch refuses to write to tensors that were
        made in inference mode outside of it.
        """
        stepper, source = self._stepper, self._batch
        weight = source.decoder.get_input_embeddings().weight
        rows, columns = bucket(source.mask.shape[0], length)
        inference, stream = torch.is_inference_mode_enabled(), step_graph.current_stream(weight.device)
        key = rows, columns, weight.device, weight.dtype, stepper.compiled, inference, stream
        held = self._pool.take(key)
        if held is None:
            held = Bucket(FixedShapeContinuation(source, rows, columns, compiled=stepper.compiled))
        self._ready = held.ready(self._name, self._make)
        self._graph = stepper.capture(held, self._ready, source, length - source.length) if self._captures else None
        held.sights += 1
        held.continuation.load(source)
        self.close()
        self._key, self._bucket, self._batch = key, held, held.continuation
