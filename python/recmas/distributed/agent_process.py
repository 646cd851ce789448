"""`AgentProcess`: one agent of a system in a process of its own. It knows nothing of Ray."""

from __future__ import annotations

import gc
import platform
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from recmas.agents.loading import read_dtype
from recmas.config.system_json import SystemSpec
from recmas.distributed.cores import cores
from recmas.distributed.order import Described, Done, Loading, Order
from recmas.distributed.sealed import seal, unseal
from recmas.engine.messages import Message
from recmas.scheduling.gather import gather
from recmas.scheduling.task import Account, Grown
from recmas.scheduling.worker import Worker
from recmas.system.fingerprint import link_digest, member_digest
from recmas.system.loading import load_member
from recmas.system.widths import features
from recmas_kernels import packed

ENDED = 64
"""Numbers of tasks that are kept when they have ended: what is said of these comes too late."""


class AgentProcess:
    """One agent at work for another process.

    Args:
        threads: that it computes with.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._scope = ExitStack()

    def load(self, loading: Loading, spec: SystemSpec, role: str, device: str, key: bytes) -> Described:
        """Load an agent, in the place of one that is there.

        Args:
            loading: how.
            spec: of the system, as whoever asks has read it, whatever stands in the folder by now.
            role: which.
            device: where it computes.
            key: seals messages, those of this run.

        Raises:
            ValueError: as `RecursiveMAS.from_pretrained`.
        """
        torch.set_num_threads(self._threads)
        self._scope.close()
        gc.unfreeze()
        self._key = key
        self._dropped: dict[int, set[int]] = {}
        self._ended: deque[int] = deque(maxlen=ENDED)
        member = load_member(
            Path(loading.folder),
            spec,
            role,
            device,
            read_dtype(loading.dtype),
            loading.trust_remote_code,
            loading.compile,
            loading.accelerate,
            loading.trust,
        )
        pattern = spec.pattern
        self._scope.enter_context(packed([link for link in (member.inner_link, *member.outer_links.values()) if link]))
        self._worker = Worker(
            member,
            loading.toolbox if role == pattern.last else None,
            prefix_reuse=loading.prefix_reuse,
            held=loading.held,
        )
        gc.collect()  # what loading left in circles would stay, too
        gc.freeze()  # modules and weights stay: to look through them for garbage would take longer than ten visits
        return Described(
            member_digest(member, pattern),
            link_digest(member.inner_link),
            member.agent.hidden_size,
            None if member.inner_link is None else features(member.inner_link),
            {key: features(link) for key, link in member.outer_links.items()},
            member.agent.context_length,
            member.agent.tokenizer,
            member.agent.vocabulary,
            platform.node(),
            cores(),
            torch.get_num_threads() if device == "cpu" else 0,
        )

    def run(self, order: Order, *sealed: bytes) -> tuple[Done, bytes]:
        """What became of an order, and the sealed message, empty after an answer.

        Raises:
            RefusedError: a message is not the one that was meant.
            Exception: of whatever kind, from the rows.
        """
        task, messages = order.task, self._opened(order, sealed)
        if task.work.latent_steps is not None:
            latents, account = self._worker.think(task, messages)
            return Done(account, {}), seal(latents, order.stamp, self._key)
        if not task.work.final:
            texts, account = self._worker.text(task, messages)
            return Done(account, {}), seal(texts, order.stamp, self._key)
        account, whole = Account(), dict[int, Grown]()
        for step in self._worker.write(task, messages, account):
            _add(whole, step)
        return Done(account, whole), b""

    def stream(self, order: Order, pace: float, *sealed: bytes) -> Iterator[Done]:
        """`run` for an answer that is shown as it grows: what was added, at most every `pace` seconds.

        Rows that have ended are told at once.
        """
        task = order.task
        task.dropped = self._dropped.setdefault(task.number, set())
        account, grown, told = Account(), dict[int, Grown](), 0.0
        try:
            for step in self._worker.write(task, self._opened(order, sealed), account):
                _add(grown, step)
                now = time.monotonic()
                if now - told >= pace or any(one.took is not None for one in step.values()):
                    yield Done(account, grown)
                    grown, told = {}, now
        finally:
            self._ended.append(task.number)
            del self._dropped[task.number]  # tasks that wait keep theirs
        yield Done(account, grown)

    def drop(self, number: int, places: set[int]) -> None:
        """Nobody waits any more for the texts of these rows of a task; called beside `stream`, or before it."""
        if number not in self._ended:
            self._dropped.setdefault(number, set()).update(places)

    def watch(self) -> None:
        """Work on for ever: whoever called this hears of it when the process has ended."""
        threading.Event().wait()

    def _opened(self, order: Order, sealed: tuple[bytes, ...]) -> dict[str, Message]:
        messages = [unseal(one, stamp, self._key) for one, stamp in zip(sealed, order.stamps, strict=True)]
        sent = list(zip(order.stamps, messages, strict=True))
        return {
            sender: gather([message for stamp, message in sent if stamp.sender == sender], places)
            for sender, places in order.reads.items()
        }


def _add(whole: dict[int, Grown], step: dict[int, Grown]) -> None:
    for place, grown in step.items():
        if place in whole:
            known = whole[place]
            known.tokens += grown.tokens
            known.text += grown.text
            known.took = grown.took
        else:
            whole[place] = grown
