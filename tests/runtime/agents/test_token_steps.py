"""Decoding at fixed shapes: the tokens of the loop on the growing cache, whoever stops, replies or listens."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, GPT2Config

from recmas import DELIBERATION, RecursiveMAS
from recmas.agents import token_steps
from recmas.agents.agent import Agent
from recmas.engine.stepper import Stepper
from tests.runtime.tiny import FAMILIES, prompts, tiny_agent, tiny_link, tiny_model, tiny_tokenizer
from tests.runtime.tools.test_tools import Echo

LENGTHS = (9, 3, 7)


def fixed(agent: Agent, look: int = 4, **options: bool) -> Agent:
    """The agent with a stepper of its own."""
    twin = Agent(agent.model, agent.tokenizer, name=agent.name)
    twin.stepper = Stepper(**{"fixed_shapes": True, "look": look, **options})
    return twin


@pytest.mark.parametrize(("temperature", "look"), [(0.9, 1), (0.0, 3), (0.9, 8)])
def test_the_tokens_of_the_loop(agent, temperature, look):
    """Rows of three lengths, some of which end before the others."""
    batch, _ = prompts(agent, LENGTHS)
    settings = 30, temperature, 0.95, 3
    tested = fixed(agent, look)
    for rows in (range(3), (5, 6, 7)):
        assert tested.decode(batch, *settings, rows=rows) == agent.decode(batch, *settings, rows=rows)
    assert len(tested.stepper.pool.held) == 1


def test_rows_that_end_between_two_looks(agent):
    batch, _ = prompts(agent, LENGTHS)
    free = agent.decode(batch, 20)
    twin = tiny_agent(agent.name)
    twin.model.generation_config.eos_token_id = [2, free[0][len(free[0]) // 5], free[2][len(free[2]) // 2]]
    assert fixed(twin, 8).decode(batch, 20) == twin.decode(batch, 20)


def test_each_row_stops_at_the_end_of_the_context_without_positions_that_the_model_lacks():
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=20, bos_token_id=1, eos_token_id=2)
    agent = Agent(AutoModelForCausalLM.from_config(config).float(), tiny_tokenizer(), name="x")
    agent.model.generation_config.eos_token_id = None
    agent.tokenizer.eos_token = None
    batch, _ = prompts(agent, (18, 4))
    tested = fixed(agent, 8)
    assert tested.decode(batch, 50) == agent.decode(batch, 50)
    assert tested.stepper.pool.held


def test_replies_and_texts_longer_than_the_first_bucket(agent, monkeypatch):
    """Rows read replies of other lengths at other times; the batch moves into larger buckets as it grows."""
    temperature, first = ((0.9, 4), (0.0, 20))[list(FAMILIES).index(agent.name) % 2]
    monkeypatch.setattr(token_steps, "FIRST", first)

    def reply(row: int, token: int, room: int) -> list[int]:
        return [20 + row, 30, 40, 50][: min(room, 1 + row)] if token % 3 == row else []

    batch, _ = prompts(agent, (40, 3, 7))
    tested = fixed(agent)
    for answer in (None, reply):
        written = [list(writer.write(batch, 40, temperature, 0.95, 3, reply=answer)) for writer in (agent, tested)]
        assert written[0] == written[1]
    assert len(tested.stepper.pool.held) == 2


def test_what_is_written_next_to_a_text_that_nobody_finished(agent):
    """Threads and callers that stop reading keep nothing: each text has its buffers alone."""
    batch, other = prompts(agent, LENGTHS)[0], prompts(agent, (4, 4, 8), seed=1)[0]
    tested = fixed(agent)
    writing = tested.write(batch, 20)
    begun = [next(writing) for _ in range(6)]
    assert tested.decode(other, 20) == agent.decode(other, 20)
    left = tested.write(other, 20)
    next(left)
    del left
    assert begun + list(writing) == list(agent.write(batch, 20))
    with torch.no_grad():
        link = tiny_link(agent)
        expected = agent.think(batch, 5, link).states
        torch.testing.assert_close(tested.think(batch, 5, link).states, expected, rtol=1e-4, atol=1e-5)


def test_no_step_waits_for_the_device(agent):
    """Between two looks nothing waits for the device: no number of a step is asked for."""
    batch, _ = prompts(agent, LENGTHS)
    looks = 0

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal looks
            looks += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    twin = tiny_agent(agent.name)
    twin.model.generation_config.eos_token_id = twin.tokenizer.eos_token = None
    tested, waited = fixed(twin, 8), []
    for tokens in (1, 9, 25):
        tested.decode(batch, tokens)  # proofs run once
        looks = 0
        with Counted():
            assert [len(row) for row in tested.decode(batch, tokens)] == [tokens] * 3
        waited.append(looks)
    assert waited[0] > 0  # what reads the prompt asks for its padding, and is counted
    assert waited == waited[:1] * 3


@pytest.mark.parametrize("look", [1, 8])
def test_logits_that_are_not_finite_count_for_rows_that_still_write(look):
    agent = tiny_agent("llama")
    batch, _ = prompts(agent, LENGTHS)
    free = agent.decode(batch, 12)
    agent.model.generation_config.eos_token_id = [free[1][2]]
    calls, own = 0, agent.logits

    def logits(hidden: torch.Tensor, row: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        found = own(hidden)
        if calls > 5:
            found[row] = torch.nan
        return found

    tested = fixed(agent, look)
    tested.logits = functools.partial(logits, row=1)
    assert tested.decode(batch, 12) == agent.decode(batch, 12)
    calls, tested = 0, fixed(agent, look)
    tested.logits = functools.partial(logits, row=2)
    with pytest.raises(FloatingPointError, match="the logits of row 2 are not finite"):
        tested.decode(batch, 12)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_system_with_tools_and_streams(temperature):
    agents = {"reflector": tiny_agent("qwen3", seed=1), "toolcaller": tiny_agent("gemma3_text", seed=2)}
    plain = RecursiveMAS.create(agents, DELIBERATION, rounds=2, latent_steps=2, seed=0)
    twins = {role: fixed(agent, 8) for role, agent in agents.items()}
    tested = RecursiveMAS.create(twins, DELIBERATION, rounds=2, latent_steps=2, seed=0)
    rows, how = ["what is the answer?", "fox"], {"max_new_tokens": 12, "temperature": temperature}
    for tools in ([], [Echo()]):
        assert tested.answer(rows, tools=tools, **how) == plain.answer(rows, tools=tools, **how)
    assert list(tested.stream(rows[0], **how)) == list(plain.stream(rows[0], **how))
    assert tested.answer(rows, mode="text", **how) == plain.answer(rows, mode="text", **how)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_compiling_serves_decoding(family, monkeypatch):
    """One graph without a break for all steps; what the tracer hands on is run as it stands."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    plain = tiny_agent(family)
    agent = Agent(plain.model, plain.tokenizer, name="x", compile=True)
    batch, _ = prompts(agent, LENGTHS)
    counters.clear()
    assert agent.decode(batch, 20) == plain.decode(batch, 20)
    assert counters["stats"]["unique_graphs"] == 1


def test_torchs_own_compiler():
    plain = tiny_agent("llama")
    agent = Agent(tiny_model("llama"), tiny_tokenizer(), name="x", compile=True)
    batch, _ = prompts(agent, LENGTHS)
    assert agent.decode(batch, 12) == plain.decode(batch, 12)
