"""Tiny random models of the families the runtime serves, and a tokenizer trained here."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from recmas.agents.agent import Agent
from recmas.engine.messages import Prompt
from recmas.system.prompt_assembly import assemble
from recmas_kernels import FusedRecursiveLink

VOCABULARY = 320
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "question: what is the answer to everything? notes and plan and critique and solution",
    "0123456789 + - * / = ( ) < > { } : , . ! recmas slot planner critic solver",
]
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_WITHOUT_SYSTEM = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate, user first') }}{% endif %}" + CHAT
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
}


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(family: str, hidden_size: int = 32, seed: int = 0) -> Any:
    config = CONFIG_MAPPING[family](**{**SHAPE, **FAMILIES[family], "hidden_size": hidden_size})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float()


def tiny_agent(
    family: str, name: str = "agent", hidden_size: int = 32, seed: int = 0, chat_template: str | None = CHAT
) -> Agent:
    return Agent(tiny_model(family, hidden_size, seed), tiny_tokenizer(chat_template), name=name)


def tiny_link(agent: Agent, target: Agent | None = None, seed: int = 0) -> FusedRecursiveLink:
    """An inner link, or an outer one to `target`; released shape, at the embedding scale it writes into."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if target is None:
            link = FusedRecursiveLink.inner(agent.hidden_size)
        else:
            link = FusedRecursiveLink.outer(agent.hidden_size, target.hidden_size)
    torch.nn.init.constant_(link.norm_out.weight, (target or agent).embedding_rms())
    return link


def prompts(agent: Agent, lengths: tuple[int, ...], seed: int = 0) -> tuple[Prompt, list[torch.Tensor]]:
    """A left-padded batch of random prompts, and each row's own embeddings ``[1, T, d]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(10, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    batch = assemble(agent.embed, [[row] for row in rows], {}, {}, pad_id=agent.pad_id, device="cpu")
    return batch, [agent.embed(torch.tensor([row])) for row in rows]
