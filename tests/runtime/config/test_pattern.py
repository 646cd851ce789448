"""Patterns: visits, senders, edges, and what is refused."""

from __future__ import annotations

import pytest

from recmas import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL, Pattern
from recmas.config.pattern import Visit


def test_sequential_visits():
    assert list(SEQUENTIAL.visits(2)) == [
        Visit(1, 0, "planner", (), (), False),
        Visit(1, 1, "critic", ("planner",), (1,), False),
        Visit(1, 2, "solver", ("critic",), (1,), False),
        Visit(2, 0, "planner", ("solver",), (1,), False),
        Visit(2, 1, "critic", ("planner",), (2,), False),
        Visit(2, 2, "solver", ("critic",), (2,), True),
    ]


def test_mixture_meets_in_the_summarizer_and_hears_it_back():
    experts = ("math", "code", "science")
    visits = list(MIXTURE.visits(2))
    assert [visit.role for visit in visits] == [*experts, "summarizer"] * 2
    assert visits[3].senders == visits[7].senders == experts
    assert all(visit.senders == ("summarizer",) for visit in visits[4:7])
    assert MIXTURE.edges(1) == {(expert, "summarizer") for expert in experts}
    assert MIXTURE.edges(2) == MIXTURE.edges(1) | {("summarizer", expert) for expert in experts}


@pytest.mark.parametrize("pattern", [DISTILLATION, DELIBERATION])
def test_two_agents(pattern):
    first, last = pattern.roles
    assert pattern.last == last
    assert pattern.edges(1) == {(first, last)}
    assert pattern.edges(3) == {(first, last), (last, first)}


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("exchange", ["stage", "all"])
def test_every_message_exists_before_it_is_read_and_every_message_is_read(rounds, exchange):
    pattern = Pattern((("a", "b"), ("c",), ("d", "e"), ("f",)), exchange=exchange)
    written, read = set(), set()
    for visit in pattern.visits(rounds):
        messages = set(zip(visit.senders, visit.sender_rounds, strict=True))
        assert messages <= written
        assert len(set(visit.senders)) == len(visit.senders)
        read |= messages
        written.add((visit.role, visit.round))
    assert written - read == {("f", rounds)}
    assert sum(visit.final for visit in pattern.visits(rounds)) == 1


def test_exchange_all_hears_everybody_else_from_round_two():
    pattern = Pattern((("a",), ("b",), ("c",)), exchange="all")
    by_turn = {
        (visit.round, visit.role): dict(zip(visit.senders, visit.sender_rounds, strict=True))
        for visit in pattern.visits(2)
    }
    assert by_turn[1, "c"] == {"b": 1}
    assert by_turn[2, "a"] == {"c": 1, "b": 1}
    assert by_turn[2, "b"] == {"a": 2, "c": 1}
    assert by_turn[2, "c"] == {"b": 2, "a": 1}


def test_a_single_agent_hears_itself():
    assert Pattern((("a",),)).edges(2) == {("a", "a")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), "no stage or an empty one"),
        (((("a",), ()),), "no stage or an empty one"),
        (((("a",), ("b", "c")),), "the last stage is .*'b', 'c'.*expected the one agent"),
        (((("a",), ("a",)),), "role 'a' occurs twice"),
        (((("a b",),),), "role 'a b' is not a name"),
        ((("a",),), "a string where a tuple of roles"),
        (((("a",),), "median"), "combine: 'median' is not one of slots, mean, weighted"),
        (((("a",),), "slots", "some"), "exchange: 'some' is not one of stage, all"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pattern(*arguments)


@pytest.mark.parametrize("rounds", [0, -1, True, 1.5])
def test_rounds_must_be_positive(rounds):
    with pytest.raises(ValueError, match="rounds: .* is not a positive integer"):
        list(SEQUENTIAL.visits(rounds))
