"""An agent's own steps: frozen linear layers from packed weights against the library's, `think` and `write`.

Weights are random values of 16 bits, as checkpoints hold them; a float32 agent is such a checkpoint loaded as float32.
The time of a cell is that of its steps alone, on a prompt that has been read: the floor is the bytes of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.bench import Bench
from benchmarks.harness.floors import Work
from benchmarks.harness.goals import Goal
from benchmarks.harness.models import random_prompt, word_tokenizer
from benchmarks.harness.names import EAGER_FLOAT32, FUSED
from benchmarks.harness.record import Labels
from benchmarks.harness.time_bound import TimeBound
from recmas.agents.agent import Agent
from recmas.engine.prefill import prefill_all
from recmas_kernels import LinkConfig, packed
from recmas_kernels.backends import cpu
from recmas_kernels.testing import make_link, relative_error

EQUAL = 1e-4  # of the largest entry: float32 sums in two orders, through all layers
SLACK = 4  # times eager's own error in bfloat16
PROMPT, STEPS = 32, 8
BOUND = TimeBound(all_seconds=60)


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
            return LlamaForCausalLM(config).bfloat16().float()


SHAPES = [
    Shape("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151_936),
    Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 49_152),
]
TINY = Shape("tiny", 2, 64, 192, 2, 1, 512)


@dataclass(frozen=True)
class Case:
    shape: Shape
    dtype: torch.dtype
    op: str
    batch: int

    @property
    def id(self) -> str:
        return f"cpu-{self.shape.name}-{str(self.dtype).removeprefix('torch.')}-{self.op}-B{self.batch}"


def cases(full: bool) -> list[Case]:
    batches = (1, 4, 16) if full else (2,)
    return [
        Case(shape, dtype, op, batch)
        for shape in (SHAPES if full else [TINY])
        for dtype in (torch.float32, torch.bfloat16)
        for op in ("think", "write")
        for batch in batches
    ]


_agents: dict[tuple[str, torch.dtype, bool], Agent] = {}


def agent_of(shape: Shape, dtype: torch.dtype, accelerate: bool) -> Agent:
    """Made once; those of the shape before are dropped first."""
    for key in [key for key in _agents if key[0] != shape.name]:
        del _agents[key]
    key = (shape.name, dtype, accelerate)
    if key not in _agents:
        model = shape.model().to(dtype)
        _agents[key] = Agent(model, word_tokenizer(shape.vocabulary), name=shape.name, accelerate=accelerate)
    return _agents[key]


class Steps:
    """`STEPS` steps of one agent on a prompt of `PROMPT` tokens in `batch` rows, which is read here."""

    def __init__(self, agent: Agent, case: Case) -> None:
        self.agent, self.link = agent, make_link(_inner(case))
        self.past, self.hidden = prefill_all(agent.decoder, random_prompt(agent, case.batch, PROMPT), STEPS * 400)
        self.write = case.op == "write"

    def __call__(self) -> Tensor:
        """Final-norm hidden states of the last step; the cache grows from call to call."""
        hidden = self.hidden
        for _ in range(STEPS):
            if self.write:
                token = self.agent.logits(hidden).argmax(dim=-1)
                fed = self.agent.embed(token)
            else:
                fed = self.link(hidden.to(self.link.proj1.weight.dtype)).to(hidden.dtype)
            hidden = self.past.feed(fed[:, None])
        return hidden


def _inner(case: Case) -> LinkConfig:
    features = case.shape.features
    return LinkConfig("inner", features, features, features, "identity")


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@torch.no_grad()
def test_frozen_steps(case: Case, bench: Bench) -> None:
    wanted = {
        FUSED: (case.dtype, True),
        "eager": (case.dtype, False),
        EAGER_FLOAT32: (torch.float32, False),
    }
    if case.dtype is torch.float32:
        del wanted[EAGER_FLOAT32]
    agents = {name: agent_of(case.shape, *how) for name, how in wanted.items()}
    variants = {name: Steps(agent, case) for name, agent in agents.items()}
    truth = variants["eager" if case.dtype is torch.float32 else EAGER_FLOAT32]
    exact = truth.hidden.double()
    errors = {name: relative_error(steps.hidden, exact) for name, steps in variants.items()}
    bound = EQUAL if case.dtype is torch.float32 else SLACK * errors["eager"]
    assert errors[FUSED] <= bound, f"hidden states differ by {errors[FUSED]:.1e}, allowed are {bound:.1e}"

    accelerated = agents[FUSED].accelerated
    assert accelerated is not None
    head = case.shape.vocabulary * case.shape.features * 2
    weights = accelerated.packed_bytes - (0 if case.op == "write" else head)
    elements = accelerated.elements - (0 if case.op == "write" else head // 2)
    work = Work(2 * case.batch * elements, weights, weights) * STEPS
    shape = f"{case.shape.name}, {STEPS} steps after {PROMPT} tokens"
    labels = Labels("frozen", case.op, shape, case.dtype, "forward", case.batch)
    with packed(*(steps.link for steps in variants.values())):
        bench.run(labels, variants, work, errors, _goal(case), rounds=5, twice=None, bound=BOUND, weighed=())


def _goal(case: Case) -> Goal:
    """Where the library is at its best, 1.5 times it; on AVX2 alone 2.5 times, and bfloat16 4 times eager float32."""
    if cpu.instruction_set()[0] != "avx2":
        return Goal(1.5 if case.dtype is torch.float32 else 1.0)
    return Goal(2.5) if case.dtype is torch.float32 else Goal(4.0, peer=EAGER_FLOAT32)
