"""What passes between the process that decides and those of the agents, besides messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from recmas.config.parts import Trust
from recmas.config.pattern import LinkKey
from recmas.distributed.sealed import Stamp
from recmas.scheduling.gather import Place
from recmas.scheduling.task import Account, Grown, Task
from recmas.scheduling.worker import HELD
from recmas.system.widths import Features
from recmas.tools import Toolbox


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How every agent is loaded: as `RecursiveMAS.from_pretrained` takes it, but for the device.

    Attributes:
        folder: of the system; every machine of the cluster finds it, and the same there.
        dtype: "auto" is the system's own.
        backend: of the kernels; None is what RECMAS_BACKEND names.
        toolbox: what the last agent may call.
        prefix_reuse: as for `AnswerOptions`.
        held: batches whose prefixes are kept for their next visit: as many as are under way.
    """

    folder: str
    dtype: str = "auto"
    trust_remote_code: bool = False
    compile: bool = False
    accelerate: bool = True
    trust: Trust = field(default_factory=Trust)
    backend: str | None = None
    toolbox: Toolbox = field(default_factory=lambda: Toolbox(()))
    prefix_reuse: bool = True
    held: int = HELD


class Described(NamedTuple):
    """What a loaded agent is: enough to admit rows and to check what it is sent.

    Attributes:
        digest: of the agent with its links and prompts (`recmas.system.fingerprint`).
        link: digest of its inner link; empty without one.
        width: of its hidden states.
        inner: what its inner link maps.
        outer: what the outer links to it map, by key.
        context: positions of its context, where known.
        tokenizer, vocabulary: of its prompts.
        machine: that it is on, by name.
        cores: of that machine that it may use.
        threads: that it computes with; 0 where a device does.
    """

    digest: str
    link: str
    width: int
    inner: Features | None
    outer: Mapping[LinkKey, Features]
    context: int | None
    tokenizer: Any
    vocabulary: int
    machine: str
    cores: int
    threads: int


class Order(NamedTuple):
    """A task for one process.

    Attributes:
        task: without its messages.
        stamp: of the message that is to be made.
        stamps: of the messages that come with the order.
        reads: by sender, for each row of the task, which of the sender's messages, and which row of that.
    """

    task: Task
    stamp: Stamp
    stamps: Sequence[Stamp]
    reads: Mapping[str, Sequence[Place]]


class Done(NamedTuple):
    """What became of an order: what the task took, and of an answer the texts."""

    account: Account
    grown: Mapping[int, Grown]
