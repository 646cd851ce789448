"""Tiny random agents, rows for them, and the recursion written out by hand: a row at a time, no padding, no splice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import (
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
