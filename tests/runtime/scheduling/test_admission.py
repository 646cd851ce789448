"""What a row takes is counted by the prompt of its round, as it is known before any model runs."""

from __future__ import annotations

import pytest

from recmas import SEQUENTIAL
from recmas.answering.manner import Manner
from recmas.answering.options import AnswerOptions
from recmas.scheduling.admission import Room, check_room
from tests.runtime.scheduling.rows import tiny_system


def test_each_round_counts_its_own_prompt() -> None:
    """The planner reads 3 latents from round 2 on and adds 2 positions beside each prompt's last one."""
    manner = Manner(tiny_system(SEQUENTIAL, steps=3).outline, AnswerOptions(rounds=2, max_new_tokens=4))
    others = dict.fromkeys(("critic", "solver"), Room((5, 5), None))
    assert check_room(manner, {"planner": Room((98, 95), 100), **others}) == 98 + 3
    for prompts in ((99, 95), (98, 96)):
        with pytest.raises(ValueError, match="agent 'planner': the prompt takes 101 positions with its latents"):
            check_room(manner, {"planner": Room(prompts, 100), **others})
