"""The three training stages on tiny random agents, against loops by hand: one row at a time, no padding, no splice."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recmas.agents.agent import Agent
from recmas.config.pattern import SEQUENTIAL, Pattern
from recmas.config.system_json import PromptSpec
from recmas.recursive_mas import RecursiveMAS
from recmas.training import (
    InnerConfig,
    OuterConfig,
    WarmupConfig,
    answer,
    inner_loss,
    outer_loss,
    train_inner,
    train_outer,
    train_warmup,
    warmup_loss,
)
from recmas.training.counterparts import aligned_tokens, overlaps
from recmas_kernels import use_backend
from tests.runtime.tiny import tiny_agent

WORDS = ["bako", "dilo", "remu", "red", "blue", "cat", "dog", "0", "1", "2", "3"]
PIECES = ["ba", "##ko", "di", "##lo", "re", "##mu", "##d", "blue", "cat", "dog", "0", "1", "2", "3"]
# transformers rounds norms and rotations to float32 in float64 models too.
ROUNDING = 64 * torch.finfo(torch.float32).eps
SPECIAL = ["<unk>", "<bos>", "<in>", "<out>", "<eos>"]
STEPS = {"planner": 2, "critic": 1, "solver": 3}
PROMPTS = {
    "planner": PromptSpec("<bos> {{sheet}} <in> {{question}} <out>", "<bos> {{sheet}} <in> {{from:solver}} <out>"),
    "critic": PromptSpec("<bos> <in> {{from:planner}} <out>"),
    "solver": PromptSpec("<bos> {{question}} <in> {{from:critic}} <out>"),
}
# Messages are shorter and longer than the latent steps, prompts differ in length.
ROWS = [
    {
        "question": "2 bako",
        "sheet": "bako red dilo blue",
        "targets": {"planner": ["2 red", "1 blue blue", "0"], "critic": "1 cat", "solver": ["1 dilo", "0", "3 remu 2"]},
    },
    {
        "question": "dilo 1 0",
        "sheet": "dilo",
        "targets": {"planner": ["blue", "2", "1 red dog"], "critic": ["2", "dog", "1"], "solver": ["0", "2 bako", "0"]},
    },
]  # fmt: skip
# Empty messages, too, which the losses take: every kind of raggedness.
RAGGED = [ROWS[0], dict(ROWS[1], targets=dict(ROWS[1]["targets"], critic=["", "dog", "1"], solver=["", "2 bako", "0"]))]


def tokenizer(pieces: bool) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(SPECIAL + (PIECES if pieces else WORDS))}
    kind = models.WordPiece if pieces else models.WordLevel
    made = Tokenizer(kind(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pieces:
        made.decoder = token_decoders.WordPiece()
    extra = ["<in>", "<out>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", additional_special_tokens=extra
    )


def agent(role: str) -> Agent:
    pieces = role == "solver"
    made = tokenizer(pieces)
    common = {
        "vocab_size": len(made),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "eos_token_id": made.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(sum(map(ord, role)))
    if role == "critic":
        model = LlamaForCausalLM(LlamaConfig(hidden_size=20, intermediate_size=24, **common))
    elif pieces:
        model = Qwen2ForCausalLM(Qwen2Config(hidden_size=12, intermediate_size=20, tie_word_embeddings=True, **common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(hidden_size=16, intermediate_size=24, head_dim=8, **common))
    return Agent(model, made, name=role)


def build(pattern: Pattern = SEQUENTIAL, prompts=PROMPTS, rounds: int = 3, dtype=torch.float32) -> RecursiveMAS:
    agents = {role: agent(role) for role in pattern.roles}
    system = RecursiveMAS.create(agents, pattern, prompts=prompts, rounds=rounds, latent_steps=2, seed=0)
    return system.to(dtype=dtype)


@pytest.fixture(scope="module")
def exact() -> RecursiveMAS:
    """In float64, for comparisons; tests must not change it."""
    return build(dtype=torch.float64)


def weights(system: RecursiveMAS) -> dict[str, torch.Tensor]:
    """Copies of every parameter."""
    links = {f"inner {role}": link for role, link in system.inner_links.items()}
    links |= {"->".join(edge): link for edge, link in system.outer_links.items()}
    links |= {f"agent {role}": a.model for role, a in system.agents.items()}
    found = {f"{name}.{key}": p.detach().clone() for name, link in links.items() for key, p in link.named_parameters()}
    return found | {f"{edge}.score": p.detach().clone() for edge, p in system.edge_scores.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the modules that are not bit-equal."""
    return {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}


# ---- the recursion written out by hand


def ids(system, role, text):
    return system.agents[role].tokenizer(text, add_special_tokens=False)["input_ids"]


def embeds(system, role, text):
    return system.agents[role].model.get_input_embeddings().weight[ids(system, role, text)]


def states(system, role, sequence):
    """Hidden states after the final norm of one sequence of embeddings [T, d]."""
    output = system.agents[role].model(inputs_embeds=sequence[None], output_hidden_states=True)
    return output.hidden_states[-1][0]


def link(parameters, x, kind):
    """The released link's formula."""
    first, last = ("pre_ln", "post_ln") if kind == "inner" else ("ln_source", "ln_target")
    p = dict(parameters.named_parameters())
    u = F.layer_norm(x, x.shape[-1:], p[f"{first}.weight"], p[f"{first}.bias"])
    z = F.linear(F.gelu(F.linear(u, p["proj1.weight"], p["proj1.bias"])), p["proj2.weight"], p["proj2.bias"])
    z = z + (x if kind == "inner" else F.linear(x, p["residual_proj.weight"], p["residual_proj.bias"]))
    return F.layer_norm(z, z.shape[-1:], p[f"{last}.weight"], p[f"{last}.bias"])


def text_of(row, role, round):
    target = row["targets"][role]
    return target if isinstance(target, str) else target[round - 1]


def with_slot(system, source, target, before, latents, after):
    mapped = link(system.outer_links[source, target], latents, "outer")
    return torch.cat([embeds(system, target, before), mapped, embeds(system, target, after)])


def forced_latents(system, role, prompt, text):
    tokens = [*ids(system, role, text), system.agents[role].tokenizer.eos_token_id][: STEPS[role]]
    table = system.agents[role].model.get_input_embeddings()
    sequence = torch.cat([prompt, table(torch.tensor(tokens[:-1], dtype=torch.long))])
    return link(system.inner_links[role], states(system, role, sequence)[len(prompt) - 1 :], "inner")


def rolled_out_latents(system, role, prompt, text):
    latents = []
    for _ in range(STEPS[role]):
        latents.append(link(system.inner_links[role], states(system, role, prompt)[-1], "inner"))
        prompt = torch.cat([prompt, latents[-1][None]])
    return torch.stack(latents)


def plain_outer_loss(system, rows, rounds, think):
    """Sum of the answers' negative log likelihoods over their number of tokens."""
    total, count = 0.0, 0
    for row in rows:
        latents = None
        for round in range(1, rounds + 1):
            if round == 1:
                prompt = embeds(system, "planner", f"<bos> {row['sheet']} <in> {row['question']} <out>")
            else:
                prompt = with_slot(system, "solver", "planner", f"<bos> {row['sheet']} <in> ", latents, " <out>")
            latents = think(system, "planner", prompt, text_of(row, "planner", round))
            prompt = with_slot(system, "planner", "critic", "<bos> <in> ", latents, " <out>")
            latents = think(system, "critic", prompt, text_of(row, "critic", round))
            prompt = with_slot(system, "critic", "solver", f"<bos> {row['question']} <in> ", latents, " <out>")
            if round < rounds:
                latents = think(system, "solver", prompt, text_of(row, "solver", round))
        answer = [
            *ids(system, "solver", text_of(row, "solver", rounds)),
            system.agents["solver"].tokenizer.eos_token_id,
        ]
        model = system.agents["solver"].model
        sequence = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(answer[:-1], dtype=torch.long))])
        logits = model(inputs_embeds=sequence[None]).logits[0, len(prompt) - 1 :]
        total = total - logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        count += len(answer)
    return total / count


def outer_gradients(system, loss):
    parameters = [p for outer in system.outer_links.values() for p in outer.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("latents", ["forced", "rollout"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_unrolled_loss_and_gradients_equal_the_plain_loop(exact, rounds, latents):
    think = forced_latents if latents == "forced" else rolled_out_latents
    expected = plain_outer_loss(exact, RAGGED, rounds, think)
    loss = outer_loss(exact, RAGGED, rounds, latent_steps=STEPS, latents=latents)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=ROUNDING, atol=0)
    for a, b in zip(outer_gradients(exact, loss), outer_gradients(exact, expected), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING * b.abs().max().item())
    used = [g is not None for g in outer_gradients(exact, outer_loss(exact, RAGGED, rounds, latent_steps=STEPS))]
    assert all(used) == (rounds > 1)


def test_logits_made_in_parts_give_the_same_loss_and_gradients(exact, monkeypatch):
    loss = outer_loss(exact, RAGGED, 2, latent_steps=STEPS)
    monkeypatch.setattr(answer, "LEAST_ROWS", 3)  # three rows at a time, of seven
    monkeypatch.setattr(answer, "LOGITS", {"cpu": 1})
    parted = outer_loss(exact, RAGGED, 2, latent_steps=STEPS, recompute=True)
    torch.testing.assert_close(parted, loss, rtol=ROUNDING, atol=0)
    for a, b in zip(outer_gradients(exact, parted), outer_gradients(exact, loss), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING * b.abs().max().item())


def test_no_latent_steps_leave_an_empty_slot(exact):
    loss = outer_loss(exact, RAGGED, 1, latent_steps={"planner": 2, "critic": 0})
    without = [dict(row, question=row["question"]) for row in RAGGED]
    total, count = 0.0, 0
    for row in without:
        prompt = torch.cat(
            [embeds(exact, "solver", f"<bos> {row['question']} <in> "), embeds(exact, "solver", " <out>")]
        )
        answer = [*ids(exact, "solver", text_of(row, "solver", 1)), exact.agents["solver"].tokenizer.eos_token_id]
        model = exact.agents["solver"].model
        sequence = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(answer[:-1], dtype=torch.long))])
        logits = model(inputs_embeds=sequence[None]).logits[0, len(prompt) - 1 :]
        total = total - logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        count += len(answer)
    torch.testing.assert_close(loss, total / count, rtol=ROUNDING, atol=0)


# ---- inner


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


# ---- warm-up


def test_overlaps_follow_characters():
    assert overlaps([(0, 4), (5, 9)], [(0, 2), (2, 6), (7, 9)]) == [[0, 1], [1, 2]]
    assert overlaps([(0, 0), (2, 3)], [(0, 3), (1, 1)]) == [[], [0]]


def test_tokens_of_two_tokenizers_are_aligned_both_ways():
    words, pieces = tokenizer(False), tokenizer(True)
    groups, ids = aligned_tokens(words, pieces, ["1 bako", "red", "1 nope cat", ""])
    assert [pieces.convert_ids_to_tokens(row) for row in ids][:2] == [["1", "ba", "##ko"], ["re", "##d"]]
    assert groups == [[[0], [1, 2]], [[0, 1]], [[0], [], [2]], []]  # unknown words stand for nothing
    groups, ids = aligned_tokens(pieces, words, ["1 bako", "0 blue <eos>"])
    assert groups == [[[0], [1], [1]], [[0], [1], []]]


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="object reports no character offsets"):
        aligned_tokens(tokenizer(False), object(), ["1"])


@pytest.mark.parametrize("edge", [("critic", "solver"), ("solver", "planner")])
def test_warmup_loss_is_the_formula(exact, edge):
    source, target = edge
    rows = [dict(row, targets=dict(row["targets"], critic="1 bako", solver="2 dilo")) for row in ROWS]
    rows[1]["targets"] = dict(rows[1]["targets"], critic="red cat", solver="remu")
    # by hand: which of the receiver's tokens each of the sender's tokens stands for
    counterparts = {
        ("critic", "solver"): [[["1"], ["ba", "##ko"]], [["re", "##d"], ["cat"]]],
        ("solver", "planner"): [[["2"], ["dilo"], ["dilo"]], [["remu"], ["remu"]]],
    }[edge]
    receiver = exact.agents[target]
    table = receiver.model.get_input_embeddings().weight
    terms = []
    for row, groups in zip(rows, counterparts, strict=True):
        before = "<bos>" if source == "critic" else f"<bos> {row['question']}"
        heard = text_of(row, "planner", 1) if source == "critic" else row["targets"]["critic"]
        prompt = embeds(exact, source, f"{before} <in> {heard} <out>")
        text = embeds(exact, source, row["targets"][source])
        hidden = states(exact, source, torch.cat([prompt, text]))[len(prompt) - 1 : -1]
        pred = link(exact.outer_links[edge], link(exact.inner_links[source], hidden, "inner"), "outer")
        for p, group in zip(pred, groups, strict=True):
            e = table[receiver.tokenizer.convert_tokens_to_ids(group)].mean(dim=0)
            terms.append(1 - p @ e / (p.norm() * e.norm()))
    torch.testing.assert_close(warmup_loss(exact, edge, rows), sum(terms) / len(terms), rtol=ROUNDING, atol=0)


def test_messages_without_counterparts_give_no_loss(exact):
    rows = [dict(row, targets={"planner": "1", "critic": "nope never"}) for row in ROWS]
    loss = warmup_loss(exact, ("critic", "solver"), rows)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, list(exact.outer_links["critic", "solver"].parameters()), allow_unused=True)
    assert not any(g is not None and g.any() for g in gradients)


def test_only_the_first_tokens_count_where_asked(exact):
    rows = [dict(row, targets={"planner": "1", "critic": "1 cat dog"}) for row in ROWS]
    short = [dict(row, targets={"planner": "1", "critic": "1"}) for row in ROWS]
    edge = ("critic", "solver")
    loss = warmup_loss(exact, edge, rows, max_tokens=1)
    torch.testing.assert_close(loss, warmup_loss(exact, edge, short), rtol=ROUNDING, atol=0)
    loss = inner_loss(exact, "critic", rows, max_tokens=1)
    torch.testing.assert_close(loss, inner_loss(exact, "critic", short, max_tokens=1), rtol=ROUNDING, atol=0)


def test_warmup_learns_and_touches_the_chosen_edge_only():
    system = build()
    before = weights(system)
    config = WarmupConfig(steps=40, batch_size=2, learning_rate=1e-2, warmup_steps=2, rounds=3)
    results = train_warmup(system, ROWS, config, edges=[("critic", "solver")], progress=False)
    assert changed(before, weights(system)) == {"critic->solver"}
    result = results["critic", "solver"]
    assert result.loss < 0.5 * result.records[0].loss


# ---- outer


def test_outer_training_learns_and_touches_outer_links_only():
    system = build()
    before = weights(system)
    config = OuterConfig(steps=40, batch_size=2, warmup_steps=2, rounds=2, latent_steps=STEPS, learning_rate=1e-2)
    with pytest.warns(UserWarning, match="learning_rate 0.01 through 2 rounds"):
        result = train_outer(system, ROWS, config, progress=False)
    assert changed(before, weights(system)) == {"planner->critic", "critic->solver", "solver->planner"}
    assert result.loss < 0.9 * result.records[0].loss


@pytest.mark.parametrize("latents", ["forced", "rollout"])
def test_the_log_counts_what_agents_read_and_say(latents):
    system, row = build(), ROWS[0]
    read = {
        "planner": f"<bos> {row['sheet']} <in> {row['question']} <out>",
        "critic": "<bos> <in> <out>",
        "solver": f"<bos> {row['question']} <in> <out>",
    }
    prompts = sum(len(ids(system, role, text)) for role, text in read.items())
    said = {role: len(ids(system, role, text_of(row, role, 1))) + 1 for role in system.pattern.roles}
    sent = {"planner": min(STEPS["planner"], said["planner"]), "critic": min(STEPS["critic"], said["critic"])}
    if latents == "rollout":
        sent = {"planner": STEPS["planner"], "critic": STEPS["critic"]}
    config = OuterConfig(steps=1, batch_size=1, rounds=1, latent_steps=STEPS, latents=latents)
    result = train_outer(system, [row], config, progress=False)
    assert result.records[0].tokens == prompts + 2 * sum(sent.values()) + said["solver"]  # sent, and read in a slot
    inner = train_inner(system, [row], InnerConfig(steps=1, batch_size=1), progress=False)
    assert {role: done.records[0].tokens for role, done in inner.items()} == said


def test_one_round_trains_the_edges_it_uses_at_any_rate():
    system = build()
    before = weights(system)
    config = OuterConfig(steps=2, batch_size=2, rounds=1, learning_rate=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_outer(system, ROWS, config, progress=False)
    assert changed(before, weights(system)) == {"planner->critic", "critic->solver"}
    before = weights(system)
    train_outer(system, ROWS, config, edges=[("critic", "solver")], progress=False)
    assert changed(before, weights(system)) == {"critic->solver"}


def test_outer_training_resumes_bit_for_bit(tmp_path):
    config = OuterConfig(steps=6, batch_size=1, rounds=(1, 2), checkpoint_every=2, accumulation=2)
    whole, parts = build(), build()
    train_outer(whole, ROWS, config, output=tmp_path / "whole", progress=False)
    train_outer(parts, ROWS, config, output=tmp_path / "parts", progress=False, on_step=lambda r: r.step == 3)
    parts = build()
    train_outer(parts, ROWS, config, output=tmp_path / "parts", progress=False, resume=True)
    assert changed(weights(whole), weights(parts)) == set()
    logs = [(tmp_path / name / "outer" / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_training_with_packed_links_resumes_bit_for_bit(tmp_path):
    """The frozen inner links are packed in the first steps; a resumed run begins with them unpacked."""
    made = {role: tiny_agent("llama", role, 64, seed) for seed, role in enumerate(SEQUENTIAL.roles)}

    def fresh():
        system = RecursiveMAS.create(made, SEQUENTIAL, prompts=PROMPTS, rounds=2, latent_steps=2, seed=0)
        assert all(p.numel() >= 4096 for inner in system.inner_links.values() for p in inner.parameters() if p.ndim > 1)
        return system

    config = OuterConfig(steps=5, batch_size=2, rounds=2, checkpoint_every=0, learning_rate=1e-4)
    whole, parts = fresh(), fresh()
    expected = train_outer(whole, ROWS, config, output=tmp_path / "whole", progress=False)
    train_outer(parts, ROWS, config, output=tmp_path / "parts", progress=False, on_step=lambda r: r.step == 3)
    parts = fresh()
    result = train_outer(parts, ROWS, config, output=tmp_path / "parts", progress=False, resume=True)
    assert changed(weights(whole), weights(parts)) == set()
    assert [record.loss for record in result.records] == [record.loss for record in expected.records]


def test_weighted_slots_learn_their_scores_too(tmp_path):
    pattern = Pattern((("planner", "critic"), ("solver",)), combine="weighted")
    prompts = {
        "planner": PromptSpec("<bos> {{question}} <out>"),
        "critic": PromptSpec("<bos> {{question}} <out>"),
        "solver": PromptSpec("<bos> {{from:planner,critic}} <out>"),
    }
    system = build(pattern, prompts, rounds=1)
    before = weights(system)
    rows = [dict(row, targets=dict(row["targets"], critic="1 cat dog")) for row in ROWS]
    rows = [dict(row, targets=dict(row["targets"], planner="2 red blue")) for row in rows]
    config = OuterConfig(steps=3, batch_size=2, rounds=1, weight_decay=0.1)
    train_outer(system, rows, config, output=tmp_path, progress=False)
    edges = {("planner", "solver"), ("critic", "solver")}
    assert changed(before, weights(system)) == {"->".join(e) for e in edges} | {str(e) for e in edges}
    again = build(pattern, prompts, rounds=1)
    train_outer(again, rows, config, output=tmp_path, progress=False, resume=True)
    assert changed(weights(system), weights(again)) == set()


def all_losses(system):
    inner, warmup = inner_loss(system, "critic", RAGGED), warmup_loss(system, ("critic", "solver"), RAGGED)
    return [inner, warmup, outer_loss(system, RAGGED, 2, latent_steps=STEPS)]


def test_float32_masters_learn_beside_bfloat16_agents(exact):
    """Their losses stay within the kernels' budget: twice the error of eager torch, and one rounding."""
    expected = torch.stack(all_losses(exact)).detach()
    system = build()
    for a in system.agents.values():
        a.to(torch.bfloat16)
    with use_backend("reference"):
        eager = torch.stack(all_losses(system)).detach()
    losses = all_losses(system)
    assert all(loss.dtype == torch.float32 for loss in losses)
    scale = expected.abs().max()
    figure, plain = ((found - expected).abs().max() / scale for found in (torch.stack(losses).detach(), eager))
    assert figure <= 2 * plain + torch.finfo(torch.bfloat16).eps
    losses[2].backward()
    gradients = [p.grad for outer in system.outer_links.values() for p in outer.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


# ---- bad input


def test_missing_parts_are_named_before_any_step():
    system = build(rounds=1)
    with pytest.raises(ValueError, match="solver->planner"):
        train_outer(system, ROWS, OuterConfig(rounds=2), progress=False)
    with pytest.raises(ValueError, match="edges: solver->planner is not used by 1 rounds"):
        train_outer(system, ROWS, OuterConfig(rounds=1), edges=[("solver", "planner")], progress=False)
    with pytest.raises(ValueError, match="edges: there is no outer link solver->planner"):
        train_warmup(system, ROWS, edges=[("solver", "planner")], progress=False)
    with pytest.raises(ValueError, match="roles: 'solver' has no inner link, only planner, critic"):
        train_inner(system, ROWS, roles=["solver"], progress=False)
    with pytest.raises(ValueError, match="latent_steps: unknown role 'poet'"):
        train_outer(system, ROWS, OuterConfig(rounds=1, latent_steps={"poet": 1}), progress=False)
    with pytest.raises(ValueError, match="latents must be 'forced' or 'rollout', got 'dream'"):
        OuterConfig(latents="dream")


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (OuterConfig, "rounds", 0),
        (OuterConfig, "rounds", ()),
        (InnerConfig, "rounds", (1, -1)),
        (InnerConfig, "cosine_weight", -1.0),
        (WarmupConfig, "cosine_weight", 0.0),
        (WarmupConfig, "max_tokens", 0),
        (OuterConfig, "round_weights", (1.0,)),
        (OuterConfig, "round_weights", (1.0, 1.0, 0.0)),
        (OuterConfig, "round_weights", (1.0, float("nan"), 1.0)),
    ],
)
def test_settings_are_checked(config, field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})


@pytest.mark.parametrize(
    ("train", "config"),
    [(train_inner, InnerConfig), (train_warmup, WarmupConfig), (train_outer, OuterConfig)],
)
def test_all_rows_are_looked_at_before_the_first_step(exact, tmp_path, train, config):
    lacking = dict(ROWS[1], targets=dict(ROWS[1]["targets"], critic=["dog"]))
    rows = [ROWS[0]] * 20 + [lacking]
    with pytest.raises(ValueError, match="row 20: targets of 'critic' cover 1 rounds, round 2 is needed"):
        train(exact, rows, config(steps=1, batch_size=1, rounds=(1, 2)), output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_only_the_texts_that_are_forced_are_asked_for():
    system = build()
    rows = [dict(row, targets={"solver": row["targets"]["solver"][:2]}) for row in ROWS]
    config = OuterConfig(steps=1, batch_size=1, rounds=2, latents="rollout")
    assert train_outer(system, rows, config, progress=False).steps == 1
    for row in rows:
        row["targets"]["solver"] = [None, "dog"]
    assert train_outer(system, rows, replace(config, round_weights=(0.0, 2.0)), progress=False).steps == 1
    with pytest.raises(ValueError, match="row 0: expected the target of agent 'solver' to be text, got None"):
        train_outer(system, rows, replace(config, round_weights=(0.1, 1.0)), progress=False)


def test_rows_without_what_a_stage_needs_are_named(exact):
    rows = [ROWS[0], dict(ROWS[1], targets={"planner": "1", "solver": ["0"]})]
    with pytest.raises(ValueError, match="row 1: targets has no text for agent 'critic'"):
        outer_loss(exact, rows, 1)
    rows[1]["targets"]["critic"] = "1"
    with pytest.raises(ValueError, match="row 1: targets of 'solver' cover 1 rounds, round 2 is needed"):
        outer_loss(exact, rows, 2)
    with pytest.raises(ValueError, match="row 1: targets of 'solver' cover 1 rounds, round 2 is needed"):
        inner_loss(exact, "solver", rows, 2)
    with pytest.raises(ValueError, match="sheet"):
        outer_loss(exact, [{"question": "1", "targets": ROWS[0]["targets"]}], 1)
    with pytest.raises(ValueError, match="unknown role 'poet'"):
        warmup_loss(exact, ("poet", "solver"), ROWS)
