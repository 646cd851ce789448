"""Random language models and systems of them for timing: what they say does not matter, how large they are does."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recmas import SEQUENTIAL, RecursiveMAS
from recmas.agents.agent import Agent
from recmas.config.system_json import PromptSpec
from recmas.engine.messages import Prompt
from recmas_kernels import FusedRecursiveLink, LinkConfig
from recmas_kernels.testing import make_link

HEAD_FEATURES = 64
Model = TypeVar("Model", bound=torch.nn.Module)
# The order of question and slot in the released prompts: it decides what of a prompt is the same in every round.
PROMPTS = {
    "planner": PromptSpec("{{question}} w1", "{{question}} w2 {{from:solver}} w1"),
    "critic": PromptSpec("{{question}} w3 {{from:planner}} w4"),
    "solver": PromptSpec("{{from:critic}} w5 {{question}} w6"),
}


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word ``w0``, ``w1``, ...; ``w0`` pads."""
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def cast(model: Model, dtype: torch.dtype) -> Model:
    """``model``, its parameters in ``dtype``. Buffers stay, as in a model that is loaded in ``dtype``: frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def random_agent(layers: int, features: int, vocabulary: int, seed: int = 0, accelerate: bool = False) -> Agent:
    """A frozen float32 Llama with random weights that never ends a text.

    Args:
        layers: number of decoder layers.
        features: width d; a multiple of 64. The feed-forward part is 8/3 as wide, rounded up to 64.
        vocabulary: |V|.
        seed: of the weights.
        accelerate: run it from packed weights, as the runtime does with agents that it loads.
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
    return Agent(model, word_tokenizer(vocabulary), name="random", accelerate=accelerate)


def random_prompt(agent: Agent, batch: int, length: int) -> Prompt:
    """Random tokens ``[batch, length]`` without padding, the same for every agent of one vocabulary."""
    ids = torch.randint(agent.vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(agent.device)
    return Prompt(agent.embed(ids), torch.ones_like(ids))


def released_links(features: int) -> tuple[FusedRecursiveLink, FusedRecursiveLink]:
    """An inner and an outer link of the released shapes."""
    inner = make_link(LinkConfig("inner", features, features, features, "identity"), seed=1)
    return inner, make_link(LinkConfig("outer", features, 2 * features, features, "linear"), seed=2)


def body_parameters(agent: Agent) -> int:
    """Elements of the decoder's parameters without the embedding table."""
    return sum(p.numel() for p in agent.decoder.parameters()) - agent.model.get_input_embeddings().weight.numel()


@dataclass(frozen=True)
class Setting:
    """A sequential system of three equal random agents and its questions.

    Attributes:
        layers, features, vocabulary: of each agent.
        prompt: words of each question, or of one each; a prompt holds three more at most, and the slot.
        steps: latent steps m.
        new_tokens: that the solver writes, and each agent is trained to say.
        rounds: r.
        batch: number of questions.
        ragged: questions that are shorter by 0, 1, 2, ... words, so that prompts are padded.
    """

    layers: int
    features: int
    vocabulary: int
    prompt: int
    steps: int
    new_tokens: int
    rounds: int
    batch: int
    ragged: bool = False

    @property
    def id(self) -> str:
        model = f"{self.layers}x{self.features}-V{self.vocabulary}"
        return f"cpu-{model}-t{self.prompt}-m{self.steps}-r{self.rounds}-B{self.batch}"

    @property
    def shape(self) -> str:
        model = f"3 agents of {self.layers} layers, d={self.features}, |V|={self.vocabulary}"
        return f"{model}, r={self.rounds}, m={self.steps}, B={self.batch}"

    @cached_property
    def questions(self) -> list[str]:
        return [self.words(self.prompt - (index if self.ragged else 0), index) for index in range(self.batch)]

    def words(self, count: int, seed: int) -> str:
        """A text of ``count`` random words."""
        draw = random.Random(seed)
        return " ".join(f"w{draw.randrange(10, self.vocabulary)}" for _ in range(count))

    def system(self, accelerate: bool = False) -> RecursiveMAS:
        """The system; ``accelerate`` as for `random_agent`."""
        agents = {
            role: random_agent(self.layers, self.features, self.vocabulary, seed, accelerate)
            for seed, role in enumerate(PROMPTS)
        }
        return RecursiveMAS.create(
            agents, SEQUENTIAL, prompts=PROMPTS, rounds=self.rounds, latent_steps=self.steps, seed=0
        )

    def training(self, accelerate: bool = False) -> tuple[RecursiveMAS, list[dict[str, Any]]]:
        """The system, ``w1`` ending its texts, and a row per question with a text of ``new_tokens`` for each agent."""
        system = self.system(accelerate)
        for agent in system.agents.values():
            agent.tokenizer.eos_token = "w1"
        rows = [
            {
                "question": question,
                "targets": {role: self.words(self.new_tokens, 10 * row + place) for place, role in enumerate(PROMPTS)},
            }
            for row, question in enumerate(self.questions)
        ]
        return system, rows
