"""The three agents of the relay: what each reads, and the small models that play them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    StableLmConfig,
)

from recmas.agents.agent import Agent
from recmas.config.pattern import SEQUENTIAL
from recmas.config.system_json import Decoding, PromptSpec
from recmas.recursive_mas import RecursiveMAS

PROMPTS = {
    "planner": {
        "first": "<bos> {{planner_sheet}} <in> {{question}} <out>",
        "later": "<bos> {{planner_sheet}} <in> {{from:solver}} <out>",
    },
    "critic": {"first": "<bos> {{critic_sheet}} <in> {{from:planner}} <out>"},
    "solver": {"first": "<bos> {{solver_sheet}} <in> {{from:critic}} <out>"},
}
"""The templates of the relay system; pretraining renders its lessons with the very same ones."""

SENDER = {"planner": "solver", "critic": "planner", "solver": "critic"}
LATENT_STEPS = {"planner": 2, "critic": 2, "solver": 3}
"""As many latent steps as the agent's own message has tokens."""
MAX_NEW_TOKENS = 4


def fresh_model(role: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """An untrained model of the role's own architecture (fp32): Qwen3 planner, Llama critic, StableLM solver."""
    shared = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    layers = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config: PretrainedConfig
    if role == "planner":
        config = Qwen3Config(**shared, **layers, hidden_size=128, head_dim=32, intermediate_size=256)
    elif role == "critic":
        layers |= {"num_hidden_layers": 3, "num_key_value_heads": 4}
        config = LlamaConfig(**shared, **layers, hidden_size=160, intermediate_size=320)
    elif role == "solver":
        config = StableLmConfig(**shared, **layers, hidden_size=96, intermediate_size=256, use_qkv_bias=True)
    else:
        raise ValueError(f"role must be planner, critic or solver, got {role!r}")
    config.tie_word_embeddings = role != "critic"
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def relay_system(agents: Mapping[str, Agent], seed: int) -> RecursiveMAS:
    """The relay's three agents in sequence, with fresh links drawn from ``seed``."""
    prompts = {role: PromptSpec(**templates) for role, templates in PROMPTS.items()}
    system = RecursiveMAS.create(agents, SEQUENTIAL, prompts=prompts, rounds=3, seed=seed)
    for role, setting in system.settings.items():
        setting.chat, setting.dtype = False, "float32"
        setting.latent_steps = LATENT_STEPS[role]
        setting.decoding = Decoding(max_new_tokens=MAX_NEW_TOKENS)
    return system
