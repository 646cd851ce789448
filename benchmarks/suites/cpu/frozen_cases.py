"""The cells of an agent's own steps: random models of released shapes, and released models where a folder is named.

Random weights have values of 16 bits, as checkpoints hold them; a float32 agent is such a checkpoint loaded as float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.checkpoints import Checkpoint, checkpoints
from benchmarks.harness.models import cast
from benchmarks.harness.record import dtype_name

PROMPT, STEPS = 32, 8  # tokens that have been read; steps in one timed call
COLUMNS = PROMPT + 12 * STEPS  # all that the calls of a cell need, the gate's and the timed ones
COMPILED_BATCHES = (1, 4)


@dataclass(frozen=True)
class Shape:
    """Of a model: that of a released one, so named."""

    name: str
    layers: int
    features: int
    feed_forward: int
    heads: int
    groups: int
    vocabulary: int
    uses_gelu: bool = False

    def model(self) -> LlamaForCausalLM:
        """float32, of values that bfloat16 holds."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.features,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        return cast(cast(model, torch.bfloat16), torch.float32)


SHAPES = [
    Shape("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151_936),
    Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 49_152),
]
SUITES = {Shape: "frozen", Checkpoint: "released"}
"""Of random weights or of released ones: who measures one need not measure the other."""
TINY = Shape("tiny", 2, 64, 192, 2, 1, 512)


@dataclass(frozen=True)
class Case:
    """One cell. ``op``: "think" feeds the link's output, "write" the likeliest token."""

    shape: Shape | Checkpoint
    dtype: torch.dtype
    op: str
    batch: int

    @property
    def suite(self) -> str:
        return SUITES[type(self.shape)]

    @property
    def id(self) -> str:
        return f"cpu-{self.suite}-{self.shape.name}-{dtype_name(self.dtype)}-{self.op}-B{self.batch}"

    @property
    def writes(self) -> bool:
        return self.op == "write"


def cases(full: bool) -> list[Case]:
    """Of the full or the quick grid; ordered so that what was made for one model and dtype serves the next cells."""
    batches = (1, 4, 16) if full else (2,)
    return [
        Case(shape, dtype, op, batch)
        for shape in ([*SHAPES, *checkpoints()] if full else [TINY])
        for dtype in (torch.float32, torch.bfloat16)
        for op in ("think", "write")
        for batch in batches
    ]
