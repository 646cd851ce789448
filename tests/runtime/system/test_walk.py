"""Whole systems against loops written by hand: the four patterns, latent and text, no cache, padding or Pattern."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from recmas import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL, Pattern, RecursiveMAS
from recmas.cli import main
from recmas.config.system_json import PromptSpec
from tests.runtime.tiny import tiny_agent

FAMILIES = ["qwen3", "llama", "qwen2", "gemma3_text"]
WIDTHS = [32, 40, 24, 48]
STEPS = {0: 3, 1: 2, 2: 4, 3: 1}  # latent steps, by position of the role
QUESTIONS = ["what is the answer?", "fox", "the quick brown fox jumps over the lazy dog and more"]
NEW_TOKENS = 6

Heard = dict[str, object]
Speak = Callable[[str, str, Heard], object]


def prompt_of(pattern: Pattern, role: str) -> PromptSpec:
    """A short template; every sender has a slot, at another place for each role."""

    def text(round: int) -> str:
        slots = "".join(f" {sender}: {{{{from:{sender}}}}}," for sender in pattern.senders(role, round))
        return f"{slots} {role}, {{{{question}}}}:" if len(role) % 2 else f"{role}, {{{{question}}}},{slots} so:"

    return PromptSpec(text(1) if pattern.stage_of(role) == 0 else None, text(2))


def make(pattern: Pattern) -> RecursiveMAS:
    agents = {
        role: tiny_agent(FAMILIES[index], role, WIDTHS[index], seed=index, chat_template=None)
        for index, role in enumerate(pattern.roles)
    }
    prompts = {role: prompt_of(pattern, role) for role in pattern.roles}
    mas = RecursiveMAS.create(agents, pattern, prompts=prompts, seed=5)
    for index, role in enumerate(pattern.roles):
        mas.settings[role].latent_steps = STEPS[index]
    return mas


def words(role: str, question: str, senders: list[str]) -> str:
    """The prompt as a Python format string, a place per sender."""
    slots = "".join(f" {sender}: <{sender}>," for sender in senders)
    return f"{slots} {role}, {question}:" if len(role) % 2 else f"{role}, {question},{slots} so:"


class ByHand:
    """Plain pieces for one question: uncached rollout, concatenated embeddings, transformers' generate."""

    def __init__(self, mas: RecursiveMAS, question: str, latent: bool) -> None:
        self.mas, self.question, self.latent = mas, question, latent

    def embeds(self, role: str, heard: Heard) -> torch.Tensor:
        agent = self.mas.agents[role]
        pieces, rest = [], words(role, self.question, list(heard))
        if not self.latent:
            for sender, text in heard.items():
                rest = rest.replace(f"<{sender}>", text)
            return agent.embed(agent.tokenizer(rest, add_special_tokens=False, return_tensors="pt")["input_ids"])
        for sender, latents in heard.items():
            before, rest = rest.split(f"<{sender}>")
            pieces += [agent.embed(agent.tokenizer(before, add_special_tokens=False, return_tensors="pt")["input_ids"])]
            pieces += [self.mas.outer_links[sender, role](latents)[None]]
        pieces.append(agent.embed(agent.tokenizer(rest, add_special_tokens=False, return_tensors="pt")["input_ids"]))
        return torch.cat(pieces, dim=1)

    def say(self, role: str, heard: Heard) -> object:
        """A message: latents ``[m, d]`` or text."""
        agent, embeds = self.mas.agents[role], self.embeds(role, heard)
        if not self.latent:
            return agent.tokenizer.decode(self.answer(role, heard), skip_special_tokens=True)
        states = []
        for _ in range(self.mas.settings[role].latent_steps):
            hidden = agent.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
            states.append(self.mas.inner_links[role](hidden))
            embeds = torch.cat([embeds, states[-1][:, None]], dim=1)
        return torch.cat(states)

    def answer(self, role: str, heard: Heard) -> list[int]:
        model = self.mas.agents[role].model
        embeds = self.embeds(role, heard)
        return model.generate(inputs_embeds=embeds, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()


def sequential(hand: ByHand, rounds: int) -> list[int]:
    back: Heard = {}
    for _ in range(rounds - 1):
        plan = hand.say("planner", back)
        critique = hand.say("critic", {"planner": plan})
        back = {"solver": hand.say("solver", {"critic": critique})}
    plan = hand.say("planner", back)
    critique = hand.say("critic", {"planner": plan})
    return hand.answer("solver", {"critic": critique})


def mixture(hand: ByHand, rounds: int) -> list[int]:
    back: Heard = {}
    for round in range(rounds):
        notes = {role: hand.say(role, back) for role in ("math", "code", "science")}
        if round + 1 < rounds:
            back = {"summarizer": hand.say("summarizer", notes)}
    return hand.answer("summarizer", notes)


def two(first: str, last: str) -> Callable[[ByHand, int], list[int]]:
    def run(hand: ByHand, rounds: int) -> list[int]:
        message = hand.say(first, {})
        for _ in range(rounds - 1):
            message = hand.say(first, {last: hand.say(last, {first: message})})
        return hand.answer(last, {first: message})

    return run


LOOPS = {
    "sequential": (SEQUENTIAL, sequential),
    "mixture": (MIXTURE, mixture),
    "distillation": (DISTILLATION, two("expert", "learner")),
    "deliberation": (DELIBERATION, two("reflector", "toolcaller")),
}


@pytest.mark.parametrize("mode", ["latent", "text"])
@pytest.mark.parametrize("name", LOOPS)
@torch.no_grad()
def test_pattern_equals_the_loop_written_by_hand(name, mode):
    pattern, loop = LOOPS[name]
    mas = make(pattern)
    for rounds in (1, 3):
        answers = mas.answer(QUESTIONS, mode=mode, rounds=rounds, max_new_tokens=NEW_TOKENS, batch_size=2)
        for question, answer in zip(QUESTIONS, answers, strict=True):
            expected = loop(ByHand(mas, question, mode == "latent"), rounds)
            assert answer.tokens == expected
            assert answer.text == mas.agents[pattern.last].tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("name", LOOPS)
@torch.no_grad()
def test_pattern_on_the_command_line_equals_the_loop_written_by_hand(name, tmp_path, monkeypatch, capsys):
    pattern, loop = LOOPS[name]
    mas = make(pattern)
    mas.save_pretrained(tmp_path / "system")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in QUESTIONS))
    monkeypatch.chdir(tmp_path)
    options = ["--rounds", "3", "--max-new-tokens", str(NEW_TOKENS), "--batch-size", "2", "--json"]
    assert main(["run", "system", "--questions", "rows.jsonl", *options]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["tokens"] for answer in answers] == [loop(ByHand(mas, text, True), 3) for text in QUESTIONS]


@torch.no_grad()
def test_handoffs_equal_the_loop_written_by_hand():
    mas = make(SEQUENTIAL)
    answers = mas.answer(QUESTIONS, rounds=2, max_new_tokens=1, trace=True)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        hand = ByHand(mas, question, latent=True)
        plan = hand.say("planner", {})
        critique = hand.say("critic", {"planner": plan})
        back = hand.say("solver", {"critic": critique})
        again = hand.say("planner", {"solver": back})
        expected = [plan, critique, back, again, hand.say("critic", {"planner": again})]
        edges = [(1, "planner", "critic"), (1, "critic", "solver"), (2, "solver", "planner")]
        edges += [(2, "planner", "critic"), (2, "critic", "solver")]
        assert [(handoff.round, handoff.source, handoff.target) for handoff in answer.handoffs] == edges
        for handoff, latents in zip(answer.handoffs, expected, strict=True):
            assert (handoff.latents - latents).abs().max() <= 1e-5 * latents.abs().max()


@pytest.mark.parametrize("combine", ["mean", "weighted"])
@torch.no_grad()
def test_senders_that_meet_in_one_slot(combine):
    """The receiver's prompt holds the weighted sum of what the links write."""
    pattern = Pattern((("a", "b"), ("c",)), combine=combine)
    agents = {role: tiny_agent(FAMILIES[i], role, WIDTHS[i], i, None) for i, role in enumerate(pattern.roles)}
    mas = RecursiveMAS.create(agents, pattern, rounds=1, latent_steps=2, seed=1)
    assert "{{from:a,b}}" in mas.settings["c"].prompt.later
    share = [0.5, 0.5]
    if combine == "weighted":
        mas.edge_scores["a", "c"].fill_(1.0)
        share = torch.tensor([1.0, 0.0]).softmax(0).tolist()
    seen = []
    for turn in mas.walk([{"question": "fox"}], 1):
        seen.append(turn.prompt)
        role = turn.visit.role
        turn.message = [] if turn.visit.final else mas.agents[role].think(turn.prompt, 2, mas.inner_links[role])
    messages = {role: mas.agents[role].think(seen[i], 2, mas.inner_links[role]) for i, role in enumerate("ab")}
    written = [mas.outer_links[role, "c"](messages[role].states[0]) for role in "ab"]
    expected = share[0] * written[0] + share[1] * written[1]
    start = len(
        mas.agents["c"].tokenizer("Question: fox\nNotes of the a and the b: ", add_special_tokens=False)["input_ids"]
    )
    torch.testing.assert_close(seen[2].embeds[0, start : start + 2], expected, rtol=1e-5, atol=1e-6)


def test_a_turn_without_a_message_is_an_error():
    mas = make(SEQUENTIAL)
    with pytest.raises(RuntimeError, match="the turn of 'planner' in round 1 ended without a message"):
        list(mas.walk([{"question": "fox"}], 1))


@torch.no_grad()
def test_exchange_all_reads_every_other_agents_last_round():
    pattern = Pattern((("planner",), ("critic",), ("solver",)), exchange="all")
    agents = {role: tiny_agent(FAMILIES[i], role, WIDTHS[i], i, None) for i, role in enumerate(pattern.roles)}
    prompts = {
        role: PromptSpec(
            *(
                f"{role}, {{{{question}}}}:" + "".join(f" {{{{from:{s}}}}}" for s in pattern.senders(role, round))
                for round in (1, 2)
            )
        )
        for role in pattern.roles
    }
    mas = RecursiveMAS.create(agents, pattern, prompts=prompts, rounds=2, latent_steps=2, seed=5)
    answer = mas.answer(["fox"], max_new_tokens=1, trace=True)[0]
    latents = {(handoff.source, handoff.target, handoff.round): handoff.latents for handoff in answer.handoffs}
    assert set(latents) == {
        ("planner", "critic", 1),
        ("critic", "solver", 1),
        ("solver", "planner", 2),
        ("critic", "planner", 2),
        ("planner", "critic", 2),
        ("solver", "critic", 2),
        ("critic", "solver", 2),
        ("planner", "solver", 2),
    }
    assert torch.equal(latents["planner", "solver", 2], latents["planner", "critic", 1])
    assert not torch.equal(latents["planner", "critic", 2], latents["planner", "critic", 1])
