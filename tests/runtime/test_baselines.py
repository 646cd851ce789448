"""The single agent: the same agent on the same prompt, with nothing in its slots."""

from __future__ import annotations

import pytest

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.baselines import single_agent
from recmas.spec import PromptSpec
from tests.runtime.tiny import tiny_agent


@pytest.fixture(scope="module")
def mas():
    agents = {role: tiny_agent("llama", role, seed=index) for index, role in enumerate(SEQUENTIAL.roles)}
    prompts = {"solver": PromptSpec("{{question}} Notes: {{from:critic}}. Answer, {{question}}:")}
    return RecursiveMAS.create(agents, SEQUENTIAL, prompts=prompts, latent_steps=2)


def test_it_hears_nobody(mas):
    alone = single_agent(mas)
    answer = alone.answer(["fox"], max_new_tokens=4)[0]
    agent = mas.agents["solver"]
    messages = [{"role": "user", "content": "fox Notes: . Answer, fox:"}]
    ids = agent.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert answer.tokens == agent.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
    assert answer.latent_steps == {}


def test_another_agent_and_prompt(mas):
    answers = single_agent(mas, "planner", "{{question}}, {{hint}}").answer([{"question": "fox", "hint": "dog"}])
    assert list(answers[0].text_tokens) == ["planner"]


def test_refused(mas):
    with pytest.raises(ValueError, match="unknown role 'poet'; the pattern has planner, critic, solver"):
        single_agent(mas, "poet")
    with pytest.raises(ValueError, match="has a slot for 'critic', but hears from nobody"):
        single_agent(mas, "solver", "{{from:critic}}")
