"""Rows that come and go get the answers that they get in one batch; who fails, leaves or is late harms no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from recmas import MIXTURE, SEQUENTIAL, RecursiveMAS
from recmas.answering.answers import Answer
from recmas.scheduling.dispatcher import Dispatcher, Limits
from recmas.scheduling.executor import Ended, Executor, Failed, Lane, LocalExecutor, Report, Wrote
from recmas.scheduling.task import Task
from tests.runtime.scheduling.rows import PATTERNS, QUESTIONS, Waiting, row_of, send, tiny_system


@pytest.fixture(scope="module")
def system() -> RecursiveMAS:
    return tiny_system(SEQUENTIAL)


class Watched:
    """A local executor whose tasks are seen, may be held back, and may fail."""

    def __init__(self, system: RecursiveMAS) -> None:
        self.inner: Executor = LocalExecutor(system)
        self.tasks: list[Task] = []
        self.open = threading.Event()
        self.open.set()
        self.fail: Callable[[Task], Failed | None] = lambda task: None

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def start(self, task: Task, report: Report) -> None:
        self.tasks.append(task)

        def run() -> None:
            assert self.open.wait(60)
            failed = self.fail(task)
            if failed is None:
                self.inner.start(task, report)
            else:
                report(failed)

        threading.Thread(target=run, daemon=True).start()


def texts(waiting: list[Waiting]) -> list[str]:
    found = []
    for sink in waiting:
        answer = sink.end()
        assert isinstance(answer, Answer), answer
        assert "".join(sink.pieces) == answer.text
        found.append(answer.text)
    return found


@pytest.mark.parametrize("mode", ["latent", "text"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_those_of_a_batch(pattern: str, mode: str) -> None:
    system = tiny_system(PATTERNS[pattern])
    options = {"mode": mode, "temperature": 0.7, "seed": 5}
    expected = system.answer([{"question": question} for question in QUESTIONS], **options)
    dispatcher = Dispatcher(LocalExecutor(system))
    try:
        waiting = send(dispatcher, system, QUESTIONS, **options)
        assert texts(waiting) == [answer.text for answer in expected]
    finally:
        dispatcher.close()
    visits = len(list(system.pattern.visits(2)))
    for sink, answer in zip(waiting, expected, strict=True):
        found = sink.end()
        assert isinstance(found, Answer)
        assert found.latent_steps == answer.latent_steps
        assert found.text_tokens == answer.text_tokens
        assert found.tokens == answer.tokens
        assert len(sink.visits) == visits


def test_rows_of_one_moment_share_every_batch(system: RecursiveMAS) -> None:
    executor = Watched(system)
    dispatcher = Dispatcher(executor, Limits(window=0.5, rows=len(QUESTIONS)))
    try:
        texts(send(dispatcher, system, QUESTIONS))
    finally:
        dispatcher.close()
    assert [len(task.parts) for task in executor.tasks] == [len(QUESTIONS)] * 6


def test_a_late_row_joins_at_a_stage_in_another_round_and_ends_by_itself(system: RecursiveMAS) -> None:
    """The late row's first visit is made in one batch with the early row's second round."""
    executor = Watched(system)
    dispatcher = Dispatcher(executor, Limits(window=0.0))
    expected = [system.answer([question], rounds=rounds)[0].text for question, rounds in (("fox", 2), ("plan", 1))]
    early, late = Waiting(), Waiting()
    joined = threading.Event()

    def hold_the_solver(task: Task) -> None:
        if task.work.role == "solver":
            assert joined.wait(60)

    executor.fail = hold_the_solver
    try:
        dispatcher.add(row_of(system, 0, "fox", early, rounds=2))
        while len(executor.tasks) < 3:  # planner, critic, solver of round 1
            time.sleep(0.001)
        dispatcher.add(row_of(system, 1, "plan", late, rounds=1))
        joined.set()
        assert texts([early, late]) == expected
    finally:
        joined.set()
        dispatcher.close()
    together = [task for task in executor.tasks if len(task.parts) == 2]
    assert {part.visit.round for part in together[0].parts} == {1, 2}
    assert late.visits[-1].stage == 2
    assert len(late.visits) == 3
    assert len(early.visits) == 6


def test_a_row_that_always_fails_does_not_take_its_batch_along(system: RecursiveMAS) -> None:
    executor = Watched(system)

    def fail(task: Task) -> Failed | None:
        if any(part.number == 3 for part in task.parts):
            return Failed(task, FloatingPointError("latents are not finite"))
        return None

    executor.fail = fail
    expected = [answer.text for answer in system.answer(QUESTIONS)]
    dispatcher = Dispatcher(executor, Limits(window=0.2, rows=len(QUESTIONS)))
    try:
        waiting = send(dispatcher, system, QUESTIONS)
        assert str(waiting[3].end()) == "latents are not finite"
        del waiting[3], expected[3]
        assert texts(waiting) == expected
    finally:
        dispatcher.close()


@pytest.mark.parametrize("inputs", [False, True])
def test_what_is_lost_is_repeated_and_text_is_shown_once(system: RecursiveMAS, inputs: bool) -> None:
    executor = Watched(system)
    generator = torch.Generator().manual_seed(3)

    def fail(task: Task) -> Failed | None:
        lost = torch.rand((), generator=generator) < 0.2
        return Failed(task, ConnectionError("gone"), lost=True, inputs=inputs) if lost else None

    executor.fail = fail
    expected = [answer.text for answer in system.answer(QUESTIONS)]
    dispatcher = Dispatcher(executor, Limits(window=0.05))
    try:
        assert texts(send(dispatcher, system, QUESTIONS)) == expected
    finally:
        dispatcher.close()
    assert len(executor.tasks) > 6


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_a_batch_that_is_lost_while_it_writes_is_told_once(system: RecursiveMAS, pieces: int) -> None:
    """After one step, after some, and when all rows have ended and nothing but the end of the batch is missing."""
    executor = Watched(system)
    lost: list[Task] = []
    begin = executor.start

    def start(task: Task, report: Report) -> None:
        told: list[Wrote] = []

        def tell(one: Wrote | Ended | Failed) -> None:
            if task in lost:
                return
            if isinstance(one, Wrote):
                told.append(one)
                report(one)
            if not isinstance(one, Wrote) or len(told) == pieces:
                lost.append(task)
                report(Failed(task, ConnectionError("gone"), lost=True))

        begin(task, tell if task.work.final and not lost else report)

    executor.start = start  # type: ignore[method-assign]
    expected = [answer.text for answer in system.answer(QUESTIONS)]
    dispatcher = Dispatcher(executor, Limits(window=0.2, rows=len(QUESTIONS)))
    try:
        waiting = send(dispatcher, system, QUESTIONS)
        assert texts(waiting) == expected
        assert texts(send(dispatcher, system, QUESTIONS[:1])) == expected[:1]
        assert [len(sink.ends) for sink in waiting] == [1] * len(QUESTIONS)
    finally:
        dispatcher.close()
    assert len(lost) == 1


def test_what_comes_for_a_row_that_has_begun_again_is_not_taken() -> None:
    """One of two agents of a stage refuses its messages while the other is at work; that one's end comes later."""
    system = tiny_system(MIXTURE)
    executor = Watched(system)
    executor.lanes = {role: Lane(role, 1) for role in MIXTURE.roles}  # type: ignore[attr-defined]
    one, other = MIXTURE.stages[0][:2]
    refused, begun = threading.Event(), threading.Event()

    def fail(task: Task) -> Failed | None:
        role, again = task.work.role, task.parts[0].visit.round == 2
        if role == one and again and not refused.is_set():
            refused.set()
            return Failed(task, ValueError("refused"), lost=True, inputs=True)
        if role == one and refused.is_set():
            begun.set()
        if role == other and again:
            assert begun.wait(60)
        return None

    executor.fail = fail
    expected = [answer.text for answer in system.answer(["fox"])]
    dispatcher = Dispatcher(executor, Limits(window=0.0))
    try:
        assert texts(send(dispatcher, system, ["fox"])) == expected
    finally:
        dispatcher.close()
    assert begun.is_set()


def test_a_row_that_ends_the_process_each_time_is_given_up_alone(system: RecursiveMAS) -> None:
    executor = Watched(system)

    def fail(task: Task) -> Failed | None:
        deadly = any(part.number == 1 for part in task.parts)
        return Failed(task, ConnectionError("gone"), lost=True) if deadly else None

    executor.fail = fail
    expected = [answer.text for answer in system.answer(QUESTIONS)]
    dispatcher = Dispatcher(executor, Limits(window=0.05))
    try:
        waiting = send(dispatcher, system, QUESTIONS)
        assert isinstance(waiting[1].end(), ConnectionError)
        del waiting[1], expected[1]
        assert texts(waiting) == expected
    finally:
        dispatcher.close()


def test_rows_whose_task_had_not_begun_when_it_was_lost_are_not_to_blame(system: RecursiveMAS) -> None:
    executor = Watched(system)
    losses = iter(range(20))

    def fail(task: Task) -> Failed | None:
        lost = next(losses, None) is not None
        return Failed(task, ConnectionError("gone"), lost=True, begun=False) if lost else None

    executor.fail = fail
    dispatcher = Dispatcher(executor, Limits(window=0.05))
    try:
        assert texts(send(dispatcher, system, QUESTIONS)) == [answer.text for answer in system.answer(QUESTIONS)]
    finally:
        dispatcher.close()
    assert all(len(task.parts) == len(QUESTIONS) for task in executor.tasks)


def test_rows_that_came_first_go_first_whatever_their_numbers(system: RecursiveMAS) -> None:
    """Micro-batches are of rows of similar length, and stay together."""
    executor = Watched(system)
    dispatcher = Dispatcher(executor, Limits(window=0.0, rows=2))
    order, waiting = (5, 0, 3, 1, 4, 2), [Waiting() for _ in QUESTIONS]
    try:
        dispatcher.add(*(row_of(system, number, QUESTIONS[number], waiting[number]) for number in order))
        assert texts(waiting) == [answer.text for answer in system.answer(QUESTIONS)]
    finally:
        dispatcher.close()
    assert {tuple(part.number for part in task.parts) for task in executor.tasks} == {(5, 0), (3, 1), (4, 2)}


def test_a_row_whose_messages_are_always_refused_is_given_up_alone(system: RecursiveMAS) -> None:
    """What comes before the refusal goes well each time, and is no progress."""
    executor = Watched(system)

    def fail(task: Task) -> Failed | None:
        refused = task.work.role == "critic" and any(part.number == 1 for part in task.parts)
        return Failed(task, ValueError("refused"), lost=True, inputs=True) if refused else None

    executor.fail = fail
    expected = [answer.text for answer in system.answer(QUESTIONS)]
    dispatcher = Dispatcher(executor, Limits(window=0.05))
    try:
        waiting = send(dispatcher, system, QUESTIONS)
        assert str(waiting[1].end()) == "refused"
        del waiting[1], expected[1]
        assert texts(waiting) == expected
    finally:
        dispatcher.close()


def test_a_row_that_is_dropped_or_late_frees_its_place(system: RecursiveMAS) -> None:
    executor = Watched(system)
    executor.open.clear()
    dispatcher = Dispatcher(executor, Limits(window=0.0))
    gone, late, stays = Waiting(), Waiting(), Waiting()
    try:
        rows = [row_of(system, number, "fox", sink) for number, sink in enumerate((stays, gone, late))]
        rows[2].deadline = time.monotonic() + 0.05
        for row in rows:
            dispatcher.add(row)
        dispatcher.drop(rows[1], ConnectionAbortedError("the client left"))
        assert isinstance(gone.end(), ConnectionAbortedError)
        assert isinstance(late.end(), TimeoutError)
        executor.open.set()
        assert texts([stays]) == [system.answer(["fox"])[0].text]
        assert dispatcher._rows == {}
        assert not dispatcher._waiting
    finally:
        executor.open.set()
        dispatcher.close()


def test_a_mistake_here_is_told_to_whoever_waits(system: RecursiveMAS) -> None:
    dispatcher = Dispatcher(LocalExecutor(system))
    try:
        dispatcher._start = None  # type: ignore[assignment, method-assign]
        first, second = Waiting(), Waiting()
        dispatcher.add(row_of(system, 0, "fox", first))
        assert isinstance(first.end(), TypeError)
        assert isinstance(dispatcher.broken, TypeError)
        dispatcher.add(row_of(system, 1, "fox", second))
        assert isinstance(second.end(), TypeError)
    finally:
        dispatcher.close()


def test_a_device_that_fails_is_named_with_its_agent(system: RecursiveMAS, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = mock.Mock(side_effect=torch.AcceleratorError("CUDA error: unknown error\nadvice"))
    monkeypatch.setattr(system.agents["critic"], "think", lost)
    dispatcher = Dispatcher(LocalExecutor(system))
    try:
        (waiting,) = send(dispatcher, system, ["fox"])
        assert str(waiting.end()) == "agent 'critic' on cpu: CUDA error: unknown error"
    finally:
        dispatcher.close()


def test_independent_agents_may_wait_side_by_side() -> None:
    system = tiny_system(MIXTURE)
    executor = Watched(system)
    dispatcher = Dispatcher(executor, Limits(window=0.0))
    try:
        texts(send(dispatcher, system, ["fox"], rounds=1))
    finally:
        dispatcher.close()
    assert [task.work.role for task in executor.tasks] == ["code", "math", "science", "summarizer"]


def test_bounds_of_a_batch_hold(system: RecursiveMAS) -> None:
    executor = Watched(system)
    dispatcher = Dispatcher(executor, Limits(window=0.1, rows=4, tokens=20))
    waiting = [Waiting() for _ in range(7)]
    try:
        for number, sink in enumerate(waiting):
            row = row_of(system, number, "fox", sink)
            row.tokens = 30 if number == 6 else 7
            dispatcher.add(row)
        texts(waiting)
    finally:
        dispatcher.close()
    assert max(len(task.parts) for task in executor.tasks) == 2  # three times 7 are more than 20
    assert all(len(task.parts) == 1 for task in executor.tasks if task.parts[0].number == 6)


def test_a_window_that_ends_between_two_looks_at_the_clock_is_seen(
    system: RecursiveMAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held up after it found the window open, until it is over."""
    start = Dispatcher._start

    def slow(self: Dispatcher, now: float) -> None:
        start(self, now)
        for row, _ in self._waiting.values():
            while row.entering and time.monotonic() <= row.since + self.limits.window:
                time.sleep(0.001)

    monkeypatch.setattr(Dispatcher, "_start", slow)
    dispatcher = Dispatcher(LocalExecutor(system), Limits(window=0.02))
    try:
        assert texts(send(dispatcher, system, ["fox"])) == [system.answer(["fox"])[0].text]
    finally:
        dispatcher.close()


def stepwise(system: RecursiveMAS, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Semaphore, list[int]]:
    """Let the last agent take one step of decoding for each permit; the steps that it took."""
    agent, permits, taken = system.agents[system.pattern.last], threading.Semaphore(0), list[int]()
    write = agent.write

    def held(*arguments: Any, **options: Any) -> Iterator[dict[int, list[int]]]:
        for number, step in enumerate(write(*arguments, **options)):
            assert permits.acquire(timeout=60)
            taken.append(number)
            yield step

    monkeypatch.setattr(agent, "write", held)
    return permits, taken


def test_a_row_ends_before_the_others_of_its_batch(system: RecursiveMAS, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [system.answer(["fox"], max_new_tokens=count)[0] for count in (2, 6)]
    permits, taken = stepwise(system, monkeypatch)
    dispatcher = Dispatcher(LocalExecutor(system), Limits(window=60.0, rows=2))
    short, long = Waiting(), Waiting()
    try:
        dispatcher.add(row_of(system, 0, "fox", short, max_new_tokens=2))
        dispatcher.add(row_of(system, 1, "fox", long, max_new_tokens=6))
        for _ in range(2):
            permits.release()
        assert texts([short]) == [expected[0].text]
        assert len(taken) == 2
        assert not long.ends
        for _ in range(4):
            permits.release()
        assert texts([long]) == [expected[1].text]
    finally:
        permits.release(10)
        dispatcher.close()
    assert (short.visits[-1].text_tokens, long.visits[-1].text_tokens) == (2, 6)
    assert not short.visits[-1].complete


def test_an_end_of_text_ends_a_row_and_what_was_dropped_is_not_written(
    system: RecursiveMAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = system.agents["solver"]
    sampled = {"temperature": 3.0, "seed": 5}
    first, second = (answer.tokens for answer in system.answer(["fox", "plan"], **sampled))
    ending = next(token for token in first[:4] if token not in second)
    steps = first.index(ending) + 1
    monkeypatch.setattr(type(agent), "eos_ids", property(lambda self: frozenset({ending} if self is agent else ())))
    expected = system.answer(["fox"], **sampled)[0]
    assert len(expected.tokens) == steps < 6
    permits, taken = stepwise(system, monkeypatch)
    dispatcher = Dispatcher(LocalExecutor(system), Limits(window=60.0, rows=2))
    ends, gone = Waiting(), Waiting()
    try:
        rows = [row_of(system, 0, "fox", ends, **sampled), row_of(system, 1, "plan", gone, **sampled)]
        for row in rows:
            dispatcher.add(row)
        for _ in range(steps):
            permits.release()
        assert texts([ends]) == [expected.text]
        assert ends.visits[-1].complete
        dispatcher.drop(rows[1], ConnectionAbortedError("the client left"))
        assert isinstance(gone.end(), ConnectionAbortedError)
        permits.release(10)
    finally:
        permits.release(10)
        dispatcher.close()
    assert len(taken) <= steps + 1  # one step may be under way when a row is dropped


def test_a_text_message_and_an_answer_share_no_batch(system: RecursiveMAS) -> None:
    """By text messages the last agent does the same in both rounds, but only answers are shown as they grow."""
    executor = Watched(system)
    dispatcher = Dispatcher(executor, Limits(window=0.2))
    expected = [system.answer(["fox"], mode="text", rounds=rounds)[0].text for rounds in (2, 1)]
    sinks = [Waiting(), Waiting()]
    try:
        for number, (sink, rounds) in enumerate(zip(sinks, (2, 1), strict=True)):
            dispatcher.add(row_of(system, number, "fox", sink, mode="text", rounds=rounds))
        assert texts(sinks) == expected
    finally:
        dispatcher.close()
    assert len(executor.tasks[0].parts) == 2
