"""The token that ends a message."""

from __future__ import annotations

import pytest

from recmas.agents.targets import end_token
from tests.runtime.tiny import tiny_agent


def test_a_message_ends_with_the_tokenizers_token_else_with_the_least_of_the_models():
    agent = tiny_agent("llama")
    agent.model.generation_config.eos_token_id = [33, 9, 70]
    agent.tokenizer.eos_token_id = 5
    assert end_token(agent) == 5
    agent.tokenizer.eos_token = None
    assert end_token(agent) == 9
    agent.model.generation_config.eos_token_id = agent.model.config.eos_token_id = None
    with pytest.raises(ValueError, match="neither its tokenizer nor its model names an end-of-sequence token"):
        end_token(agent)
