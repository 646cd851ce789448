"""What decoders prove: all of it where it holds, and the one feature that is off where a model breaks that."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from recmas.agents.agent import Agent
from recmas.engine import abilities
from recmas.engine.abilities import Proof, fingerprint, missing, proof
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.engine.probe import Probe, distance, moved, probe_ids
from recmas.engine.proofs import FEATURES
from recmas.engine.twin import twins
from tests.runtime.families.matrix import tiny
from tests.runtime.tiny import prompts, tiny_agent, tiny_link, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_proves_what_it_is_used_for(agent, dtype):
    decoder = copy.deepcopy(agent.model).to(dtype).get_decoder()
    found = {feature: proof(decoder, feature) for feature in FEATURES}
    broken = {feature for feature, found_one in found.items() if not found_one.holds}
    assert broken == ({"cached gradients"} if agent.name == "qwen3_5_text" else set())
    for feature in set(FEATURES) - broken:
        assert found[feature].error <= found[feature].bound / 4, feature  # the bound is far from what holds


def test_proofs_leave_the_random_state_as_it_was():
    """It is the caller's: a run that is resumed goes on with it."""
    decoder = tiny_model("llama").get_decoder()
    before = torch.get_rng_state()
    for feature in FEATURES:
        proof(decoder, feature)
    assert torch.equal(torch.get_rng_state(), before)


OFF = {
    "openai-gpt": {"cache", "several positions", "prefix reuse", "fixed shapes", "cached gradients"},
    "bart": {"padding", "prefix reuse", "fixed shapes"},
    "jamba": {"several positions", "prefix reuse", "cached gradients"},
    "falcon_mamba": {"several positions", "prefix reuse", "fixed shapes", "cached gradients"},
    "bloom": {"fixed shapes"},
    "ctrl": {"intact inputs"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", OFF)
def test_what_fails_is_off_and_says_why(model_type, dtype):
    """In bfloat16 too, where rounding hides most of these from a forward of the whole model."""
    agent = Agent(tiny(model_type).to(dtype), tiny_tokenizer(), name="x")
    reasons = {feature: missing(agent.decoder, feature) for feature in FEATURES}
    assert {feature for feature, reason in reasons.items() if reason} == OFF[model_type]
    for feature in OFF[model_type]:
        assert reasons[feature].startswith(f"{agent.decoder.config.model_type} model without {feature}: ")
        assert len(reasons[feature].splitlines()) == 1


def test_a_feature_that_is_off_is_named_where_prompts_were_read():
    agent = Agent(tiny("openai-gpt"), tiny_tokenizer(), name="x")
    prefixes = PrefixReuse()
    with torch.no_grad():
        agent.think(prompts(agent, (4, 2))[0], 2, tiny_link(agent), prefill=prefixes.prefill("a", None))
    assert prefixes.last.reason == "openai-gpt model without cache: ValueError: its forward takes no cache"


def test_embeddings_are_not_written_into():
    agent = Agent(tiny("ctrl"), tiny_tokenizer(), name="x")
    batch, _ = prompts(agent, (4, 2))
    before = batch.embeds.clone()
    with torch.no_grad():
        agent.think(batch, 3, tiny_link(agent))
    assert torch.equal(batch.embeds, before)


def test_proofs_are_made_once_for_models_of_one_fingerprint(monkeypatch):
    monkeypatch.setattr(abilities, "_FOUND", {})
    first, second, other = (tiny_model("llama", seed=seed).get_decoder() for seed in range(3))
    assert fingerprint(first) == fingerprint(second)
    other.config.rms_norm_eps = 1.0
    assert fingerprint(other) != fingerprint(first)
    assert fingerprint(first.to(torch.bfloat16)) != fingerprint(second)
    expected = proof(second, "cache")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a model ran"))
    assert proof(tiny_model("llama", seed=5).get_decoder(), "cache") is expected


def test_what_raises_is_a_proof_that_fails(monkeypatch):
    def raising(_):
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(abilities, "_FOUND", {})
    monkeypatch.setattr(abilities, "_PROVERS", {})
    abilities.proves("flying", "swimming")(raising)
    decoder = tiny_model("llama").get_decoder()
    assert missing(decoder, "flying") == "llama model without flying: KeyError: 'first line\\nsecond line'"
    assert not proof(decoder, "swimming").holds


def test_out_of_memory_is_no_proof(monkeypatch):
    def short(_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(abilities, "_FOUND", {})
    monkeypatch.setattr(abilities, "_PROVERS", {})
    abilities.proves("flying")(short)
    with pytest.raises(torch.OutOfMemoryError):
        proof(tiny_model("llama").get_decoder(), "flying")


def test_a_proof_in_words():
    assert str(Proof.of(0.5, 1e-6, "these and those")) == (
        "these and those differ by 5.0e-01 of their size; rounding explains 1.0e-06"
    )
    assert not Proof.of(float("nan"), 1.0, "").holds
    assert str(Proof.raised(ValueError())) == "ValueError: no message"


def test_twins_are_the_first_layers_in_float32():
    agent = tiny_agent("gemma3_text")
    decoder = copy.deepcopy(agent.model).bfloat16().get_decoder()
    short, whole, itself = twins(decoder)
    assert [len(twin.layers) for twin in (short, whole)] == [3, 3]  # the first full attention is the third layer
    assert {weight.dtype for weight in short.parameters()} == {torch.float32}
    assert itself is decoder
    assert {weight.dtype for weight in decoder.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in short.parameters())
    assert [len(twin.layers) for twin in twins(tiny_model("llama").get_decoder())] == [2, 3, 3]


def test_a_twin_that_cannot_run_makes_way_for_the_next(monkeypatch):
    decoder = tiny_model("llama").get_decoder()

    def two(_):
        broken = copy.deepcopy(decoder)
        broken.layers = None
        yield broken
        yield decoder

    monkeypatch.setattr("recmas.engine.probe.twins", two)
    assert Probe(decoder).decoder is decoder


def test_the_probe_avoids_tokens_with_a_meaning():
    decoder = tiny_model("llama").get_decoder()
    before = probe_ids(decoder)
    decoder.config.eos_token_id = before[0, :4].tolist()
    after = probe_ids(decoder)
    assert not set(after.flatten().tolist()) & set(before[0, :4].tolist())
    assert torch.equal(after[0, :8], after[1, :8])
    assert not (after[0, 8:] == after[1, 8:]).any()


def test_distance_is_the_worst_position_and_never_nan():
    expected = torch.ones(2, 3, 4)
    found = expected.clone()
    assert distance(found, expected) == 0
    found[1, 2] *= 1.5
    assert distance(found, expected) == pytest.approx(0.5)
    found[0, 0, 0] = torch.nan
    assert distance(found, expected) == float("inf")
    assert distance(torch.zeros(1, 2), torch.zeros(1, 2)) == 0


def test_moved_embeddings_are_the_neighbouring_numbers():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        embeds = torch.randn(1, 4, 32).to(dtype)
        change = ((moved(embeds).double() - embeds.double()) / embeds.double()).abs()
        assert 0 < change.max() <= 2 * torch.finfo(dtype).eps


@torch.no_grad()
def test_a_call_passes_only_what_a_forward_takes():
    agent = Agent(tiny("bart"), tiny_tokenizer(), name="x")  # takes no positions
    batch, rows = prompts(agent, (6,))
    call = DecoderCall(agent.decoder)
    expected = agent.decoder(inputs_embeds=rows[0]).last_hidden_state
    assert torch.equal(call(batch.embeds, batch.mask, torch.full((1, 6), 7)), expected)
    with pytest.raises(ValueError, match="its forward takes no cache"):
        DecoderCall(tiny("openai-gpt").transformer)(batch.embeds, batch.mask, batch.mask, replace)
