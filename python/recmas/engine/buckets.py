"""Buffers of fixed shapes that an agent keeps from one batch to the next, and what runs on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from torch import nn

from recmas.engine.fixed_shapes import FixedShapeContinuation
from recmas.engine.hooks import hooked
from recmas.engine.model_state import ModelState
from recmas.engine.step_graph import StepGraph

BUCKETS = 2
"""Buckets whose buffers an agent keeps, each as large as a batch's cache; the one unused for longest goes first."""
PROGRAMS = 4
"""Programs that a bucket keeps: links that an agent thinks through, and tokens, likeliest and sampled."""


class Program(Protocol):
    """One step, on buffers of its own; every call moves the continuation it was made for by one column."""

    @property
    def modules(self) -> tuple[nn.Module, ...] | None:
        """Whose weights it reads beside the decoder's; None where that is unknown."""

    def reset(self) -> None:
        """Before it is run to no end, with whatever its buffers hold."""

    def __call__(self) -> None: ...


class Ready:
    """A program on its bucket.

    Args:
        program: the program.
        decoder: whose weights it reads beside those of its own modules.
    """

    def __init__(self, program: Any, decoder: nn.Module) -> None:
        self.program, self._decoder = program, decoder
        self._graph: StepGraph | None = None
        self._where: object = None
        self._states: list[ModelState] = []

    def keep(self, graph: StepGraph) -> None:
        """One step of the program, captured as its modules are now."""
        self._graph, self._where = graph, self._addresses()
        self._states = [ModelState(module, tensors=False) for module in self._modules()]

    def captured(self) -> StepGraph | None:
        """The graph, if its modules compute the same of the weights where these were; writes to them are no matter."""
        if self._graph is None or self._where != self._addresses():
            return None
        return self._graph if all(state.holds() for state in self._states) else None

    def hooked(self) -> bool:
        """Whether one of its modules has hooks."""
        return any(map(hooked, self._modules()))

    def _modules(self) -> tuple[nn.Module, ...]:
        return (self._decoder, *self.program.modules)

    def _addresses(self) -> object:
        """Where the weights are that the program reads."""
        tensors = [tensor for module in self._modules() for tensor in (*module.parameters(), *module.buffers())]
        return tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)


class Bucket:
    """The buffers of one bucket, and the programs that ran on them last.

    Args:
        continuation: holds the buffers.

    Attributes:
        continuation: as given.
        sights: runs that used the bucket so far.
    """

    def __init__(self, continuation: FixedShapeContinuation) -> None:
        self.continuation, self.sights = continuation, 0
        self._ready: dict[Hashable, Ready] = {}

    def ready(self, name: Hashable, make: Callable[[FixedShapeContinuation], Program]) -> Ready:
        """The program of this name."""
        found = self._ready.pop(name, None) or Ready(make(self.continuation), self.continuation.decoder)
        self._ready[name] = found
        while len(self._ready) > PROGRAMS:
            del self._ready[next(iter(self._ready))]
        return found


class BucketPool:
    """Buckets that nobody uses now. Whoever takes one has it alone: a stream of text may last as long as it likes."""

    def __init__(self) -> None:
        self.held: dict[Hashable, Bucket] = {}
        self._lock = threading.Lock()

    def take(self, key: Hashable) -> Bucket | None:
        with self._lock:
            return self.held.pop(key, None)

    def give(self, key: Hashable, bucket: Bucket) -> None:
        """Keep a bucket, as the latest of all; of two with one key, the later."""
        with self._lock:
            self.held.pop(key, None)
            self.held[key] = bucket
            while len(self.held) > BUCKETS:
                del self.held[next(iter(self.held))]
