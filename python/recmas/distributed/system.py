"""`RaySystem`: a system whose agents are in processes of a cluster, asked as `RecursiveMAS` is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recmas.answering.answers import Answer, Answers, RowsFailedError
from recmas.answering.manner import Manner
from recmas.answering.options import AnswerOptions
from recmas.answering.plan import OnAnswers
from recmas.answering.run import Question
from recmas.config.outline import Outline
from recmas.config.system_json import read_spec
from recmas.distributed.executor import RayExecutor
from recmas.distributed.order import Loading
from recmas.prompts.rows import length, read_row
from recmas.scheduling.admission import check_room
from recmas.scheduling.dispatcher import Dispatcher, Limits
from recmas.scheduling.row import Row, Sink, VisitDone

if TYPE_CHECKING:
    from typing_extensions import Self


_LOOK = 0.2
"""Seconds between two reports of progress."""
_AHEAD = 1
"""Micro-batches that wait at a process while it works."""


class RaySystem:
    """A system in a cluster that this process is part of; a context, at whose end its processes end.

    Args:
        loading: the system, and how its agents are loaded.
        micro_batch: rows at once at one agent; None takes the batch size of a run. Agents work at the same time on as
            many micro-batches of it as there are.
        in_flight: micro-batches on their way at once; None takes one per process and two that wait.
        pace: seconds between two pieces of a text that grows; None shows texts at their end.

    Raises:
        ValueError: as `RayExecutor`.
    """

    def __init__(
        self,
        loading: Loading,
        *,
        micro_batch: int | None = None,
        in_flight: int | None = None,
        pace: float | None = None,
    ) -> None:
        spec = read_spec(Path(loading.folder))
        self.outline = Outline.of(spec)
        self.pattern, self.defaults = spec.pattern, spec.defaults
        self._loading, self._micro_batch = loading, micro_batch
        self.outline.check_run(1, links=False)
        processes = sum(agent.placement.replicas for agent in spec.agents.values())
        self.in_flight = in_flight or 2 + processes
        self.executor = RayExecutor(spec, replace(loading, held=self.in_flight), pace=pace, ahead=_AHEAD)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.close()

    @property
    def faults(self) -> Mapping[str, int]:
        """How often what went wrong since the processes were started, by its name in words."""
        return self.executor.faults

    def fingerprint(self) -> str:
        """What decides the answers, as a digest: that of the same system in one process."""
        return self.executor.digest

    def steps_by_role(self, asked: int | Mapping[str, int] | None) -> dict[str, int]:
        """Latent steps of every agent (`recmas.config.system_json.steps_by_role`)."""
        return self.outline.steps_by_role(asked)

    def check(self, rows: Iterable[Question], options: AnswerOptions) -> None:
        """Raise what `answer` would raise before any model runs."""
        self._rows(rows, Manner(self.outline, self._checked(options)), _News().sink)

    def answer(
        self,
        rows: Iterable[Question],
        options: AnswerOptions | None = None,
        *,
        on_text: Callable[[int, str], object] | None = None,
        on_answers: OnAnswers | None = None,
        skip: Collection[int] = (),
        progress: Callable[[int], object] | None = None,
        **changes: Any,
    ) -> Answers:
        """Answer questions, as `RecursiveMAS.answer` does; rows do not wait for each other.

        Raises:
            ValueError: before any model runs; an option that this has not, too.
            RowsFailedError: at the end, if rows failed.
        """
        asked = self._checked(AnswerOptions.of(options, **changes))
        manner = Manner(self.outline, asked)
        news = _News()
        made = self._rows(rows, manner, news.sink)
        answers, failed = Answers(Answer() for _ in made), dict[int, Exception]()
        visits = len(list(manner.pattern.visits(manner.rounds)))
        if progress is not None:
            progress(visits * len(set(skip) & set(range(len(made)))))
        assert isinstance(asked.batch_size, int)
        size = self._micro_batch or asked.batch_size
        coming = _groups([row for row in made if row.number not in skip], size)
        limits = Limits(window=0.0, rows=size, tokens=size * max((row.tokens for row in made), default=1))
        dispatcher = Dispatcher(_Borrowed(self.executor), limits)
        try:
            left = 0
            while True:
                while left <= size * (self.in_flight - 1) and (group := next(coming, None)) is not None:
                    left += len(group)
                    dispatcher.add(*group)
                if left == 0:
                    break
                for number, item in news.wait():
                    if isinstance(item, str):
                        if on_text is not None:
                            on_text(number, item)
                    elif isinstance(item, VisitDone):
                        stage = f"round {item.round}, {item.role}"
                        answers.seconds[stage] = answers.seconds.get(stage, 0.0) + item.seconds / item.rows
                        if progress is not None:
                            progress(1)
                    elif isinstance(item, Exception):
                        failed[number] = item
                        left -= 1
                    else:
                        answers[number] = item
                        left -= 1
                        if on_answers is not None:
                            on_answers([number], Answers([item]))
        finally:
            dispatcher.close()
        if failed:
            raise RowsFailedError(answers, failed)
        return answers

    def _checked(self, options: AnswerOptions) -> AnswerOptions:
        """Options that processes were started with cannot be changed; others are not there."""
        if options.trace:
            raise ValueError("trace: agents in other processes keep no handoffs; ask the system in one process")
        if options.settle is not None:
            raise ValueError("settle: agents in other processes go all rounds; ask the system in one process")
        if options.batch_size == "auto":
            raise ValueError("batch_size: 'auto' measures the memory of one process; give a number")
        if options.prefix_reuse != self._loading.prefix_reuse:
            raise ValueError(f"prefix_reuse: agents were started with {self._loading.prefix_reuse}")
        if options.toolbox.tools and options.toolbox is not self._loading.toolbox:
            raise ValueError("tools: agents were started with others")
        return options

    def _rows(self, rows: Iterable[Question], manner: Manner, sink: Callable[[int], Sink]) -> list[Row]:
        fields = [read_row(row, index) for index, row in enumerate(rows)]
        made = []
        for number, row in enumerate(fields):
            rooms = self.executor.rooms(manner.rounds, row, number)
            try:
                tokens = check_room(manner, rooms)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
            stream = (manner.options.seed, number)
            made.append(Row(number, row, manner, sink(number), stream=stream, tokens=tokens))
        return made


class _Borrowed:
    """An executor that outlives the dispatcher of one run."""

    def __init__(self, executor: RayExecutor) -> None:
        self._executor = executor
        self.lanes, self.start, self.rooms = executor.lanes, executor.start, executor.rooms

    @property
    def faults(self) -> Mapping[str, int]:
        return self._executor.faults

    @property
    def ready(self) -> bool:
        return self._executor.ready

    @property
    def broken(self) -> Exception | None:
        return self._executor.broken

    def close(self) -> None:
        """Leave it open."""


class _News:
    """What becomes of rows, for the thread that waits for them.

    It is woken for texts and ends alone: to wake it for every visit of every row would hold up the dispatcher.
    """

    def __init__(self) -> None:
        self._items: deque[tuple[int, Any]] = deque()
        self._there = threading.Event()

    def sink(self, number: int) -> _Waiting:
        """The sink of a row."""
        return _Waiting(number, self)

    def add(self, number: int, item: object, wake: bool) -> None:
        self._items.append((number, item))
        if wake and not self._there.is_set():
            self._there.set()

    def wait(self) -> Iterator[tuple[int, Any]]:
        """Everything that has come, after some time at the most."""
        self._there.wait(_LOOK)
        self._there.clear()
        while self._items:
            yield self._items.popleft()


class _Waiting:
    """The sink of a row."""

    def __init__(self, number: int, news: _News) -> None:
        self._number, self._news = number, news

    def text(self, piece: str) -> None:
        self._news.add(self._number, piece, True)

    def visited(self, visit: VisitDone) -> None:
        self._news.add(self._number, visit, False)

    def answered(self, answer: Answer) -> None:
        self._news.add(self._number, answer, True)

    def failed(self, error: Exception) -> None:
        self._news.add(self._number, error, True)


def _groups(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Rows of similar length, so many at once."""
    ordered = sorted(rows, key=lambda row: length(row.fields)) if size > 1 else list(rows)
    return (ordered[start : start + size] for start in range(0, len(ordered), size))
