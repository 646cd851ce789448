"""Latent steps at fixed shapes, compiled and captured: the numbers of the plain loop, on buffers that stay in place."""

from __future__ import annotations

import functools
import inspect
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.agents.agent import Agent
from recmas.engine.abilities import missing
from recmas.engine.buckets import BUCKETS
from recmas.engine.fixed_shapes import FixedShapeContinuation, bucket, unfit
from recmas.engine.messages import Latents, Prompt
from recmas.engine.prefill import begin
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.engine.stepper import SPARE, Stepper
from recmas.prompts.template import Slot
from recmas.system.prompt_assembly import assemble
from tests.runtime.engine.plain_rollout import check_rollout, relative_error
from tests.runtime.tiny import prompts, tiny_agent, tiny_link, tiny_model, tiny_tokenizer

STEPS = 8
LENGTHS = {"even": (9, 9, 9), "padded": (9, 3, 7), "beyond a bucket": (70, 2, 30), "one": (1,)}


def fixed(agent: Agent, **options: Any) -> Agent:
    """The agent with a stepper of its own."""
    twin = Agent(agent.model, agent.tokenizer, name=agent.name)
    twin.stepper = Stepper(**{"fixed_shapes": True, **options})
    return twin


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@torch.no_grad()
def test_fixed_shapes_give_the_uncached_rollout(agent, lengths):
    link, agent = tiny_link(agent), fixed(agent)
    batch, rows = prompts(agent, lengths)
    states = agent.think(batch, STEPS, link).states
    assert states.shape == (len(rows), STEPS, agent.hidden_size)
    assert len(agent.stepper.pool.held) == 1
    for index, embeds in enumerate(rows):
        check_rollout(states[index], agent, embeds, STEPS, link)


@torch.no_grad()
def test_batches_of_one_bucket_share_its_buffers_and_nothing_else(agent):
    """Longer and fuller batches leave their contents in the buffers; those after them must not see any of it."""
    link, agent = tiny_link(agent), fixed(agent)
    addresses = []
    for lengths in ((40, 31, 5, 20), (9, 3, 7), (2, 2, 2, 2), (17, 50, 1)):
        batch, rows = prompts(agent, lengths, seed=len(addresses))
        states = agent.think(batch, STEPS, link).states
        for index, embeds in enumerate(rows):
            check_rollout(states[index], agent, embeds, STEPS, link)
        (held,) = agent.stepper.pool.held.values()
        addresses.append([buffer.data_ptr() for buffer in buffers(held.continuation)])
    assert all(found == addresses[0] for found in addresses)


@torch.no_grad()
def test_nothing_of_a_broken_batch_stays(agent):
    link, agent = tiny_link(agent), fixed(agent)
    expected = agent.think(prompts(agent, (9, 3))[0], STEPS, link).states
    broken, _ = prompts(agent, (50, 50))
    broken.embeds.fill_(torch.nan)
    assert agent.think(broken, STEPS, link).states.isnan().all()
    assert len(agent.stepper.pool.held) == 1
    assert torch.equal(agent.think(prompts(agent, (9, 3))[0], STEPS, link).states, expected)


@torch.no_grad()
def test_threads_that_share_an_agent_share_no_buffers():
    agent = fixed(tiny_agent("llama"))
    link = tiny_link(agent)

    class Slow(torch.nn.Module):
        def forward(self, hidden):
            time.sleep(0.005)  # lets the other thread in
            return link(hidden)

    batches = [prompts(agent, (9, 3), seed)[0] for seed in range(2)]
    expected = [agent.think(batch, STEPS, link).states for batch in batches]
    slow = Slow()

    def think(batch: Prompt) -> torch.Tensor:
        with torch.no_grad():
            return agent.think(batch, STEPS, slow).states

    with ThreadPoolExecutor(2) as pool:
        for states, alone in zip(pool.map(think, batches), expected, strict=True):
            assert torch.equal(states, alone)


def test_buffers_made_in_inference_mode_stay_in_it():
    """Torch refuses to write to them elsewhere."""
    agent = fixed(tiny_agent("llama"))
    link, (batch, _) = tiny_link(agent), prompts(agent, (9, 3))
    found = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found.append((agent.think(batch, STEPS, link).states, agent.decode(batch, STEPS)))
    assert all(torch.equal(states, found[0][0]) and texts == found[0][1] for states, texts in found)
    assert len(agent.stepper.pool.held) == 2


@torch.no_grad()
def test_an_agent_that_moves_leaves_no_buffers_behind():
    agent = fixed(tiny_agent("llama"))
    agent.think(prompts(agent, (9, 3))[0], STEPS, tiny_link(agent))
    agent.to(dtype=torch.float64)
    assert not agent.stepper.pool.held


def buffers(static: FixedShapeContinuation) -> list[torch.Tensor]:
    found = [static._column, static._positions, static._full, static._sliding]
    for layer in static.cache.layers:
        if hasattr(layer, "conv_states"):
            found += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        else:
            found += [layer.keys, layer.values]
    return found


@torch.no_grad()
def test_fixed_shapes_continue_a_reused_prefix(agent):
    link, agent, prefixes = tiny_link(agent), fixed(agent), PrefixReuse()
    slot, heads = Slot(("other",)), [[20] * 11, [30, 40, 50]]
    for round in range(3):
        generator = torch.Generator().manual_seed(round)
        latents = {slot.senders: Latents(torch.randn(2, 4, agent.hidden_size, generator=generator))}
        links = {slot.senders: [torch.nn.Identity()] * 2}
        prompt = assemble(
            agent.embed, [[head, slot, [7]] for head in heads], latents, links, pad_id=agent.pad_id, device="cpu"
        )
        prefill = prefixes.prefill("a", (lambda: heads) if round < 2 else None)
        states = agent.think(prompt, STEPS, link, prefill=prefill).states
        for row in range(2):
            check_rollout(states[row], agent, prompt.embeds[row : row + 1, prompt.mask[row] == 1], STEPS, link)
    assert prefixes.last.computed < prefixes.last.positions


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.no_grad()
def test_eager_attention_reads_the_same_masks(family):
    agent = fixed(tiny_agent(family))
    agent.decoder.set_attn_implementation("eager")
    link = tiny_link(agent)
    batch, rows = prompts(agent, (9, 3, 7))
    states = agent.think(batch, STEPS, link).states
    for index, embeds in enumerate(rows):
        check_rollout(states[index], agent, embeds, STEPS, link)


def test_buckets_are_a_little_larger():
    for batch in range(1, 100):
        for length in (1, 63, 64, 65, 500, 512, 513, 1000, 4097):
            rows, columns = bucket(batch, length)
            assert batch <= rows < 2 * batch or rows == batch == 1
            assert length <= columns < max(length + 64, 1.25 * length)
            assert bucket(rows, columns) == (rows, columns)
    assert len({bucket(batch, length) for batch in range(5, 9) for length in range(257, 321)}) == 1


@torch.no_grad()
def test_few_buckets_are_kept():
    agent = fixed(tiny_agent("llama"))
    link = tiny_link(agent)
    for lengths in ((10,), (70,), (130,), (20, 10), (110,), (140,)):
        agent.think(prompts(agent, lengths)[0], 4, link)
    kept = [(held.continuation.rows, held.continuation.columns) for held in agent.stepper.pool.held.values()]
    assert kept == [(1, 128), (1, 192)]
    assert len(kept) == BUCKETS


def test_a_model_that_cannot_run_at_fixed_shapes_says_why():
    absolute = Agent(
        AutoModelForCausalLM.from_config(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)).float(),
        tiny_tokenizer(),
        name="x",
    )
    absolute.stepper = Stepper(fixed_shapes=True)
    assert "without fixed shapes" in missing(absolute.decoder, "fixed shapes")
    llama = fixed(tiny_agent("llama"))
    batch, _ = prompts(llama, (4, 2))
    with torch.no_grad():
        link = tiny_link(absolute)
        states = absolute.think(prompts(absolute, (4, 2))[0], 3, link).states
        assert states.shape == (2, 3, 32)
        assert not absolute.stepper.pool.held
        assert "bloom model without fixed shapes: " in unfit(begin(absolute.decoder, batch.mask, 3, None))
        llama.think(batch, 3, tiny_link(llama))
        assert llama.stepper.reason == "graphs are captured on CUDA; this is cpu"
        assert len(llama.stepper.pool.held) == 1
    kept = fixed(tiny_agent("llama"))
    assert kept.think(batch, 3, tiny_link(kept)).states.requires_grad
    assert not kept.stepper.pool.held


@torch.no_grad()
def test_positions_that_are_learned_run_at_fixed_shapes():
    """As their proof says: no list of models decides."""
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2)
    agent = Agent(AutoModelForCausalLM.from_config(config).float(), tiny_tokenizer(), name="x")
    agent.stepper = Stepper(fixed_shapes=True)
    batch, rows = prompts(agent, (4, 2))
    link = tiny_link(agent)
    states = agent.think(batch, 3, link).states
    assert agent.stepper.pool.held
    for state, embeds in zip(states, rows, strict=True):
        check_rollout(state, agent, embeds, 3, link)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text"])
@torch.no_grad()
def test_one_step_is_compiled_for_all_steps_and_batches_of_a_bucket(family, monkeypatch):
    """Traced once, without a break; what the tracer hands on is run as it stands."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    plain = tiny_agent(family)
    agent, link = fixed(plain, compiled=True), tiny_link(plain)
    counters.clear()
    for lengths in ((9, 3, 7), (5, 5, 5, 5), (9, 12, 1, 4)):
        batch, rows = prompts(agent, lengths)
        states = agent.think(batch, STEPS, link).states
        for index, embeds in enumerate(rows):
            check_rollout(states[index], agent, embeds, STEPS, link)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="needs a newer torch"
)
@torch.no_grad()
def test_buckets_do_not_count_against_each_other(monkeypatch):
    """Torch gives up on a function that it has compiled too often."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    agent = fixed(tiny_agent("llama"), compiled=True)
    link = tiny_link(agent)
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(3):
            agent.think(prompts(agent, (9,) * 2**number)[0], STEPS, link)
            assert counters["stats"]["unique_graphs"] == number + 1


@torch.no_grad()
def test_the_compiled_step_gives_the_same_numbers():
    """With torch's own compiler, on the CPU."""
    agent = Agent(tiny_model("llama"), tiny_tokenizer(), name="x", compile=True)
    link = tiny_link(agent)
    batch, rows = prompts(agent, (9, 3, 7))
    states = agent.think(batch, STEPS, link).states
    for index, embeds in enumerate(rows):
        check_rollout(states[index], agent, embeds, STEPS, link)


@torch.no_grad()
def test_a_compiled_step_heeds_hooks(monkeypatch):
    """Torch does not look for hooks again once it has compiled."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    plain = tiny_agent("llama")
    agent, link = fixed(plain, compiled=True), tiny_link(plain)
    batch, rows = prompts(agent, (9, 3, 7))
    part, gains = agent.decoder.layers[1].self_attn.v_proj, [2.0]
    for gains[0] in (None, 2.0, 3.0, None):
        hook = part.register_forward_hook(lambda module, given, found: found if gains[0] is None else gains[0] * found)
        if gains[0] is None:
            hook.remove()
        before = counters["stats"]["calls_captured"]
        states = agent.think(batch, STEPS, link).states
        for index, embeds in enumerate(rows):
            check_rollout(states[index], agent, embeds, STEPS, link)
        hook.remove()
        assert before > 0 or counters["stats"]["calls_captured"] > before


def test_a_system_compiles_the_agents_it_loads(tmp_path):
    mas = RecursiveMAS.create({role: tiny_agent("llama") for role in SEQUENTIAL.roles}, SEQUENTIAL, rounds=1)
    assert not mas.agents["planner"].stepper.compiled
    mas.save_pretrained(tmp_path / "s")
    for compile in (False, True):
        loaded = RecursiveMAS.from_pretrained(tmp_path / "s", compile=compile)
        assert {agent.stepper.compiled for agent in loaded.agents.values()} == {compile}
    models = {role: tmp_path / "s" / "agents" / role for role in SEQUENTIAL.roles if role != "critic"}
    made = RecursiveMAS.create({**models, "critic": mas.agents["critic"]}, SEQUENTIAL, rounds=1, compile=True)
    assert [made.agents[role].stepper.compiled for role in SEQUENTIAL.roles] == [True, False, True]
    offloaded = RecursiveMAS.from_pretrained(tmp_path / "s", offload=True)
    offloaded.answer(["fox"], max_new_tokens=1)
    assert offloaded.agents["planner"].stepper.reason == "weights are on the device for visits only"


@pytest.fixture
def on_gpu(agent):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    twin = Agent(tiny_model(agent.name).cuda(), tiny_tokenizer(), name=agent.name)
    return twin, tiny_link(agent).cuda()


def cuda_prompts(agent: Agent, lengths: tuple[int, ...], seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(10, 320, (length,), generator=generator).tolist() for length in lengths]
    return assemble(agent.embed, [[row] for row in rows], {}, {}, pad_id=agent.pad_id, device="cuda")


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_is_captured_once_and_replayed_for_other_batches(on_gpu):
    agent, link = on_gpu
    loop = Agent(agent.model, agent.tokenizer, name="loop")
    loop.stepper = Stepper(graphs=False)
    kept = []
    for seed, lengths in enumerate([(9, 3, 7), (20, 31, 5, 2), (9, 9, 9, 9)]):
        prompt = cuda_prompts(agent, lengths, seed)
        states = agent.think(prompt, STEPS, link).states
        assert agent.stepper.reason == ("" if seed else "a graph is captured when its bucket is used again")
        kept.append((states, states.clone()))
        assert relative_error(states, loop.think(prompt, STEPS, link).states) < 1e-4
    assert agent.stepper.captures == 1
    assert all(torch.equal(*pair) for pair in kept)  # replays write into none of the results handed out
    agent.think(cuda_prompts(agent, (9, 3, 7)), STEPS + 1, link)
    assert agent.stepper.captures == 1  # one graph of one step
    assert loop.stepper.reason == "graphs are off"


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_see_weights_that_change_in_place_and_follow_those_that_move(on_gpu):
    agent, link = on_gpu
    loop = Agent(agent.model, agent.tokenizer, name="loop")
    loop.stepper = Stepper(graphs=False)
    prompt = cuda_prompts(agent, (9, 3, 7))
    for _ in range(2):
        agent.think(prompt, STEPS, link)
    link.proj1.weight.mul_(0.5)
    assert relative_error(agent.think(prompt, STEPS, link).states, loop.think(prompt, STEPS, link).states) < 1e-4
    assert agent.stepper.captures == 1
    moved = []
    for number in range(SPARE + 1):
        moved.append(link.proj1.weight.data)
        link.proj1.weight.data = link.proj1.weight.data.clone() * 0.9
        assert relative_error(agent.think(prompt, STEPS, link).states, loop.think(prompt, STEPS, link).states) < 1e-4
        assert agent.stepper.captures == number + 2
    agent.think(prompt, STEPS, link)
    assert agent.stepper.reason == "graphs were captured more often than they were used again"


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@torch.no_grad()
def test_tokens_are_captured_and_are_those_of_the_loop(on_gpu, temperature):
    agent, _ = on_gpu
    loop = Agent(agent.model, agent.tokenizer, name="loop")
    loop.stepper = Stepper(graphs=False)
    for seed, lengths in enumerate([(9, 3, 7), (20, 31, 5, 2)]):
        prompt = cuda_prompts(agent, lengths, seed)
        settings = 100, temperature, 0.95, 3
        assert agent.decode(prompt, *settings) == loop.decode(prompt, *settings)
        assert agent.stepper.reason == ""
    assert (agent.stepper.captures, agent.stepper.reuses) == (1, 1)


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_that_waits_for_the_gpu_leaves_nothing_behind(on_gpu):
    agent, link = on_gpu

    class Waiting(torch.nn.Module):
        def forward(self, hidden):
            return link(hidden) if float(hidden[0, 0]) < 1e9 else hidden

    prompt, waiting = cuda_prompts(agent, (9, 3, 7)), Waiting()
    stream = torch.cuda.current_stream()
    expected = agent.think(prompt, STEPS, waiting).states
    with pytest.warns(UserWarning, match="a step waits for the device"):
        assert torch.equal(agent.think(prompt, STEPS, waiting).states, expected)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(3, device="cuda").isfinite().all()
    other = Agent(agent.model, agent.tokenizer, name="other")
    for _ in range(2):
        assert relative_error(other.think(prompt, STEPS, link).states, expected) < 1e-4
    assert other.stepper.reason == ""


@pytest.mark.gpu
@torch.no_grad()
def test_what_is_not_captured_says_why_on_a_gpu(on_gpu):
    agent, link = on_gpu
    prompt = cuda_prompts(agent, (9, 3, 7))
    agent.think(prompt, STEPS, lambda hidden: link(hidden))
    assert agent.stepper.reason == "the link is not a module, so a change of its weights cannot be noticed"
    agent.think(prompt, 1, link)
    assert agent.stepper.reason == "a single step feeds nothing back"
    assert agent.stepper.captures == 0
