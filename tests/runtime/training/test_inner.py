"""The inner stage on tiny random agents, against loops by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from recmas.agents.agent import Agent
from recmas.config.pattern import SEQUENTIAL, Pattern
from recmas.recursive_mas import RecursiveMAS
from recmas.training import InnerConfig, inner_loss, train_inner
from tests.runtime.training.by_hand import (
    PROMPTS,
    RAGGED,
    ROUNDING,
    ROWS,
    agent,
    build,
    changed,
    embeds,
    ids,
    link,
    states,
    text_of,
    tokenizer,
    weights,
)


@pytest.mark.parametrize(("role", "round"), [("planner", 1), ("planner", 2), ("critic", 2), ("solver", 1)])
def test_inner_loss_is_the_formula(exact, role, round):
    terms = []
    for row in RAGGED:
        heard = {
            "planner": row["question"] if round == 1 else text_of(row, "solver", round - 1),
            "critic": text_of(row, "planner", round),
            "solver": text_of(row, "critic", round),
        }[role]
        before = {"planner": f"<bos> {row['sheet']}", "critic": "<bos>", "solver": f"<bos> {row['question']}"}[role]
        prompt = embeds(exact, role, f"{before} <in> {heard} <out>")
        tokens = [*ids(exact, role, text_of(row, role, round)), exact.agents[role].tokenizer.eos_token_id]
        table = exact.agents[role].model.get_input_embeddings().weight
        hidden = states(exact, role, torch.cat([prompt, table[tokens[:-1]]]))[len(prompt) - 1 :]
        pred = link(exact.inner_links[role], hidden, "inner")
        for p, e in zip(pred, table[tokens], strict=True):
            cosine = p @ e / (p.norm() * e.norm())
            terms.append(0.7 * (1 - cosine) + 0.3 * (p - e).square().mean())
    expected = sum(terms) / len(terms)
    loss = inner_loss(exact, role, RAGGED, round, cosine_weight=0.7, mse_weight=0.3)
    torch.testing.assert_close(loss, expected, rtol=ROUNDING, atol=0)
    parameters = list(exact.inner_links[role].parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING * b.abs().max().item())


def test_inner_targets_of_another_agent_are_its_embeddings_of_the_same_text():
    """The planner says words, the target's tokenizer cuts them into pieces; both are 16 wide."""
    model = agent("planner").model
    model.resize_token_embeddings(len(tokenizer(True)), mean_resizing=False)
    agents = {role: agent(role) for role in ("planner", "critic")}
    agents["solver"] = Agent(model, tokenizer(True), name="solver")
    system = RecursiveMAS.create(agents, SEQUENTIAL, prompts=PROMPTS, rounds=1, latent_steps=2, seed=0)
    system = system.to(dtype=torch.float64)
    row = dict(ROWS[0], targets={"planner": "2 bako"})
    prompt = embeds(system, "planner", f"<bos> {row['sheet']} <in> {row['question']} <out>")
    hidden = states(system, "planner", torch.cat([prompt, embeds(system, "planner", "2")]))[len(prompt) - 1 :]
    pred = link(system.inner_links["planner"], hidden, "inner")
    table, known = agents["solver"].model.get_input_embeddings().weight, agents["solver"].tokenizer
    targets = [table[known.convert_tokens_to_ids(pieces)].mean(dim=0) for pieces in (["2"], ["ba", "##ko"])]
    expected = sum(1 - p @ e / (p.norm() * e.norm()) for p, e in zip(pred, targets, strict=True)) / 2
    loss = inner_loss(system, "planner", [row], target="solver")
    torch.testing.assert_close(loss, expected, rtol=ROUNDING, atol=0)
    own = inner_loss(system, "planner", [row])
    assert inner_loss(system, "planner", [row], target="planner") == own != loss
    config = InnerConfig(steps=1, batch_size=1, inner_target={"planner": "solver"})
    result = train_inner(system, [row], config, roles=["planner"], progress=False)
    assert result["planner"].loss == pytest.approx(loss.item())


def test_inner_targets_that_do_not_fit_are_refused():
    system = build()
    for target, message in (
        ("poet", "inner_target: unknown role 'poet'"),
        ({"poet": "planner"}, "inner_target: no inner link of 'poet' is trained, only of planner"),
        ("solver", "inner_target: the inner link of 'planner' makes 16 features, embeddings of 'solver' have 12"),
    ):
        with pytest.raises(ValueError, match=message):
            train_inner(system, ROWS, InnerConfig(inner_target=target), roles=["planner"], progress=False)


def test_inner_training_learns_and_touches_the_chosen_links_only():
    system = build()
    before = weights(system)
    config = InnerConfig(steps=100, batch_size=2, learning_rate=1e-2, warmup_steps=2, rounds=(1, 2))
    results = train_inner(system, ROWS, config, roles=["planner", "solver"], progress=False)
    assert changed(before, weights(system)) == {"inner planner", "inner solver"}
    for result in results.values():
        assert result.steps == 100
        assert result.loss < 0.5 * result.records[0].loss
    everything = [*system.inner_links.values(), *system.outer_links.values()]
    assert all(p.requires_grad for module in everything for p in module.parameters())
    assert all(p.grad is None for module in everything for p in module.parameters())
    assert not any(p.requires_grad for a in system.agents.values() for p in a.model.parameters())


def test_inner_targets_are_scaled_where_the_model_scales_its_embeddings():
    made = tokenizer(False)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "vocab_size": len(made), "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"]}
    torch.manual_seed(0)
    agents = {
        role: Agent(Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads)), made, name=role)
        for role in ("planner", "critic")
    }
    pattern = Pattern((("planner",), ("critic",)))
    system = RecursiveMAS.create(agents, pattern, rounds=1, seed=0).to(dtype=torch.float64)
    row = {"question": "1 red", "targets": {"planner": "2 cat"}}
    prompt = system.prompt(next(pattern.visits(1)), [row], {}).embeds[0]
    tokens = [*ids(system, "planner", "2 cat"), made.eos_token_id]
    embedded = system.agents["planner"].model.get_input_embeddings()(torch.tensor(tokens))
    assert embedded.norm() > 2 * system.agents["planner"].model.get_input_embeddings().weight[tokens].norm()
    hidden = states(system, "planner", torch.cat([prompt, embedded[:-1]]))[len(prompt) - 1 :]
    expected = (link(system.inner_links["planner"], hidden, "inner") - embedded).square().mean()
    loss = inner_loss(system, "planner", [row], cosine_weight=0, mse_weight=1)
    torch.testing.assert_close(loss, expected, rtol=ROUNDING, atol=0)
