"""Prefix reuse: the same numbers as without it, what it saves, and when nothing may be reused."""

from __future__ import annotations

import pytest
import torch

from recmas import SEQUENTIAL, Pattern, RecursiveMAS
from recmas.agents.agent import Agent
from recmas.config.system_json import PromptSpec
from recmas.engine.cache_snapshot import Snapshot, common_columns
from recmas.engine.constant_prefixes import LEAST_POSITIONS
from recmas.engine.continuation import Continuation
from recmas.engine.messages import Latents, Prompt
from recmas.engine.model_state import ModelState
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.prompts.template import Slot
from recmas.system.prompt_assembly import assemble
from tests.runtime.engine.plain_rollout import check_rollout, relative_error
from tests.runtime.families.matrix import tiny
from tests.runtime.tiny import VOCABULARY, tiny_agent, tiny_link, tiny_tokenizer

STEPS = 5
SLOT = Slot(("other",))
SIX = ["llama", "qwen2", "qwen3", "gemma3_text", "mistral", "qwen3_5_text"]
QUESTIONS = ["fox", "what is the answer to everything?", "the lazy dog jumps", "0 + 1 ="]


def rows_of(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def spliced(agent, segments, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(segments), STEPS, agent.hidden_size, generator=generator) * agent.embedding_rms()
    latents = {SLOT.senders: Latents(states)}
    links = {SLOT.senders: [torch.nn.Identity()] * len(segments)}
    return assemble(agent.embed, segments, latents, links, pad_id=agent.pad_id, device="cpu")


def row_of(prompt: Prompt, row: int) -> torch.Tensor:
    """The row's own embeddings ``[1, T, d]``."""
    return prompt.embeds[row : row + 1, prompt.mask[row] == 1]


SHAPES = {
    "even": ((9, 9, 9), (4, 4, 4)),
    "ragged before the slot": ((13, 2, 8), (4, 4, 4)),
    "ragged after the slot": ((9, 9, 9), (6, 1, 3)),
    "ragged": ((13, 2, 8), (6, 4, 1)),
    "one row fits into the rest": ((20, 1, 18), (2, 1, 9)),
    "one row": ((12,), (3,)),
    "slot at the end": ((12, 7), (0, 0)),
}


@pytest.mark.parametrize(("before", "after"), SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_rollouts_of_later_rounds_equal_uncached_ones(agent, before, after):
    """Three rounds with the same texts and other latents; every family, every shape of the batch."""
    link = tiny_link(agent)
    heads, tails = rows_of(before, 1), rows_of(after, 2)
    segments = [[head, SLOT, *([tail] if tail else [])] for head, tail in zip(heads, tails, strict=True)]
    prefixes = PrefixReuse()
    for round in range(3):
        prompt = spliced(agent, segments, seed=round)
        found = agent.think(prompt, STEPS, link, prefill=prefixes.prefill("a", (lambda: heads) if round < 2 else None))
        for row in range(len(heads)):
            check_rollout(found.states[row], agent, row_of(prompt, row), STEPS, link)
        reused = prefixes.last.positions - prefixes.last.computed
        rest = STEPS + max(after)  # every row is fed as many
        totals = [head + STEPS + tail for head, tail in zip(before, after, strict=True)]
        assert reused == (sum(max(total - rest, 0) for total in totals) if round else 0)
    assert not prefixes._held


@torch.no_grad()
def test_a_first_prompt_serves_the_later_one_as_far_as_they_agree(agent):
    """Round 1 has no slot; later prompts begin alike and go on differently."""
    link, prefixes = tiny_link(agent), PrefixReuse()
    heads, tails = rows_of((12, 5, 9), 1), rows_of((3, 3, 3), 2)
    first = assemble(agent.embed, [[[*head, 20, 21, 22]] for head in heads], {}, {}, pad_id=agent.pad_id, device="cpu")
    agent.think(first, STEPS, link, prefill=prefixes.prefill("a", lambda: [[*head, 30] for head in heads]))
    for round, more in ((2, True), (3, False)):
        segments = [[[*head, 30], SLOT, tail] for head, tail in zip(heads, tails, strict=True)]
        later = spliced(agent, segments, seed=round)
        coming = (lambda: [[*head, 30] for head in heads]) if more else None
        found = agent.think(later, STEPS, link, prefill=prefixes.prefill("a", coming)).states
        for row in range(3):
            check_rollout(found[row], agent, row_of(later, row), STEPS, link)
        agreeing = 12 + 5 + 9 + (3 if round == 3 else 0)
        assert prefixes.last.positions - prefixes.last.computed == agreeing


@torch.no_grad()
def test_rows_may_be_padded_otherwise_than_before(agent):
    """The first prompts end in other columns than the later ones, so what is reused moves, each row by its own way."""
    link, prefixes = tiny_link(agent), PrefixReuse()
    heads = rows_of((12, 5, 9), 1)
    first = [[head + tail] for head, tail in zip(heads, rows_of((1, 9, 4), 2), strict=True)]
    prompt = assemble(agent.embed, first, {}, {}, pad_id=agent.pad_id, device="cpu")
    agent.think(prompt, STEPS, link, prefill=prefixes.prefill("a", lambda: heads))
    later = spliced(agent, [[head, SLOT, [7] * more] for head, more in zip(heads, (2, 1, 3), strict=True)], seed=1)
    found = agent.think(later, STEPS, link, prefill=prefixes.prefill("a", None)).states
    for row in range(3):
        check_rollout(found[row], agent, row_of(later, row), STEPS, link)
    reused = prefixes.last.positions - prefixes.last.computed
    assert reused == (0 if agent.decoder.config.model_type == "qwen3_5_text" else 11 + 3 + 9)


@torch.no_grad()
def test_a_single_column_with_padding_is_not_fed_to_a_recurrent_model():
    agent = tiny_agent("qwen3_5_text")
    link, prefixes, heads = tiny_link(agent), PrefixReuse(), rows_of((1, 3), 1)
    for round in range(2):
        prompt = spliced(agent, [[heads[0], SLOT, [7] * 9], [heads[1], SLOT, [8] * 2]], seed=round)
        prompt.embeds = torch.where(prompt.mask[..., None] == 1, prompt.embeds, 7.0)
        found = agent.think(prompt, STEPS, link, prefill=prefixes.prefill("a", lambda: heads)).states
        for row in range(2):
            check_rollout(found[row], agent, row_of(prompt, row), STEPS, link)
        assert prefixes.last.computed == prefixes.last.positions


@torch.no_grad()
def test_what_all_rows_begin_with_is_read_once(agent):
    link, prefixes = tiny_link(agent), PrefixReuse()
    system = rows_of((70,), 3)[0]
    recurrent = agent.decoder.config.model_type == "qwen3_5_text"
    for lengths in ((4, 4, 4), (4, 9, 1)):
        prompt = assemble(
            agent.embed, [[system + row] for row in rows_of(lengths, 4)], {}, {}, pad_id=agent.pad_id, device="cpu"
        )
        found = agent.think(prompt, STEPS, link, prefill=prefixes.prefill("a", None)).states
        for row in range(3):
            check_rollout(found[row], agent, row_of(prompt, row), STEPS, link)
        ragged = len(set(lengths)) > 1
        pads = [max(lengths) - length for length in lengths]
        saved = 0 if recurrent and ragged else sum(70 - pad for pad in pads) - 70
        assert prefixes.last.positions - prefixes.last.computed == saved
        assert saved >= LEAST_POSITIONS or recurrent
    few = assemble(agent.embed, [[[*system, 9]]] * 1, {}, {}, pad_id=agent.pad_id, device="cpu")
    agent.think(few, STEPS, link, prefill=prefixes.prefill("a", None))
    assert prefixes.last.positions == prefixes.last.computed == 71


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(agent):
    link = torch.nn.Linear(agent.hidden_size, agent.hidden_size)
    heads = rows_of((9, 3), 1)
    found = []
    for filling in (0.0, 7.0):
        prefixes, states = PrefixReuse(), []
        for round in range(2):
            prompt = spliced(agent, [[head, SLOT] for head in heads], seed=round)
            prompt.embeds = torch.where(prompt.mask[..., None] == 1, prompt.embeds, filling)
            prefill = prefixes.prefill("a", None if round else lambda: heads)
            states.append(agent.think(prompt, 4, link, prefill=prefill).states)
        found.append(states)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
def test_decoding_continues_from_a_prefix(agent):
    heads = rows_of((9, 3, 14), 1)
    prefixes = PrefixReuse()
    for round in range(2):
        prompt = spliced(agent, [[head, SLOT] for head in heads], seed=round)
        prefill = prefixes.prefill("a", None if round else lambda: heads)
        assert agent.decode(prompt, 8, prefill=prefill) == agent.decode(prompt, 8)
    assert prefixes.last.computed == 3 * STEPS


def system_of(family: str) -> RecursiveMAS:
    """Two rounds and more through two agents; the critic's prompt goes on differently in every row after its slot."""
    agents = {
        "planner": tiny_agent(family, "planner", 32, 1),
        "critic": tiny_agent(family, "critic", 40, 2),
        "solver": tiny_agent(family, "solver", 24, 3),
    }
    prompts = {"critic": PromptSpec("notes and plan {{from:planner}} question: {{question}}")}
    return RecursiveMAS.create(agents, SEQUENTIAL, rounds=3, latent_steps=3, prompts=prompts, seed=0)


@pytest.fixture(scope="module", params=SIX)
def mas(request) -> RecursiveMAS:
    return system_of(request.param)


def test_whole_runs_are_the_same_with_and_without(mas):
    plain, reused = (
        mas.answer(QUESTIONS, max_new_tokens=4, trace=True, prefix_reuse=switch) for switch in (False, True)
    )
    for one, other in zip(plain, reused, strict=True):
        assert len(one.handoffs) == len(other.handoffs) == 8
        for before, after in zip(one.handoffs, other.handoffs, strict=True):
            assert relative_error(after.latents, before.latents) < 1e-5
        assert one.tokens == other.tokens
    for reading in plain.reading.values():
        assert (reading.positions, reading.reason) == (reading.computed, "prefix reuse is off")
    assert {stage: reading.positions for stage, reading in reused.reading.items()} == {
        stage: reading.positions for stage, reading in plain.reading.items()
    }
    for stage in ("round 2, planner", "round 3, planner", "round 2, solver", "round 3, solver"):
        assert reused.reading[stage].computed < reused.reading[stage].positions, stage
        assert reused.reading[stage].reason == ""
    assert reused.reading["round 1, planner"].reason == "no earlier prompt is held"


def test_whole_runs_in_text_are_the_same_with_and_without(mas):
    plain, reused = (
        mas.answer(QUESTIONS, mode="text", max_new_tokens=4, trace=True, prefix_reuse=switch)
        for switch in (False, True)
    )
    for one, other in zip(plain, reused, strict=True):
        assert [handoff.text for handoff in one.handoffs] == [handoff.text for handoff in other.handoffs]
        assert one.tokens == other.tokens


def test_runs_leave_nothing_behind(mas):
    """Two runs in a row, other questions of the same length between: each is as if it were the first."""
    first = mas.answer(QUESTIONS, max_new_tokens=2, trace=True)
    mas.answer([question[::-1] for question in QUESTIONS], max_new_tokens=2)
    again = mas.answer(QUESTIONS, max_new_tokens=2, trace=True)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(one.handoffs, other.handoffs, strict=True))
    assert first.reading == again.reading


def test_roles_that_share_a_model_share_what_it_read():
    one = tiny_agent("qwen3", "one")
    pattern = Pattern((("a", "b"), ("c",)))
    prompts = {role: PromptSpec("question: {{question}} plan:") for role in "ab"}
    mas = RecursiveMAS.create(dict.fromkeys("abc", one), pattern, rounds=1, latent_steps=2, prompts=prompts, seed=0)
    reading = mas.answer(QUESTIONS, max_new_tokens=1).reading
    assert reading["round 1, b"].computed == len(QUESTIONS)  # the last position of each row, for its hidden state
    assert reading["round 1, c"].computed < reading["round 1, c"].positions


@torch.no_grad()
def test_snapshots_are_dropped_when_memory_runs_out(monkeypatch):
    agent = tiny_agent("llama")
    link, heads, prefixes = tiny_link(agent), rows_of((9, 5), 1), PrefixReuse()
    prompts = [spliced(agent, [[head, SLOT] for head in heads], seed=round) for round in range(3)]
    agent.think(prompts[0], STEPS, link, prefill=prefixes.prefill("a", lambda: heads))
    monkeypatch.setattr(Snapshot, "resume", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    for prompt in prompts[1:]:
        found = agent.think(prompt, STEPS, link, prefill=prefixes.prefill("a", lambda: heads)).states
        assert torch.equal(found, agent.think(prompt, STEPS, link).states)
        assert not prefixes._held
        assert prefixes.last.reason == "memory ran out, so snapshots were dropped"


def reason(agent, prompt: Prompt) -> str:
    prefixes = PrefixReuse()
    agent.think(prompt, 2, tiny_link(agent), prefill=prefixes.prefill("a", None))
    assert prefixes.last.positions == prefixes.last.computed > 0
    return prefixes.last.reason


def test_what_cannot_be_reused_says_why():
    agent = tiny_agent("llama")
    prompt = assemble(agent.embed, [[[5, 6, 7]]], {}, {}, pad_id=0, device="cpu")
    assert reason(agent, prompt) == "gradients are kept"
    with torch.no_grad():
        assert reason(agent, Prompt(prompt.embeds, prompt.mask)) == "the prompt's tokens are not known"
        assert reason(agent, prompt) == "no earlier prompt is held"
        agent.decoder.config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": 8}
        assert "depends on the length" in reason(agent, prompt)
        broken = Agent(tiny("jamba"), tiny_tokenizer(), name="x")
        assert "jamba model without several positions: " in reason(broken, prompt)


@torch.no_grad()
def test_a_recurrent_state_serves_its_own_cut_alone():
    agent = tiny_agent("qwen3_5_text")
    link, prefixes = tiny_link(agent), PrefixReuse()
    heads = rows_of((9, 5), 1)
    agent.think(
        spliced(agent, [[head, SLOT] for head in heads], 0), STEPS, link, prefill=prefixes.prefill("a", lambda: heads)
    )
    prompt = spliced(agent, [[heads[0], SLOT], [heads[1], SLOT, [7]]], 1)  # its second row ends one later
    found = agent.think(prompt, STEPS, link, prefill=prefixes.prefill("a", None)).states
    assert prefixes.last.reason == "no earlier prompt can be continued"
    for row in range(2):
        check_rollout(found[row], agent, row_of(prompt, row), STEPS, link)


@torch.no_grad()
def test_snapshots_are_copies():
    """What is fed after a snapshot was taken, or on a continuation of it, does not reach it."""
    agent = tiny_agent("gemma3_text")
    prompt = assemble(agent.embed, [[[5, 6, 7, 8]]], {}, {}, pad_id=0, device="cpu")
    past = Continuation(agent.decoder, prompt.mask, 4)
    past.feed(prompt.embeds)
    snapshot = Snapshot.of(past, ModelState(agent.decoder), [[5, 6, 7, 8]], [0])
    kept = [states.clone() for layer in snapshot.layers for states in layer]
    past.feed(prompt.embeds)
    snapshot.resume(prompt.mask, 3, [0], 4, None).feed(prompt.embeds)
    assert all(torch.equal(a, b) for a, b in zip(kept, (s for layer in snapshot.layers for s in layer), strict=True))


@torch.no_grad()
def test_where_a_recurrent_snapshot_can_be_continued():
    agent = tiny_agent("qwen3_5_text")
    prompt = assemble(agent.embed, [[[5, 6, 7]], [[8]]], {}, {}, pad_id=0, device="cpu")
    past = Continuation(agent.decoder, prompt.mask, 4)
    past.feed(prompt.embeds[:, :2])
    snapshot = Snapshot.of(past, ModelState(agent.decoder), [[5, 6], []], [0, 2])
    assert snapshot.cut([[5, 6, 7], [8]], [0, 2], 9) == 2
    assert snapshot.cut([[5, 6, 7], [8]], [3, 5], 9) == 5
    assert snapshot.cut([[5, 6, 7], [8, 9]], [0, 1], 9) == 0  # the second row has a token before the cut
    assert snapshot.cut([[5, 9, 7], [8]], [0, 2], 9) == 0
    assert snapshot.cut([[5, 6, 7], [8]], [0, 2], 1) == 0


def test_common_columns():
    assert common_columns([[1, 2, 3], [4, 5]], [[1, 2, 9], [4, 5, 6]], [0, 1], 9) == 2
    assert common_columns([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]], [0, 1], 2) == 2
    assert common_columns([[1], []], [[1], [2]], [0, 3], 9) == 1
    assert common_columns([[1], [1]], [[1], [2]], [0, 0], 9) == 0
