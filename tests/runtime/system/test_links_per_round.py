"""An outer link of its own for each round: runs, folders, commands, and what the reference layout cannot hold."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from recmas import MIXTURE, SEQUENTIAL, Pattern, RecursiveMAS
from recmas.cli import main
from recmas.config.system_json import Defaults, edge_name, read_spec
from recmas.engine.messages import Latents
from recmas.training.distillation import distill_loss
from recmas.upstream.export import to_pt
from tests.runtime.lean import lean_rows, lean_system
from tests.runtime.system.test_walk import NEW_TOKENS, QUESTIONS, ByHand, make

EVERYBODY = Pattern((("a", "b"), ("c",)), exchange="all")
WEIGHTED = Pattern((("a", "b"), ("c",)), combine="weighted")
ROUNDS = 3


def per_round(mas: RecursiveMAS, equal: bool = False) -> RecursiveMAS:
    """The system with links of its own for each round, copies of the shared ones or all different."""
    links, scores = {}, {}
    for number, (source, target, sent) in enumerate(mas.pattern.links_by_round(ROUNDS)):
        key = (source, target, sent)
        links[key] = copy.deepcopy(mas.outer_links[source, target])
        if not equal:
            torch.manual_seed(number)
            torch.nn.init.normal_(links[key].proj2.weight, std=0.2)
        if mas.edge_scores:
            scores[key] = copy.deepcopy(mas.edge_scores[source, target])
    defaults = Defaults(ROUNDS, mas.defaults.latent_steps)
    return RecursiveMAS(
        mas.agents, mas.inner_links, links, mas.pattern, settings=mas.settings, defaults=defaults, edge_scores=scores
    )


@pytest.mark.parametrize("pattern", [SEQUENTIAL, EVERYBODY, WEIGHTED], ids=["sequential", "all", "weighted"])
def test_copies_of_a_shared_link_are_the_shared_link(pattern):
    if pattern is WEIGHTED:
        agents = make(EVERYBODY).agents
        mas = RecursiveMAS.create(agents, pattern, rounds=ROUNDS, latent_steps=2, seed=1)
        with torch.no_grad():
            mas.edge_scores["a", "c"].fill_(1.0)
    else:
        mas = make(pattern)
    expected = mas.answer(QUESTIONS, rounds=ROUNDS, max_new_tokens=NEW_TOKENS, trace=True)
    found = per_round(mas, equal=True).answer(QUESTIONS, rounds=ROUNDS, max_new_tokens=NEW_TOKENS, trace=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        for a, b in zip(ours.handoffs, theirs.handoffs, strict=True):
            assert torch.equal(a.latents, b.latents)


@pytest.mark.parametrize("pattern", [SEQUENTIAL, MIXTURE, EVERYBODY], ids=["sequential", "mixture", "all"])
def test_messages_and_greedy_texts_equal_a_loop_by_hand(pattern):
    mas = per_round(make(pattern))
    answers = mas.answer(QUESTIONS, max_new_tokens=NEW_TOKENS, trace=True)
    shared = make(pattern).answer(QUESTIONS, rounds=ROUNDS, max_new_tokens=NEW_TOKENS, trace=True)
    assert not torch.allclose(answers[0].handoffs[-1].latents, shared[0].handoffs[-1].latents, rtol=0.01)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        messages: dict = {}
        for visit in pattern.visits(ROUNDS):
            sent = dict(zip(visit.senders, visit.sender_rounds, strict=True))
            links = {(sender, visit.role): mas.outer_links[sender, visit.role, at] for sender, at in sent.items()}
            parts = SimpleNamespace(
                agents=mas.agents, inner_links=mas.inner_links, settings=mas.settings, outer_links=links
            )
            hand, heard = ByHand(parts, question, True), {sender: messages[sender, at] for sender, at in sent.items()}
            if visit.final:
                assert answer.tokens == hand.answer(visit.role, heard)
            else:
                messages[visit.role, visit.round] = hand.say(visit.role, heard)
        for handoff in answer.handoffs:
            said = messages[handoff.source, pattern.sent(handoff.source, handoff.target, handoff.round)]
            assert (handoff.latents - said).abs().max() <= 1e-4 * said.abs().max()


def test_rows_in_different_rounds_share_a_batch():
    mas = per_round(make(SEQUENTIAL))
    member, rows = mas.member("critic"), [{"question": question} for question in QUESTIONS]
    visits = [visit for visit in mas.pattern.visits(ROUNDS) if visit.role == "critic"]
    sent = torch.randn(3, 2, mas.agents["planner"].hidden_size)
    with torch.no_grad():
        together = member.prompt(visits, rows, {"planner": Latents(sent)})
        for row, visit in enumerate(visits):
            alone = member.prompt([visit], rows[row : row + 1], {"planner": Latents(sent[row : row + 1])})
            assert torch.equal(together.embeds[row, together.mask[row] == 1], alone.embeds[0])


def test_a_round_without_a_link_is_named():
    mas = per_round(lean_system())
    with pytest.raises(ValueError, match="rounds=4 needs outer links that the system lacks: critic->solver@4, "):
        mas.answer(["fox"], rounds=4)
    assert len(mas.answer(["fox"], rounds=2, max_new_tokens=1)) == 1
    del mas.outer_links["planner", "critic", 2]
    with pytest.raises(ValueError, match="rounds=2 needs outer links that the system lacks: planner->critic@2"):
        mas.answer(["fox"], rounds=2)
    mas.outer_links["planner", "critic"] = mas.outer_links["planner", "critic", 1]  # for the rounds without their own
    assert len(mas.answer(["fox"], rounds=2, max_new_tokens=1)) == 1


def test_a_folder_holds_them_and_another_save_removes_them(tmp_path):
    mas = per_round(lean_system())
    mas.save_pretrained(tmp_path / "s")
    assert (tmp_path / "s" / "links" / "solver-planner@2").is_dir()
    loaded = RecursiveMAS.from_pretrained(tmp_path / "s")
    assert set(loaded.outer_links) == set(mas.pattern.links_by_round(ROUNDS))
    for key, link in mas.outer_links.items():
        assert torch.equal(loaded.outer_links[key].proj2.weight, link.proj2.weight)
    assert [a.tokens for a in loaded.answer(QUESTIONS)] == [a.tokens for a in mas.answer(QUESTIONS)]
    loaded.save_pretrained(tmp_path / "s")
    assert len(list((tmp_path / "s" / "links").glob("*@*"))) == len(mas.outer_links)
    (tmp_path / "s" / "links" / "planner-critic@9.2").mkdir()  # as a save that was killed leaves it
    lean_system().save_pretrained(tmp_path / "s")
    assert not list((tmp_path / "s" / "links").glob("*@*"))
    assert set(RecursiveMAS.from_pretrained(tmp_path / "s").outer_links) == set(lean_system().outer_links)


def test_the_reference_layout_holds_no_links_of_rounds(tmp_path):
    per_round(lean_system()).save_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match=r"outer link \S+@1 is that of one round; in the reference implementation"):
        to_pt(tmp_path / "s", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands_make_train_and_show_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lean_system().save_pretrained(tmp_path / "lean")
    model = next((tmp_path / "lean" / "agents").iterdir())
    models = ",".join(f"{role}={model}" for role in SEQUENTIAL.roles)
    new = ["init", "system", "--models", models, "--rounds", "2", "--latent-steps", "2", "--links-per-round"]
    assert main(new) == 0
    keys = SEQUENTIAL.links_by_round(2)
    assert set(read_spec("system").outer_links) == set(keys)
    rows = "".join(json.dumps(row) + "\n" for row in lean_rows(4))
    (tmp_path / "rows.jsonl").write_text(rows)
    quick = ["--data", "rows.jsonl", "--steps", "2", "--batch-size", "2", "--rounds", "2"]
    before = RecursiveMAS.from_pretrained("system").outer_links
    only = ["--edges", "planner->critic@2,solver->planner@1"]
    assert main(["train", "warmup", "system", *quick, *only]) == 0
    after = RecursiveMAS.from_pretrained("system").outer_links
    changed = {key for key in keys if not torch.equal(after[key].proj1.weight, before[key].proj1.weight)}
    assert changed == {("planner", "critic", 2), ("solver", "planner", 1)}
    assert main(["train", "outer", "system", *quick]) == 0
    log = (tmp_path / "system" / "training" / "outer" / "log.jsonl").read_text().splitlines()
    assert set(json.loads(log[-1])["grad_norms"]) == {edge_name(key) for key in keys}
    capsys.readouterr()
    assert main(["inspect", "system", "--question", "fox"]) == 0
    out = capsys.readouterr().out
    assert "link planner->critic@2: 16 > 32 > 16" in out
    assert "round 2, solver to planner" in out
    assert main(["train", "outer", "system", *quick, "--resume", "--edges", "planner->critic"]) == 2
    assert "edges: planner->critic is not used by 2 rounds, only " in capsys.readouterr().err
    assert main(["train", "outer", "system", *quick, "--edges", "planner>critic"]) == 2
    assert "'planner>critic' is not of the form source->target or source->target@round" in capsys.readouterr().err


def test_distillation_aims_through_the_link_of_the_round():
    mas = per_round(lean_system())
    visit = next(v for v in mas.pattern.visits(ROUNDS) if v.role == "solver" and v.round == 2)
    width = mas.agents["solver"].hidden_size
    expert, learner = Latents(torch.randn(1, 2, width)), Latents(torch.randn(1, 2, width))
    target = mas.outer_links["critic", "solver", 2](expert.states).detach()
    expected = (1 - torch.cosine_similarity(learner.states, target, dim=-1)).sum().item()
    assert distill_loss(mas, visit, expert, learner).item() == pytest.approx(expected, abs=1e-4)
