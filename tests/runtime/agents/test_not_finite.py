"""Numbers that are not finite end a run in one line that names agent, round and row; no text is made of them."""

from __future__ import annotations

import pytest
import torch

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.agents.sampling import Sampler
from recmas.cli import main
from tests.runtime.tiny import tiny_agent


@pytest.fixture
def mas():
    agents = {role: tiny_agent("llama", role, seed=seed) for seed, role in enumerate(SEQUENTIAL.roles)}
    return RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2, seed=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_row_whose_logits_are_not_finite(temperature, bad):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    sampler = Sampler(temperature, 1.0, [0], [0, 1, 2])
    chosen = sampler.choose(logits, sampler.draw(range(3))[0]).tolist()
    assert chosen[1] == -1
    assert min(chosen[0], chosen[2]) >= 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_but_minus_infinity_is_not_a_choice(temperature):
    sampler = Sampler(temperature, 1.0, [0], [0])
    assert sampler.choose(torch.full((1, 4), -torch.inf), sampler.draw([0])[0]).tolist() == [-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_head_names_agent_round_and_row(mas, temperature):
    mas.agents["solver"].model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="^round 2: agent 'solver': the logits of row 0 are not finite"):
        mas.answer(["fox", "dog"], temperature=temperature, batch_size=1)


def test_a_broken_link_names_the_agent_that_thought(mas):
    mas.inner_links["critic"].proj2.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="^round 1: agent 'critic': the latents of row 0 are not finite"):
        mas.answer(["fox", "dog"])


def test_the_command_ends_with_status_2_and_one_line(mas, tmp_path, capsys):
    mas.agents["solver"].model.lm_head.weight.data[3] = torch.nan
    mas.save_pretrained(tmp_path / "s")
    capsys.readouterr()
    assert main(["run", str(tmp_path / "s"), "--question", "fox"]) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if "error" in line]
    assert line.startswith("recmas: error: round 2: agent 'solver': the logits of row 0")
