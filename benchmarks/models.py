"""Random language models for timing: what they say does not matter, how large they are does."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recmas.agent import Agent

HEAD_FEATURES = 64


def random_agent(layers: int, features: int, vocabulary: int, seed: int = 0) -> Agent:
    """A frozen float32 Llama with random weights that never ends a text.

    Args:
        layers: number of decoder layers.
        features: width d; a multiple of 64. The feed-forward part is 8/3 as wide, rounded up to 64.
        vocabulary: |V|.
        seed: of the weights.
    """
    heads = features // HEAD_FEATURES
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=features,
        intermediate_size=math.ceil(8 * features / 3 / HEAD_FEATURES) * HEAD_FEATURES,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return Agent(model, SimpleNamespace(eos_token_id=None, pad_token_id=0), name="random")
