"""The lab's three agents: small models of three architectures, and the system they make."""

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
from recmas.config.system_json import Decoding
from recmas.lab.tasks import RELAY, Task
from recmas.recursive_mas import RecursiveMAS


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


def relay_system(agents: Mapping[str, Agent], seed: int, task: Task = RELAY) -> RecursiveMAS:
    """The task's three agents in sequence, with fresh links drawn from ``seed``."""
    rounds = max(task.hops)
    system = RecursiveMAS.create(agents, SEQUENTIAL, prompts=task.specs(), rounds=rounds, seed=seed)
    for role, setting in system.settings.items():
        setting.chat, setting.dtype = False, "float32"
        setting.latent_steps = task.latent_steps[role]
        setting.decoding = Decoding(max_new_tokens=task.max_new_tokens)
    return system


@torch.no_grad()
def widen(model: PreTrainedModel, rows: int, seed: int) -> None:
    """Enlarge the model's vocabulary to so many rows, of tokens that it never says.

    Each new row, of both tables, is an average of two rows that are there. So its logit is never above the larger one
    of theirs, and the greedy choice stays what it was.
    """
    generator = torch.Generator().manual_seed(seed)
    known = model.config.vocab_size
    first = torch.randint(known, (rows - known,), generator=generator)
    pairs = torch.stack([first, (first + torch.randint(1, known, first.shape, generator=generator)) % known])
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    wide = [torch.cat([table.weight, table.weight[pairs].mean(dim=0)]) for table in tables]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for table, weight in zip((model.get_input_embeddings(), model.get_output_embeddings()), wide, strict=True):
        table.weight.copy_(weight)
