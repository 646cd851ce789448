"""Agents whose frozen layers are packed: the same answers, gradients, files and digests as plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recmas import SEQUENTIAL, Agent, RecursiveMAS
from recmas.agents.fingerprint import model_digest
from recmas.cli import main
from recmas.engine.abilities import fingerprint
from recmas.engine.growing_cache import GrowingCache
from recmas.system.fingerprint import digest
from recmas.training import outer_loss
from recmas_kernels import FrozenLinear
from recmas_kernels.backends import cpu
from recmas_kernels.backends.cpu import decoder
from tests.runtime.tiny import FAMILIES, prompts, tiny_agent, tiny_link, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
EPS = torch.finfo(torch.float32).eps


def accelerated(family: str, dtype: torch.dtype = torch.float32) -> Agent:
    return Agent(tiny_model(family).to(dtype), tiny_tokenizer(), name="agent", accelerate=True)


def packed_layers(agent: Agent) -> list[FrozenLinear]:
    return [part for part in agent.model.modules() if isinstance(part, FrozenLinear) and part.packed() is not None]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_thinking_writing_and_gradients_are_those_of_the_plain_agent(family: str):
    plain, packed = tiny_agent(family), accelerated(family)
    assert packed_layers(packed)
    assert packed.accelerated.norms
    link = tiny_link(plain)
    prompt, _ = prompts(plain, (9, 4, 1))
    states, others = (agent.think(prompt, 5, link).states for agent in (plain, packed))
    bound = 256 * EPS * states.abs().max().item()  # a few roundings in each of 5 steps through 3 layers
    torch.testing.assert_close(others, states, rtol=0, atol=bound)
    assert plain.decode(prompt, 8) == packed.decode(prompt, 8)
    ids = torch.randint(10, 300, (3, 6), generator=torch.Generator().manual_seed(1))
    found = []
    for agent in (plain, packed):
        embeds = prompt.embeds.clone().requires_grad_()
        hidden = agent.hidden(type(prompt)(embeds, prompt.mask), ids, torch.ones_like(ids))
        loss = torch.nn.functional.cross_entropy(agent.logits(hidden).flatten(0, 1), ids.flatten())
        found.append(torch.autograd.grad(loss, embeds)[0])
    torch.testing.assert_close(*found, rtol=0, atol=256 * EPS * found[0].abs().max().item())


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_step_runs_all_layers_in_one_call_with_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch):
    agent = accelerated(family)
    prompt, _ = prompts(agent, (9, 4, 1))
    calls = []
    real = decoder.DecoderLayers.__call__

    def counted(layers: decoder.DecoderLayers, *given: Any) -> bool:
        calls.append(layers.count)
        return real(layers, *given)

    monkeypatch.setattr(decoder.DecoderLayers, "__call__", counted)
    states, tokens = agent.think(prompt, 5, tiny_link(agent)).states, agent.decode(prompt, 4)
    assert len(calls) == 4 + 3  # the first state and the first token are of the prompt
    assert set(calls) == {agent.decoder.config.num_hidden_layers}
    calls.clear()
    for name in ("make_room", "lend"):
        monkeypatch.setattr(GrowingCache, name, lambda cache, *given: None)
    assert torch.equal(agent.think(prompt, 5, tiny_link(agent)).states, states)
    assert agent.decode(prompt, 4) == tokens
    assert not calls


@pytest.mark.parametrize("other", [False, True], ids=["one more", "in another's place"])
@torch.no_grad()
def test_an_attention_that_comes_before_another_of_its_name_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, other: bool
):
    """As ``ALL_ATTENTION_FUNCTIONS[name] = function`` puts it, where a table grows or only changes one of its names."""
    if other:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "other", lambda *given, **more: None)
    plain, packed = tiny_agent("llama"), accelerated("llama")
    prompt, link = prompts(plain, (9, 4, 1))[0], tiny_link(plain)
    before = packed.think(prompt, 3, link).states
    name = packed.decoder.config._attn_implementation
    real = ALL_ATTENTION_FUNCTIONS[name]

    def doubled(*given: Any, **more: Any) -> tuple[torch.Tensor, Any]:
        found, weights = real(*given, **more)
        return 2 * found, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, doubled)
    if other:
        monkeypatch.delitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "other")
    states, others = (agent.think(prompt, 3, link).states for agent in (plain, packed))
    assert not torch.allclose(before, states)
    torch.testing.assert_close(others, states, rtol=0, atol=256 * EPS * states.abs().max().item())


def test_files_and_digests_are_the_same(tmp_path):
    plain, packed = tiny_agent("llama"), accelerated("llama")
    assert model_digest(packed) == model_digest(plain)
    assert fingerprint(packed.decoder) == fingerprint(plain.decoder)
    assert packed.model.num_parameters() == plain.model.num_parameters()
    for name, agent in (("plain", plain), ("packed", packed)):
        agent.save_pretrained(tmp_path / name)
    assert packed_layers(packed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "packed")]
    assert files[0] == files[1]


def test_a_cast_packs_again_and_unpack_gives_the_model_back():
    agent = accelerated("qwen2")
    count = len(packed_layers(agent))
    agent.to(torch.bfloat16)
    assert all(layer.panels.dtype is torch.bfloat16 for layer in packed_layers(agent))
    assert len(packed_layers(agent)) == count
    prompt, _ = prompts(agent, (5, 3))
    assert torch.isfinite(agent.think(prompt, 2, tiny_link(agent)).states).all()
    agent.unpack()
    assert not packed_layers(agent)
    agent.unpack()  # nothing is left to unpack


def test_a_tied_head_stays_and_is_reported():
    agent = accelerated("qwen2")
    assert "model.embed_tokens" in agent.accelerated.left["lm_head"]
    assert "lm_head is left as it is" in str(agent.accelerated)


def test_compiled_steps_run_from_packed_weights():
    agents = [
        Agent(tiny_model("llama"), tiny_tokenizer(), name="agent", compile=True, accelerate=accelerate)
        for accelerate in (False, True)
    ]
    prompt, _ = prompts(agents[0], (5, 3))
    link = tiny_link(agents[0])
    states, others = (agent.think(prompt, 3, link).states for agent in agents)
    torch.testing.assert_close(others, states, rtol=0, atol=256 * EPS * states.abs().max().item())


def test_systems_are_accelerated_unless_told_otherwise(tmp_path, capsys):
    for role, seed in (("planner", 1), ("critic", 2), ("solver", 3)):
        tiny_agent("llama", role, seed=seed).save_pretrained(tmp_path / role)
    models = {role: tmp_path / role for role in ("planner", "critic", "solver")}
    system = RecursiveMAS.create(models, SEQUENTIAL, rounds=2, latent_steps=2, seed=0)
    assert all(packed_layers(agent) for agent in system.agents.values())
    system.save_pretrained(tmp_path / "system")
    packed = RecursiveMAS.from_pretrained(tmp_path / "system")
    plain = RecursiveMAS.from_pretrained(tmp_path / "system", accelerate=False)
    assert all(packed_layers(agent) for agent in packed.agents.values())
    assert not any(packed_layers(agent) for agent in plain.agents.values())
    assert digest(packed) == digest(plain)
    texts = [[answer.text for answer in mas.answer([{"question": "fox"}], max_new_tokens=6)] for mas in (packed, plain)]
    assert texts[0] == texts[1]
    visiting = RecursiveMAS.from_pretrained(tmp_path / "system", offload=True)
    assert not any(packed_layers(agent) for agent in visiting.agents.values())
    outputs = []
    for more in ([], ["--no-accelerate"]):
        assert main(["run", str(tmp_path / "system"), "--question", "fox", "--max-new-tokens", "6", *more]) == 0
        outputs.append(capsys.readouterr().out.rpartition(",")[0])  # the time comes last
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("latents", ["forced", "rollout"])
def test_gradients_of_outer_training_are_those_of_plain_agents(latents: str):
    rows = [
        {"question": question, "targets": dict.fromkeys(SEQUENTIAL.roles, answer)}
        for question, answer in (("fox", "the dog"), ("dog", "a fox"))
    ]
    found = []
    for make in (tiny_agent, accelerated):
        agents = {role: make("llama") for role in SEQUENTIAL.roles}
        system = RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2, seed=0)
        weights = [weight for link in system.outer_links.values() for weight in link.parameters()]
        loss = outer_loss(system, rows, 2, latents=latents)
        found.append(torch.cat([part.reshape(-1) for part in (loss, *torch.autograd.grad(loss, weights))]).detach())
    plain, packed = found
    bound = 1024 * EPS * plain.abs().max().item()  # a few roundings in each layer of 2 rounds, forth and back
    torch.testing.assert_close(packed, plain, rtol=0, atol=bound)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_greedy_texts_are_equal_where_the_margin_exceeds_the_error(family: str):
    plain, packed = tiny_agent(family), accelerated(family)
    prompt, _ = prompts(plain, (9, 4, 1))
    replies = plain.decode(prompt, 8), packed.decode(prompt, 8)
    decided = 0
    for row, (expected, found) in enumerate(zip(*replies, strict=True)):
        ids = torch.tensor([expected])
        one = type(prompt)(prompt.embeds[row : row + 1], prompt.mask[row : row + 1])
        logits = [agent.logits(agent.hidden(one, ids, torch.ones_like(ids)))[0] for agent in (plain, packed)]
        error = (logits[0] - logits[1]).abs().amax(dim=-1)
        best = logits[0].topk(2, dim=-1).values
        sure = (best[:, 0] - best[:, 1] > 2 * error).long().cumprod(dim=0).sum().item()
        assert found[:sure] == expected[:sure]
        decided += sure
    assert decided > 0


def test_two_agents_of_one_model():
    model = tiny_model("llama")
    plain = tiny_agent("llama")
    first, second = (Agent(model, tiny_tokenizer(), name=name, accelerate=True) for name in ("one", "two"))
    prompt, _ = prompts(plain, (5, 3))
    assert list(first.accelerated.packed) == list(second.accelerated.packed)
    assert first.accelerated.packed_bytes == second.accelerated.packed_bytes
    agents = dict.fromkeys(SEQUENTIAL.roles, first)
    with pytest.raises(ValueError, match="offload: the model of .* is packed for somebody else, too"):
        RecursiveMAS.create(agents, SEQUENTIAL, rounds=1, latent_steps=1, seed=0)._new_offloader(
            dict.fromkeys(SEQUENTIAL.roles, torch.device("cpu"))
        )
    assert first.accelerated is None
    assert packed_layers(second)
    assert second.decode(prompt, 5) == plain.decode(prompt, 5)
    second.unpack()
    assert not packed_layers(second)
    assert second.decode(prompt, 5) == plain.decode(prompt, 5)


def test_an_agent_packed_in_inference_mode_trains_links():
    model = tiny_model("qwen2")
    with torch.inference_mode():
        agent = Agent(model, tiny_tokenizer(), name="agent", accelerate=True)
    prompt, _ = prompts(agent, (5, 3))
    embeds = prompt.embeds.clone().requires_grad_()
    ids = torch.ones(2, 3, dtype=torch.int64)
    hidden = agent.hidden(type(prompt)(embeds, prompt.mask), ids, torch.ones_like(ids))
    assert torch.autograd.grad(hidden.sum(), embeds)[0].isfinite().all()


def test_agents_given_to_an_offloaded_system_are_unpacked():
    agents = {role: accelerated("llama") for role in SEQUENTIAL.roles}
    system = RecursiveMAS.create(agents, SEQUENTIAL, rounds=1, latent_steps=1, seed=0)
    RecursiveMAS(
        system.agents, system.inner_links, system.outer_links, system.pattern, settings=system.settings, offload="cpu"
    )
    assert not any(packed_layers(agent) for agent in agents.values())
