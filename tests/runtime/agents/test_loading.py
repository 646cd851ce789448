"""Agents from folders and from multimodal wrappers, and what is told of a folder that holds none."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, Gemma3Config

from recmas import SEQUENTIAL, Agent, RecursiveMAS
from recmas.engine.messages import Prompt
from tests.runtime.families.matrix import tiny
from tests.runtime.tiny import FAMILIES, SHAPE, prompts, tiny_agent, tiny_link, tiny_model, tiny_tokenizer


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


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_without_some_of_the_weights_is_refused(tmp_path):
    """Transformers makes them up, with a warning that nobody reads."""
    body = tiny_model("llama").model
    message = "1 weights of LlamaForCausalLM are not in the checkpoint, lm_head.weight among them$"
    with pytest.raises(ValueError, match=f"^agent 'x': cannot load [^\n]*: {message}"):
        Agent.from_pretrained(saved(body, tmp_path), name="x")


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    config = BartConfig(vocab_size=320, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48)
    message = "bart models are an encoder and a decoder; an agent is a decoder alone$"
    with pytest.raises(ValueError, match=f"^agent 'x': cannot load [^\n]*: {message}"):
        Agent.from_pretrained(saved(BartForConditionalGeneration(config), tmp_path), name="x")


@pytest.mark.parametrize(("model_type", "body"), [("llava", "LlamaModel"), ("qwen2_5_vl", "Qwen2_5_VLTextModel")])
def test_a_checkpoint_of_text_and_images_is_an_agent_through_its_text_part(model_type, body, tmp_path):
    model = tiny(model_type)
    agent = Agent.from_pretrained(saved(model, tmp_path), name="x")
    assert type(agent.decoder).__name__ == body
    ids = torch.tensor([[20, 30, 40, 50]])
    expected = model.eval().generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)[0, 4:]
    assert agent.decode(Prompt(agent.embed(ids), torch.ones_like(ids)), 4) == [expected.tolist()]


def test_a_text_part_that_was_saved_by_itself_is_loaded_again(tmp_path):
    """transformers has a class for it, but no entry in its table of causal models."""
    agent = Agent.from_pretrained(saved(tiny("emu3"), tmp_path), name="x")
    assert type(agent.model).__name__ == "Emu3ForCausalLM"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama in a GGUF file, and the model that was written."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the gguf package")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(None)
    config, path = model.config, tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
    }
    for name, weight in model.state_dict().items():
        if ".q_proj." in name or ".k_proj." in name:  # rotary pairs are interleaved there
            weight = weight.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        short = name.removesuffix(".weight")
        layer, _, part = short.removeprefix("model.layers.").partition(".")
        written = f"blk.{layer}.{names[part]}" if short.startswith("model.layers.") else names[short]
        writer.add_tensor(f"{written}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_gguf_files_are_read(gguf_file, tmp_path):
    path, model = gguf_file
    batch, _ = prompts(Agent(model, tiny_tokenizer(), name="x"), (4, 6))
    for source in (str(path), f"{path.parent}:{path.name}"):
        agent = Agent.from_pretrained(source)
        assert agent.decode(batch, 5) == Agent(model, tiny_tokenizer(), name="x").decode(batch, 5)
        assert agent.literal("the quick brown fox") == tiny_tokenizer()("the quick brown fox")["input_ids"]
    system = RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, str(path)), SEQUENTIAL, rounds=1, latent_steps=2)
    system.save_pretrained(tmp_path / "system")
    again = RecursiveMAS.from_pretrained(tmp_path / "system")
    assert again.agents["solver"].decode(batch, 5) == system.agents["solver"].decode(batch, 5)


def test_gguf_files_that_are_not_there(tmp_path):
    for source, missing in (("none.gguf", "none.gguf"), (f"{tmp_path}:none.gguf", f"{tmp_path}/none.gguf")):
        with pytest.raises(ValueError, match=f"^agent 'x': no such file: {missing}$"):
            Agent.from_pretrained(source, name="x")


def test_gguf_files_need_a_package(gguf_file, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda *_: False)
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda *_: False)
    told = (
        r"^agent 'x': [^\n]*tiny.gguf: GGUF files are read by the gguf package: pip install 'recmas-kernels\[gguf\]'$"
    )
    with pytest.raises(ValueError, match=told):
        Agent.from_pretrained(str(gguf_file[0]), name="x")
