"""Outer gradients of the four patterns equal a plain unrolled implementation's: row by row, no cache, no padding."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

from recmas.config.pattern import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL
from recmas.config.system_json import PromptSpec, edge_name
from recmas.training import OuterConfig, recursion, train_outer
from recmas.training.config import weighed_rounds
from recmas.training.recursion import outer_loss, outer_losses
from tests.runtime.training.by_hand import PROMPTS, ROUNDING, ROWS, build, embeds, ids, link, states

EQUAL = {torch.float32: 1e-4, torch.float64: ROUNDING}  # of the largest entry of a link's gradient
EXPERT = PromptSpec("<bos> {{question}} <out>", "<bos> {{question}} <in> {{from:summarizer}} <out>")
PATTERNS = {
    "sequential": (SEQUENTIAL, PROMPTS),
    "mixture": (
        MIXTURE,
        {
            "math": EXPERT,
            "code": PromptSpec("{{question}} <out>", "{{from:summarizer}} 1 {{question}} <out>"),
            "science": EXPERT,
            "summarizer": PromptSpec("<bos> {{from:math}} 1 {{from:code}} {{from:science}} <in> {{question}} <out>"),
        },
    ),
    "distillation": (
        DISTILLATION,
        {
            "expert": PromptSpec("<bos> {{sheet}} <out>", "<bos> {{sheet}} <in> {{from:learner}} <out>"),
            "learner": PromptSpec("{{from:expert}} <in> {{question}} <out>"),
        },
    ),
    "deliberation": (
        DELIBERATION,
        {
            "reflector": PromptSpec("<bos> {{question}} <out>", "{{from:toolcaller}} <in> {{question}} <out>"),
            "toolcaller": PromptSpec("<bos> {{sheet}} <in> {{from:reflector}} {{question}} <out>"),
        },
    ),
}
STEPS = 3


def rows(pattern):
    """Texts longer and shorter than the latent steps, other ones in every round."""
    said = ["1 red blue dog", "2", "cat 0", "3 bako 1", "", "dog", "0 cat"]
    return [
        {**row, "targets": {role: said[number + place :][:3] for place, role in enumerate(pattern.roles)}}
        for number, row in enumerate(ROWS)
    ]


def plain_loss(system, prompts, batch, rounds, latents, outer=None, sent=None):
    """`outer`: the links by (source, target, round), None takes the system's; `sent` gets each row's messages."""
    total, count = 0.0, 0
    for row in batch:
        messages = {}
        if sent is not None:
            sent.append(messages)
        for visit in system.pattern.visits(rounds):
            role, agent = visit.role, system.agents[visit.role]
            pieces, text = [], ""
            for part in re.split(r"(\{\{.*?\}\})", prompts[role].at(visit.round)):
                if part.startswith("{{from:"):
                    sender = part[len("{{from:") : -2]
                    at = visit.sender_rounds[visit.senders.index(sender)]
                    through = outer[sender, role, at] if outer else system.outer_links[sender, role]
                    mapped = link(through, messages[sender, at], "outer")
                    pieces += [embeds(system, role, text), mapped]
                    text = ""
                else:
                    text += str(row[part[2:-2]]) if part.startswith("{{") else part
            prompt = torch.cat([*pieces, embeds(system, role, text)])
            said = [*ids(system, role, row["targets"][role][visit.round - 1]), agent.tokenizer.eos_token_id]
            table = agent.model.get_input_embeddings().weight
            if visit.final:
                hidden = states(system, role, torch.cat([prompt, table[said[:-1]]]))[len(prompt) - 1 :]
                logits = agent.model.get_output_embeddings()(hidden)
                total = total - logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum()
                count += len(said)
            elif latents == "forced":
                said = said[:STEPS]
                hidden = states(system, role, torch.cat([prompt, table[said[:-1]]]))[len(prompt) - 1 :]
                messages[role, visit.round] = link(system.inner_links[role], hidden, "inner")
            else:
                thought = []
                for _ in range(STEPS):
                    thought.append(link(system.inner_links[role], states(system, role, prompt)[-1], "inner"))
                    prompt = torch.cat([prompt, thought[-1][None]])
                messages[role, visit.round] = torch.stack(thought)
    return total / count


def gradients(system, parts):
    for outer in system.outer_links.values():
        outer.zero_grad()
    loss = 0.0
    for part in parts:
        part.backward()
        loss += part.item()
    return loss, {
        edge: torch.cat([p.grad.flatten() for p in outer.parameters()]) for edge, outer in system.outer_links.items()
    }


def built(pattern, prompts, dtype):
    system = build(pattern, prompts, dtype=dtype)
    for inner in system.inner_links.values():
        inner.requires_grad_(False)
    return system


def test_a_step_of_fewer_rounds_takes_the_last_weights():
    assert weighed_rounds((0.1, 0.3, 1.0), 2) == {1: 0.3, 2: 1.0}
    assert weighed_rounds(None, 2) == {2: 1.0}


@pytest.mark.parametrize("latents", ["forced", "rollout"])
@pytest.mark.parametrize("name", PATTERNS)
def test_weighed_rounds_are_the_sum_of_runs_of_so_many_rounds(name, latents):
    pattern, prompts = PATTERNS[name]
    system, batch, weights = built(pattern, prompts, torch.float64), rows(pattern), (0.25, 2.0, 1.0)
    plain = [plain_loss(system, prompts, batch, rounds, latents) for rounds in (1, 2, 3)]
    loss, expected = gradients(system, [sum(w * part for w, part in zip(weights, plain, strict=True))])
    for micro_batch, recompute in ((1, True), (None, False)):
        options = {"latents": latents, "recompute": recompute, "micro_batch": micro_batch}
        parts = outer_losses(system, batch, 3, latent_steps=STEPS, round_weights=weights, **options)
        found, actual = gradients(system, parts)
        assert found == pytest.approx(loss, rel=1e-5)
        for edge, gradient in expected.items():
            assert (actual[edge] - gradient).abs().max() <= ROUNDING * gradient.abs().max(), (edge, micro_batch)


@pytest.mark.parametrize("latents", ["forced", "rollout"])
@pytest.mark.parametrize("name", PATTERNS)
def test_each_round_may_have_links_of_its_own(name, latents):
    pattern, prompts = PATTERNS[name]
    system, batch = built(pattern, prompts, torch.float64), rows(pattern)
    shared = dict(system.outer_links)
    system.outer_links.clear()
    for source, target, sent in pattern.links_by_round(3):
        torch.manual_seed(sent)
        own = copy.deepcopy(shared[source, target])
        for parameter in own.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        system.outer_links[source, target, sent] = own
    loss, expected = gradients(system, [plain_loss(system, prompts, batch, 3, latents, system.outer_links)])
    parts = outer_losses(system, batch, 3, latent_steps=STEPS, latents=latents, recompute=True)
    found, actual = gradients(system, parts)
    assert found == pytest.approx(loss, rel=1e-5)
    assert set(expected) == set(pattern.links_by_round(3))
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert (actual[key] - gradient).abs().max() <= ROUNDING * gradient.abs().max(), key


@pytest.mark.parametrize("latents", ["forced", "rollout"])
@pytest.mark.parametrize(("name", "expert"), [("distillation", "expert"), ("sequential", "critic")])
def test_distillation_is_the_distance_of_latents_in_the_learners_space(name, expert, latents):
    pattern, prompts = PATTERNS[name]
    system, batch, sent = built(pattern, prompts, torch.float64), rows(pattern), []
    learner = pattern.last
    loss = plain_loss(system, prompts, batch, 3, latents, sent=sent)
    terms = []
    for messages in sent:
        for round in (1, 2):
            target = link(system.outer_links[expert, learner], messages[expert, round], "outer").detach()
            own = messages[learner, round]
            terms += [1 - torch.cosine_similarity(a, b, dim=0) for a, b in zip(own, target, strict=False)]
    assert len(terms) < 2 * 2 * STEPS or latents == "rollout"  # some messages are shorter
    loss, expected = gradients(system, [loss + 0.7 * sum(terms) / len(terms)])
    for micro_batch in (1, None):
        parts = outer_losses(
            system, batch, 3, latent_steps=STEPS, latents=latents, micro_batch=micro_batch, recompute=True, distill=0.7
        )
        found, actual = gradients(system, parts)
        assert found == pytest.approx(loss, rel=1e-5)
        for edge, gradient in expected.items():
            assert (actual[edge] - gradient).abs().max() <= ROUNDING * gradient.abs().max(), (edge, micro_batch)
    one = [outer_loss(system, batch, 1, latent_steps=STEPS, latents=latents, distill=w).item() for w in (0.0, 0.7)]
    assert one[0] == one[1]


def test_what_cannot_be_distilled_is_refused_before_any_step():
    pattern, prompts = PATTERNS["mixture"]
    with pytest.raises(ValueError, match="distill: needs one expert, but 'summarizer' reads 'math', 'code', 'science'"):
        train_outer(build(pattern, prompts), rows(pattern), OuterConfig(distill=1.0), progress=False)
    pattern, prompts = PATTERNS["distillation"]
    config = OuterConfig(distill=1.0, latent_steps={"expert": 2, "learner": 0})
    with pytest.raises(ValueError, match="distill: 'learner' has 0 latent steps"):
        train_outer(build(pattern, prompts), rows(pattern), config, progress=False)
    for weight, rounds in ((-1.0, 2), (float("inf"), 2), (1.0, 1)):
        with pytest.raises(ValueError, match="distill"):
            OuterConfig(distill=weight, rounds=rounds)


@pytest.mark.parametrize("name", PATTERNS)
def test_norms_by_link_and_round_are_those_of_the_plain_gradients(name):
    """Of two batches, which are the same two rows; and learning goes on as without them."""
    pattern, prompts = PATTERNS[name]
    system, weights = built(pattern, prompts, torch.float64), (0.5, 0.0, 1.0)
    batch = rows(pattern)
    for row in batch:
        row["targets"] = {role: [text or "1" for text in texts] for role, texts in row["targets"].items()}
    shared = dict(system.outer_links)
    apart = {key: copy.deepcopy(shared[key[:2]]) for key in pattern.links_by_round(3)}
    plain = [plain_loss(system, prompts, batch, rounds, "forced", apart) for rounds in (1, 2, 3)]
    sum(w * part for w, part in zip(weights, plain, strict=True)).backward()
    config = OuterConfig(
        steps=2, batch_size=2, accumulation=2, rounds=3, latent_steps=STEPS, round_weights=weights, clip_norm=1e9
    )
    other = built(pattern, prompts, torch.float64)
    without = train_outer(other, batch, config, progress=False)
    found = train_outer(system, batch, replace(config, round_norms=True), progress=False)
    assert set(system.outer_links) == set(shared)
    norms = {edge_name(edge): [0.0] * max(key[2] for key in apart if key[:2] == edge) for edge in shared}
    for (source, target, sent), own in apart.items():
        gradients = [p.grad for p in own.parameters() if p.grad is not None]
        norms[f"{source}->{target}"][sent - 1] = torch.nn.utils.get_total_norm(gradients).item()
    assert found.records[0].round_norms.keys() == norms.keys()
    for edge, by_round in norms.items():
        assert min(by_round) > 0
        assert found.records[0].round_norms[edge] == pytest.approx(by_round, rel=1e-5)
    for ours, theirs in zip(found.records, without.records, strict=True):
        assert (ours.loss, ours.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-5)
        assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=1e-5)
        assert theirs.round_norms == {}


@pytest.mark.parametrize(
    ("latents", "dtype"), [("forced", torch.float32), ("forced", torch.float64), ("rollout", torch.float64)]
)
@pytest.mark.parametrize("name", PATTERNS)
def test_outer_gradients_equal_a_plain_implementation(name, latents, dtype):
    """Rollouts in float64: through three rounds of random weights, float32 loses 1e-3 whichever way it goes."""
    pattern, prompts = PATTERNS[name]
    system, batch = built(pattern, prompts, dtype), rows(pattern)
    loss, expected = gradients(system, [plain_loss(system, prompts, batch, 3, latents)])
    for micro_batch, recompute in ((1, True), (1, False), (2, True), (None, False)):  # there are two rows
        parts = outer_losses(
            system, batch, 3, latent_steps=STEPS, latents=latents, recompute=recompute, micro_batch=micro_batch
        )
        found, actual = gradients(system, parts)
        assert found == pytest.approx(loss, rel=1e-5)
        for edge, gradient in expected.items():
            assert gradient.abs().max() > 0
            assert (actual[edge] - gradient).abs().max() <= EQUAL[dtype] * gradient.abs().max(), (edge, micro_batch)


@pytest.mark.parametrize("name", PATTERNS)
def test_visits_of_many_positions_take_some_rows_at_a_time(name, monkeypatch):
    """Each forward that records gradients has one row, whose layers alone run again at once."""
    pattern, prompts = PATTERNS[name]
    system, batch = built(pattern, prompts, torch.float64), rows(pattern)
    loss, expected = gradients(system, [plain_loss(system, prompts, batch, 3, "forced")])
    # What agents prove at their first use is no visit.
    gradients(system, outer_losses(system, batch, 3, latent_steps=STEPS))
    counts = []

    def count(module, args, options):
        if torch.is_grad_enabled():
            counts.append(len(options["inputs_embeds"]))

    for agent in system.agents.values():
        agent.decoder.register_forward_pre_hook(count, with_kwargs=True)
    monkeypatch.setattr(recursion, "AT_ONCE", {"cpu": 1})
    for recompute in (True, False):
        counts.clear()
        found, actual = gradients(system, outer_losses(system, batch, 3, latent_steps=STEPS, recompute=recompute))
        assert set(counts) == {1}
        assert found == pytest.approx(loss, rel=1e-5)
        for edge, gradient in expected.items():
            assert (actual[edge] - gradient).abs().max() <= ROUNDING * gradient.abs().max(), edge
