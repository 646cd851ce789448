"""What a model must prove before it becomes an agent, and its own way from hidden states to logits."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from recmas.agents.agent import Agent
from recmas.agents.checking import proofs_of, refusal, switched_off
from recmas.engine.per_layer_inputs import PerLayerInputs
from tests.runtime.families.matrix import tiny
from tests.runtime.tiny import prompts, tiny_model, tiny_tokenizer

REFUSED = {
    "bert": "causality: states before and after a later token was changed differ by ",
    "xlm-roberta": "causality: ",
    "reformer": "embeddings: ValueError: hidden states of 64 features for embeddings of 32$",
    "cpmant": "no part of CpmAntForCausalLM turns input embeddings into hidden states$",
    "deepseek_v4": "embeddings: AttributeError: ",
    "prophetnet": "logits: ",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refusal_names_the_proof(model_type):
    with pytest.raises(ValueError, match=f"^agent 'x': a {model_type} model is refused: {REFUSED[model_type]}") as told:
        Agent(tiny(model_type), tiny_tokenizer(), name="x")
    assert len(str(told.value).splitlines()) == 1


def test_an_encoder_with_causal_attention_is_a_decoder():
    config = tiny("bert").config
    config.is_decoder = True
    agent = Agent(AutoModelForCausalLM.from_config(config).float(), tiny_tokenizer(), name="x")
    assert type(agent.decoder).__name__ == "BertModel"
    assert agent.decode(prompts(agent, (4, 2))[0], 3)


OWN = ["falcon_h1", "granite", "cohere", "gemma2", "recurrent_gemma", "nanochat", "modernbert-decoder", "llama4", "opt"]


@pytest.mark.parametrize("model_type", OWN)
@torch.no_grad()
def test_logits_are_the_models_own(model_type):
    """Multipliers, caps and transforms are large here: guessing one away would show."""
    model = tiny(model_type)
    for name in ("lm_head_multiplier", "logits_scaling", "logit_scale"):
        if hasattr(model.config, name):
            setattr(model.config, name, 3.0)
    for part in model.modules():
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
            if isinstance(vars(part).get(name), float):
                setattr(part, name, 3.0)
    model.get_output_embeddings().weight.mul_(100)
    agent = Agent(model, tiny_tokenizer(), name="x")
    ids = torch.randint(10, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    states = agent.decoder(inputs_embeds=agent.embed(ids), use_cache=False).last_hidden_state
    expected = model(input_ids=ids, use_cache=False).logits
    rounding = 32 * torch.finfo(torch.float32).eps * expected.abs().max()  # of sums of 32 products, in any order
    assert (agent.logits(states) - expected).abs().max() <= rounding
    assert (agent.logits(states[:, -1]) - expected[:, -1]).abs().max() <= rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_embeddings_are_scaled_as_the_body_scales_them(dtype):
    """Falcon-H1 multiplies what it looks up, and not what it is given."""
    agent = Agent(tiny("falcon_h1 with multipliers").to(dtype), tiny_tokenizer(), name="x")
    ids = torch.tensor([[20, 30, 40, 50]])
    table = agent.model.get_input_embeddings().weight
    assert torch.equal(agent.embed(ids), 2 * table[ids])
    assert agent.embed_scale == 2.0
    states = agent.decoder(inputs_embeds=agent.embed(ids), use_cache=False).last_hidden_state
    assert torch.equal(states, agent.decoder(input_ids=ids, use_cache=False).last_hidden_state)


@torch.no_grad()
def test_a_body_that_changes_its_embeddings_a_little_is_refused():
    """In bfloat16, and through layers that forget the size of what they read: no factor explains the difference."""
    model = tiny("llama").to(torch.bfloat16)
    model.config.rms_norm_eps = 3e-6  # a fingerprint of its own
    forward = model.model.forward

    def shifted(input_ids=None, inputs_embeds=None, **options):
        if inputs_embeds is None:
            inputs_embeds = 1.05 * model.model.embed_tokens(input_ids)
        return forward(inputs_embeds=inputs_embeds, **options)

    model.model.forward = shifted
    with pytest.raises(ValueError, match="^agent 'x': a llama model is refused: embeddings: states from token ids"):
        Agent(model, tiny_tokenizer(), name="x")


def test_logits_follow_a_model_that_moves_and_keep_gradients():
    agent = Agent(tiny_model("granite"), tiny_tokenizer(), name="x")
    states = torch.randn(2, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(agent.logits(states).sum(), states)
    assert gradient.abs().min() > 0
    agent.to(dtype=torch.float64)
    assert agent.logits(states.double()).dtype == torch.float64


@torch.no_grad()
def test_logits_follow_a_head_that_is_replaced_or_adapted():
    agent = Agent(tiny_model("llama"), tiny_tokenizer(), name="x")
    states = torch.randn(2, agent.hidden_size, generator=torch.Generator().manual_seed(0))
    before = agent.logits(states)
    agent.model.lm_head = torch.nn.Linear(agent.hidden_size, agent.vocabulary, bias=False)
    assert torch.equal(agent.logits(states), agent.model.lm_head(states))
    adapter = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(adapter, agent.model)
    adapted = agent.logits(states)
    assert torch.equal(adapted, agent.model.lm_head(states))
    assert not torch.allclose(adapted, agent.model.lm_head.base_layer(states))
    assert not torch.allclose(adapted, before)


def test_a_model_on_the_meta_device_proves_nothing_yet():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    agent = Agent(model, tiny_tokenizer(), name="x")
    assert agent.hidden_size == 32
    assert agent._own_logits is None


def test_broken_weights_are_refused():
    model = tiny_model("llama")
    model.config.rms_norm_eps = 2e-6  # a fingerprint of its own
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="^agent 'x': a llama model is refused: embeddings: "):
        Agent(model, tiny_tokenizer(), name="x")


def test_what_is_off_in_words():
    found = proofs_of(tiny("bart").eval())
    assert list(switched_off(found)) == ["padding", "prefix reuse", "fixed shapes"]
    assert switched_off(found)["padding"] == "rows of other lengths run apart"
    assert not refusal(found)
    found = proofs_of(tiny("bert").eval())
    assert refusal(found) == "causality"
    assert "cache" not in found


@torch.no_grad()
def test_tokens_with_an_embedding_for_every_layer_are_known_by_their_first():
    """Gemma 3n and 4: a row that is a token's gets that token's per-layer inputs, any other the padding token's."""
    agent = Agent(tiny("gemma4_text"), tiny_tokenizer(), name="x")
    ids = torch.randint(10, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    lookup = PerLayerInputs.of(agent.decoder)
    assert lookup is PerLayerInputs.of(agent.decoder)
    embeds = agent.embed(ids)
    assert torch.equal(lookup(embeds), agent.decoder.get_per_layer_inputs(ids))
    embeds[1, 3] += 0.5
    ids[1, 3] = agent.decoder.config.pad_token_id
    assert torch.equal(lookup(embeds), agent.decoder.get_per_layer_inputs(ids))
