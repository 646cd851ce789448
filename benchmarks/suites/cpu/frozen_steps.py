"""Who takes an agent's steps: our runtime on packed or plain layers, compiled code, llama.cpp.

Each has read a prompt of `PROMPT` tokens in B rows. ``after(tokens)`` feeds one token per row and gives what a cell
compares, hidden states ``[B, d]`` (think) or logits ``[B, V]`` (write). A call takes `STEPS` steps; caches grow from
call to call.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.harness.checkpoints import Checkpoint
from benchmarks.harness.models import cast, word_tokenizer
from benchmarks.harness.time_bound import TimeBound, Unmeasured
from benchmarks.peers.compiled_steps import CompiledSteps
from benchmarks.peers.llama import LlamaSequences
from benchmarks.suites.cpu.frozen_cases import COLUMNS, PROMPT, STEPS, Case, Shape
from recmas.agents.agent import Agent
from recmas.agents.sampling import choose
from recmas.engine.messages import Prompt
from recmas.engine.prefill import prefill_all
from recmas_kernels import LinkConfig
from recmas_kernels.testing import make_link

COMPILE_BOUND = TimeBound(call_seconds=180)


def prompt_tokens(case: Case) -> Tensor:
    """Random tokens ``[B, PROMPT]``."""
    return torch.randint(case.shape.vocabulary, (case.batch, PROMPT), generator=torch.Generator().manual_seed(0))


class Steps:
    """The runtime's own steps with one agent."""

    def __init__(self, agent: Agent, case: Case) -> None:
        features = case.shape.features
        self.agent, self.writes = agent, case.writes
        self.link = make_link(LinkConfig("inner", features, features, features, "identity"))
        tokens = prompt_tokens(case)
        prompt = Prompt(agent.embed(tokens), torch.ones_like(tokens))
        self.past, self.hidden = prefill_all(agent.decoder, prompt, COLUMNS - PROMPT)
        self.feed, self.logits = self.past.feed, agent.logits

    def after(self, tokens: Tensor) -> Tensor:
        self.hidden = self.feed(self.agent.embed(tokens)[:, None])
        return self.logits(self.hidden) if self.writes else self.hidden

    def __call__(self) -> None:
        for _ in range(STEPS):
            if self.writes:
                fed = self.agent.embed(choose(self.logits(self.hidden)))
            else:
                fed = self.link(self.hidden.to(self.link.proj1.weight.dtype)).to(self.hidden.dtype)
            self.hidden = self.feed(fed[:, None])


class Llama:
    """llama.cpp's steps. Thinking, it feeds hidden states back as they are: no link, a hundredth less to do."""

    def __init__(self, sequences: LlamaSequences, agent: Agent, case: Case) -> None:
        self._sequences, self._agent, self._writes = sequences, agent, case.writes
        self._feed(prompt_tokens(case))

    def after(self, tokens: Tensor) -> Tensor:
        return self._feed(tokens[:, None])

    def __call__(self) -> None:
        self._sequences.steps(STEPS)

    def _feed(self, tokens: Tensor) -> Tensor:
        return self._sequences.feed(tokens if self._writes else self._agent.embed(tokens))


class Made:
    """What is made once and serves several cells of one model; `of` drops what was made for another."""

    def __init__(self) -> None:
        self._shape: Shape | Checkpoint | None = None
        self._agents: dict[tuple[torch.dtype, bool], Agent] = {}
        self._compiled: dict[tuple[torch.dtype, int], CompiledSteps | Unmeasured] = {}
        self._files: dict[tuple[torch.dtype, bool], Path] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def of(self, shape: Shape | Checkpoint) -> Made:
        if shape != self._shape:
            self.close()
            self._shape = shape
        return self

    def close(self) -> None:
        """Drop everything."""
        if self._compiled:
            torch._dynamo.reset()
        for held in (self._agents, self._compiled, self._files):
            held.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._shape = None

    def agent(self, dtype: torch.dtype, accelerate: bool) -> Agent:
        if (dtype, accelerate) not in self._agents:
            assert self._shape is not None
            self._agents[dtype, accelerate] = Agent(
                cast(self._shape.model(), dtype),
                word_tokenizer(self._shape.vocabulary),
                name=self._shape.name,
                accelerate=accelerate,
            )
        return self._agents[dtype, accelerate]

    def compiled(self, case: Case) -> Steps | Unmeasured:
        """Steps of compiled code, or why there are none: compiling this, or fewer rows, took longer than its bound."""
        steps = Steps(self.agent(case.dtype, False), case)
        late = [
            found
            for (dtype, _), found in self._compiled.items()
            if dtype is case.dtype and isinstance(found, Unmeasured)
        ]
        if late:
            return late[0]
        key = (case.dtype, case.batch)
        if key not in self._compiled:
            made: list[CompiledSteps] = []
            seconds = COMPILE_BOUND.seconds_of(lambda: made.append(CompiledSteps(steps.agent, steps.past, COLUMNS)))
            over = COMPILE_BOUND.over(seconds, f", compiling for {case.batch} rows: it took {seconds:.0f} s")
            self._compiled[key] = made[0] if over is None else Unmeasured(over.reason)
        found = self._compiled[key]
        if isinstance(found, Unmeasured):
            return found
        found.load(steps.past)
        steps.feed, steps.logits = found.feed, found.logits
        return steps

    def file(self, case: Case) -> Path:
        """The model as a GGUF file, without its head where nothing is written."""
        from benchmarks.peers.gguf_file import write_gguf  # needs the gguf package, as nothing else here does

        key = (case.dtype, case.writes)
        if key not in self._files:
            self._folder = self._folder or TemporaryDirectory(prefix="recmas-bench-")
            path = Path(self._folder.name, f"{len(self._files)}.gguf")
            write_gguf(self.agent(case.dtype, False).model, path, case.dtype, head=case.writes)
            os.sync()  # or the disk is still busy while calls are timed
            self._files[key] = path
        return self._files[key]
