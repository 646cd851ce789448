"""Outer gradients of the four patterns equal a plain unrolled implementation's: row by row, no cache, no padding."""

from __future__ import annotations

import re

import pytest
import torch

from recmas.config.pattern import DELIBERATION, DISTILLATION, MIXTURE, SEQUENTIAL
from recmas.config.system_json import PromptSpec
from recmas.training.outer import outer_losses
from tests.runtime.training.test_stages import PROMPTS, ROUNDING, ROWS, build, embeds, ids, link, states

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


def plain_loss(system, prompts, batch, rounds, latents):
    total, count = 0.0, 0
    for row in batch:
        messages = {}
        for visit in system.pattern.visits(rounds):
            role, agent = visit.role, system.agents[visit.role]
            pieces, text = [], ""
            for part in re.split(r"(\{\{.*?\}\})", prompts[role].at(visit.round)):
                if part.startswith("{{from:"):
                    sender = part[len("{{from:") : -2]
                    at = visit.sender_rounds[visit.senders.index(sender)]
                    mapped = link(system.outer_links[sender, role], messages[sender, at], "outer")
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


@pytest.mark.parametrize(
    ("latents", "dtype"), [("forced", torch.float32), ("forced", torch.float64), ("rollout", torch.float64)]
)
@pytest.mark.parametrize("name", PATTERNS)
def test_outer_gradients_equal_a_plain_implementation(name, latents, dtype):
    """Rollouts in float64: through three rounds of random weights, float32 loses 1e-3 whichever way it goes."""
    pattern, prompts = PATTERNS[name]
    system, batch = built(pattern, prompts, dtype), rows(pattern)
    loss, expected = gradients(system, [plain_loss(system, prompts, batch, 3, latents)])
    for micro_batch in (1, 2, None):
        for recompute in (True, False):
            parts = outer_losses(
                system, batch, 3, latent_steps=STEPS, latents=latents, recompute=recompute, micro_batch=micro_batch
            )
            found, actual = gradients(system, parts)
            assert found == pytest.approx(loss, rel=1e-5)
            for edge, gradient in expected.items():
                assert gradient.abs().max() > 0
                assert (actual[edge] - gradient).abs().max() <= EQUAL[dtype] * gradient.abs().max(), (edge, micro_batch)
