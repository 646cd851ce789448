"""What every prompt of a template begins with is read once in a run; numbers are those of prompts read in one piece."""

from __future__ import annotations

import pytest
import torch

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.agents.agent import Agent
from recmas.answering.answers import Answer
from recmas.config.system_json import PromptSpec
from recmas.engine.cache_snapshot import Snapshot
from recmas.engine.constant_prefixes import LEAST_POSITIONS, ConstantPrefixes
from recmas.engine.messages import Prompt
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.scheduling.dispatcher import Dispatcher
from recmas.scheduling.executor import LocalExecutor
from recmas.system.prompt_assembly import assemble
from tests.runtime.engine.plain_rollout import check_rollout, relative_error
from tests.runtime.scheduling.rows import send
from tests.runtime.tiny import CHAT, VOCABULARY, tiny_agent, tiny_link

HEAD = torch.randint(10, VOCABULARY, (70,), generator=torch.Generator().manual_seed(3)).tolist()
SAID = "question: what is the answer to everything? notes and plan and critique and solution " * 4
PROMPTS = {
    "planner": PromptSpec(SAID + "{{question}} plan", SAID + "{{question}} notes {{from:solver}} plan"),
    "critic": PromptSpec(SAID + "plan {{from:planner}} {{question}}"),
}
QUESTIONS = ["fox", "the lazy dog jumps", "0 + 1 =", "= 1 + 0", "brown"]
OPTIONS = {"max_new_tokens": 3, "trace": True, "batch_size": 1}


def prompts_of(agent: Agent, *tails: list[int]) -> Prompt:
    return assemble(agent.embed, [[HEAD + tail] for tail in tails], {}, {}, pad_id=agent.pad_id, device="cpu")


@torch.no_grad()
def test_batches_of_any_shape_go_on_from_it(agent):
    link, constants = tiny_link(agent), ConstantPrefixes()
    recurrent = agent.decoder.config.model_type == "qwen3_5_text"
    cases = [([7, 8],), ([9],), ([5, 6], [4, 4]), ([5], [6, 7, 8])]
    for number, tails in enumerate(cases):
        prompt, reuse = prompts_of(agent, *tails), PrefixReuse(constants=constants)
        found = agent.think(prompt, 3, link, prefill=reuse.prefill("a", None, HEAD)).states
        for row in range(len(tails)):
            check_rollout(found[row], agent, prompt.embeds[row : row + 1, prompt.mask[row] == 1], 3, link)
        ragged = len({*map(len, tails)}) > 1
        saved = 0 if number == 0 or (recurrent and ragged) else sum(min(70, 70 + len(t) - 1) for t in tails)
        saved -= 2 if ragged and saved else 0  # what stands under the other row's padding is read again
        assert reuse.last.positions - reuse.last.computed == saved
    assert len(constants) == 1


@torch.no_grad()
def test_a_row_whose_own_text_changes_its_last_token_reuses_what_is_left():
    agent, constants = tiny_agent("llama"), ConstantPrefixes()
    link = tiny_link(agent)
    other = assemble(agent.embed, [[[*HEAD[:-1], 5, 6]]], {}, {}, pad_id=agent.pad_id, device="cpu")
    for prompt, computed in ((other, 71), (prompts_of(agent, [7]), 71), (other, 2)):
        reuse = PrefixReuse(constants=constants)
        found = agent.think(prompt, 3, link, prefill=reuse.prefill("a", None, HEAD)).states
        check_rollout(found[0], agent, prompt.embeds, 3, link)
        assert reuse.last.computed == computed


@torch.no_grad()
def test_a_template_keeps_the_latest_two():
    agent, constants = tiny_agent("llama"), ConstantPrefixes()
    link = tiny_link(agent)

    def computed(length):
        prompt = assemble(agent.embed, [[[*HEAD[:length], 5, 6]]], {}, {}, pad_id=agent.pad_id, device="cpu")
        reuse = PrefixReuse(constants=constants)
        agent.think(prompt, 1, link, prefill=reuse.prefill("a", None, HEAD))
        return reuse.last.computed

    assert [computed(length) for length in (66, 67, 68, 67, 66, 67)] == [68, 69, 70, 2, 68, 2]
    assert len(constants) == 2
    assert constants.have(agent.decoder, HEAD)
    assert not constants.have(agent.decoder, HEAD[:-1])
    assert not constants.have(tiny_agent("llama").decoder, HEAD)


@torch.no_grad()
def test_what_all_rows_share_beyond_it_is_read_on_from_there():
    agent, constants = tiny_agent("llama"), ConstantPrefixes()
    link, document = tiny_link(agent), HEAD[::-1]
    for computed in (70 + 70 + 3, 70 + 3):
        prompt, reuse = prompts_of(agent, [*document, 4], [*document, 5], [*document, 6]), PrefixReuse(True, constants)
        found = agent.think(prompt, 3, link, prefill=reuse.prefill("a", None, HEAD)).states
        for row in range(3):
            check_rollout(found[row], agent, prompt.embeds[row : row + 1], 3, link)
        assert reuse.last.computed == computed


@torch.no_grad()
def test_another_agents_are_not_read():
    constants = ConstantPrefixes()
    for agent in (tiny_agent("llama", seed=seed) for seed in (1, 2)):
        link, prompt, reuse = tiny_link(agent), prompts_of(agent, [7]), PrefixReuse(constants=constants)
        found = agent.think(prompt, 3, link, prefill=reuse.prefill("a", None, HEAD)).states
        check_rollout(found[0], agent, prompt.embeds, 3, link)
    assert len(constants) == 2


@torch.no_grad()
def test_short_ones_are_not_kept():
    agent, constants = tiny_agent("llama"), ConstantPrefixes()
    reuse = PrefixReuse(constants=constants)
    short = HEAD[: LEAST_POSITIONS - 1]
    agent.think(prompts_of(agent, [7]), 2, tiny_link(agent), prefill=reuse.prefill("a", None, short))
    assert not constants
    assert reuse.last.computed == 71


@torch.no_grad()
def test_they_are_dropped_when_memory_runs_out(monkeypatch):
    agent, constants = tiny_agent("llama"), ConstantPrefixes()
    link, reuse, prompt = tiny_link(agent), PrefixReuse(constants=constants), prompts_of(agent, [7])
    monkeypatch.setattr(Snapshot, "resume", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    found = agent.think(prompt, 3, link, prefill=reuse.prefill("a", None, HEAD)).states
    assert torch.equal(found, agent.think(prompt, 3, link).states)
    assert not constants
    assert reuse.last.reason == "memory ran out, so snapshots were dropped"


@pytest.fixture(scope="module")
def mas() -> RecursiveMAS:
    agents = {role: tiny_agent("qwen3", role, 32, seed) for seed, role in enumerate(("planner", "critic", "solver"))}
    return RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=3, prompts=PROMPTS, seed=0)


def test_a_run_of_several_batches_reads_them_once(mas):
    plain, reused = (mas.answer(QUESTIONS, prefix_reuse=switch, **OPTIONS) for switch in (False, True))
    for one, other in zip(plain, reused, strict=True):
        for before, after in zip(one.handoffs, other.handoffs, strict=True):
            assert relative_error(after.latents, before.latents) < 1e-5
        assert one.tokens == other.tokens
    for stage, template in (
        ("round 1, planner", PROMPTS["planner"].first),
        ("round 1, critic", PROMPTS["critic"].first),
    ):
        role = stage.split()[-1]
        said = mas.agents[role].tokenizer(template.split("{{")[0], add_special_tokens=False)["input_ids"]
        reading = reused.reading[stage]
        assert len(said) > LEAST_POSITIONS
        assert reading.positions - reading.computed >= (len(QUESTIONS) - 1) * (len(said) - 2)
    alone = mas.answer(QUESTIONS[:1], **OPTIONS).reading["round 1, planner"]
    assert alone.computed == alone.positions


def test_the_bits_of_an_answer_do_not_depend_on_the_questions_before(mas):
    one, other = (mas.answer(rows, **OPTIONS) for rows in (QUESTIONS, [*QUESTIONS[2::-1], *QUESTIONS[3:]]))
    for answer, same in zip(one[3:], other[3:], strict=True):
        for a, b in zip(answer.handoffs, same.handoffs, strict=True):
            assert torch.equal(a.latents, b.latents)


def test_nothing_is_kept_from_one_run_to_the_next(mas):
    weight = mas.agents["planner"].model.get_input_embeddings().weight
    kept = weight.clone()
    before = mas.answer(QUESTIONS, **OPTIONS)
    try:
        weight.data.mul_(1.5)  # a write that bumps no version
        changed = mas.answer(QUESTIONS, **OPTIONS)
        plain = mas.answer(QUESTIONS, prefix_reuse=False, **OPTIONS)
    finally:
        weight.data.copy_(kept)
    for old, new, right in zip(before, changed, plain, strict=True):
        assert relative_error(new.handoffs[0].latents, right.handoffs[0].latents) < 1e-5
        assert relative_error(new.handoffs[0].latents, old.handoffs[0].latents) > 1e-2


def test_a_weight_that_a_callback_writes_is_heeded(mas):
    weight = mas.agents["planner"].model.get_input_embeddings().weight
    kept, found = weight.clone(), []

    def train(numbers: list[int], answers: list[Answer]) -> None:
        if numbers == [0]:
            with torch.no_grad():
                weight.mul_(1.5)

    for switch in (False, True):
        try:
            found.append(mas.answer(QUESTIONS, prefix_reuse=switch, on_answers=train, **OPTIONS))
        finally:
            weight.data.copy_(kept)
    for one, other in zip(*found, strict=True):
        assert relative_error(other.handoffs[0].latents, one.handoffs[0].latents) < 1e-5


def test_a_server_reads_them_once(mas, monkeypatch):
    read, of = [], ConstantPrefixes.of

    def counted(self, *arguments):
        snapshot, positions = of(self, *arguments)
        read.append(positions)
        return snapshot, positions

    monkeypatch.setattr(ConstantPrefixes, "of", counted)
    executor = LocalExecutor(mas)
    dispatcher = Dispatcher(executor)
    try:
        found = []
        for question in QUESTIONS[:3]:
            (sink,) = send(dispatcher, mas, [question], max_new_tokens=3)
            found.append(sink.end().text)
        kept = [worker._constants for worker in executor._workers.values()]
        assert [len(constants) for constants in kept] == [1, 1, 0]
        assert [positions > 0 for positions in read].count(True) == 2  # the planner's and the critic's first question
        assert len(read) > 2
    finally:
        dispatcher.close()
    assert found == [answer.text for answer in mas.answer(QUESTIONS[:3], max_new_tokens=3)]


def test_constant_ids_hold_for_any_row(mas):
    prompts = mas._prompts["planner"]
    for round in (1, 2):
        ids = prompts.constant_ids(round)
        assert len(ids) > LEAST_POSITIONS
        for question in (*QUESTIONS, "\n", " ", "?!", "é"):
            (found,) = prompts.prefix_ids([round], [{"question": question}])
            assert found[: len(ids)] == ids


def test_constant_ids_of_a_chat_hold_its_system_text():
    agent = tiny_agent("qwen3")
    agent.tokenizer.chat_template = CHAT
    pattern_prompts = {"solver": PromptSpec("what is {{question}} {{from:critic}}")}
    agents = dict.fromkeys(("planner", "critic", "solver"), agent)
    mas = RecursiveMAS.create(agents, SEQUENTIAL, rounds=1, prompts=pattern_prompts, seed=0)
    assert mas.settings["solver"].chat
    (found,) = mas._prompts["solver"].prefix_ids([1], [{"question": "fox"}])
    ids = mas._prompts["solver"].constant_ids(1)
    assert 0 < len(ids) < len(found)
    assert found[: len(ids)] == ids
