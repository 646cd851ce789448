"""Tiny language models for the examples and the tutorial: random, then taught one skill in a second or two on a CPU."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from recmas import Agent

DIGITS = tuple("0123456789")

torch.set_num_threads(1)  # models as small as these lose time to threads


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; text is cut at spaces."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def tiny_agent(
    name: str, family: str, width: int, words: Sequence[str], lessons: Sequence[tuple[str, str]], steps: int
) -> Agent:
    """A two-layer model of a transformers family, trained to continue each prompt of `lessons` with its answer.

    Args:
        name: of the agent.
        family: transformers' name, such as "llama" or "qwen3".
        width: hidden size, a multiple of 8.
        words: the vocabulary.
        lessons: (prompt, answer) pairs; the prompts have equally many words, and so have the answers.
        steps: optimiser steps, of 64 lessons each.
    """
    tokenizer = word_tokenizer(words)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(0)
    rows = torch.tensor([tokenizer(f"{prompt} {answer} <end>")["input_ids"] for prompt, answer in lessons])
    prompt_length = len(tokenizer(lessons[0][0])["input_ids"])
    for _ in range(steps):
        ids = rows[draw.choices(range(len(lessons)), k=64)]
        labels = ids.clone()
        labels[:, :prompt_length] = -100  # the prompt itself is not predicted
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return Agent(model, tokenizer, name=name)


def adder() -> Agent:
    """Knows every sum of two digits, modulo 10: ``3 + 9 =`` continues with ``2``. Qwen3, 32 features."""
    lessons = [(f"{a} + {b} =", str((a + b) % 10)) for a in range(10) for b in range(10)]
    return tiny_agent("adder", "qwen3", 32, [*DIGITS, "+", "="], lessons, steps=300)


def writer() -> Agent:
    """Copies a note, and cannot add: ``note 2 answer`` continues with ``2``. Llama, 48 features."""
    lessons = [(f"note {digit} answer", digit) for digit in DIGITS]
    return tiny_agent("writer", "llama", 48, [*DIGITS, "note", "answer"], lessons, steps=100)
