"""Agents from folders and from multimodal wrappers, and what is told of a folder that holds none."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from recmas import SEQUENTIAL, Agent, RecursiveMAS
from recmas.engine.messages import Prompt
from tests.runtime.tiny import FAMILIES, SHAPE, prompts, tiny_agent, tiny_link, tiny_tokenizer


def test_a_multimodal_model_is_used_through_its_language_model():
    """Gemma3 checkpoints load with a vision tower; rollout, logits and decoding are those of the text decoder."""
    text = {**SHAPE, **FAMILIES["gemma3_text"], "hidden_size": 32, "final_logit_softcapping": None}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=300)
    model = AutoModelForCausalLM.from_config(config).float()
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    agent = Agent(model, tiny_tokenizer(), name="g")
    assert agent.context_length == 256
    assert agent.embed_scale == pytest.approx(32**0.5)
    ids = torch.tensor([[20, 30, 40, 50]])
    prompt = Prompt(agent.embed(ids), torch.ones_like(ids))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    assert agent.decode(prompt, 6) == [expected]
    with torch.no_grad():
        assert agent.think(prompt, 3, tiny_link(agent)).states.shape == (1, 3, 32)


def test_saved_and_loaded_agents_are_equal(tmp_path):
    agent = tiny_agent("qwen3_5_text")
    agent.save_pretrained(tmp_path)
    again = Agent.from_pretrained(tmp_path)
    assert again.name == tmp_path.name
    assert again.source == str(tmp_path)
    batch, _ = prompts(agent, (4, 6))
    assert again.decode(batch, 5) == agent.decode(batch, 5)
    assert Agent.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in again.model.parameters())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": {"peft_type": "LORA"}}, "is a PEFT adapter; merge it into its base model first"),
        ({}, "cannot load"),
        ({"config.json": {"model_type": "martian"}}, "cannot load"),
    ],
    ids=["peft", "empty", "unknown architecture"],
)
def test_folders_that_hold_no_model(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^agent 'planner': [^\n]*{message}[^\n]*$"):
        Agent.from_pretrained(tmp_path, name="planner")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_missing_folders_never_reach_for_the_hub(path):
    with pytest.raises(ValueError, match="agent 'x': no such folder"):
        Agent.from_pretrained(path, name="x")


@pytest.mark.parametrize("dtype", ["foo", "int8", "nn"])
def test_unknown_dtypes_are_told_before_anything_is_loaded(dtype):
    message = f"^dtype: '{dtype}' is not one of auto, float32, bfloat16, float16$"
    with pytest.raises(ValueError, match=message):
        RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, "/no/such/folder"), SEQUENTIAL, dtype=dtype)


def test_code_of_a_checkpoint_runs_only_where_it_is_allowed(tmp_path):
    content = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    message = "needs code of its own to be run; if you trust it, allow that with --trust-remote-code"
    with pytest.raises(ValueError, match=f"^agent 'x': [^\n]*{message}[^\n]*$"):
        Agent.from_pretrained(tmp_path, name="x")
