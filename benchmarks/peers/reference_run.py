"""The reference implementation's sequential run, as an algorithm: what a whole run of ours is measured against.

Agents take turns as in ours. Each visit loads its model, tokenizer and links from disk; builds every sample's prompt
on its own (pieces between slots tokenised and embedded one by one, concatenated, padded with zeros on the left); thinks
by `reference_rollout`; puts all m states through the inner link once more and through the outer one; and hands the
latents on as a list of one CPU tensor per sample. The last visit writes text with transformers' own `generate`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.reference_rollout import reference_rollout
from recmas.config.system_json import PromptSpec
from recmas_kernels import RecursiveLink

SLOT = re.compile(r"\{\{from:\w+\}\}")


@dataclass
class Stage:
    """What one visit needs; the links only where the agent sends."""

    model: Any
    tokenizer: Any
    inner: RecursiveLink | None
    outer: RecursiveLink | None


@dataclass
class ReferenceRun:
    """What a run did.

    Attributes:
        latents: of every visit but the last, through the inner link, ``[B, m, d]``.
        tokens: ids ``[B, new tokens]`` that the last agent wrote.
        logits: ``[B, new tokens, vocabulary]`` that each was the largest of.
        loading: seconds spent in loading.
    """

    latents: list[Tensor] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    loading: float = 0.0


@torch.no_grad()
def reference_run(
    folder: Path,
    prompts: Mapping[str, PromptSpec],
    questions: Sequence[str],
    rounds: int,
    steps: int,
    new_tokens: int,
) -> ReferenceRun:
    """Answer a batch of questions.

    Args:
        folder: a saved system of ours, whose agents and links both sides share.
        prompts: templates with ``{{question}}`` and at most one slot, by role in the order of the sequence.
        questions: one per sample.
        rounds: r.
        steps: latent steps m >= 1.
        new_tokens: that the last agent writes.
    """
    roles, run, received = list(prompts), ReferenceRun(), list[Tensor]()
    for visit in range(rounds * len(roles)):
        role, receiver = roles[visit % len(roles)], roles[(visit + 1) % len(roles)]
        final = visit == rounds * len(roles) - 1
        start = perf_counter()
        stage = _load(folder, role, None if final else receiver)
        run.loading += perf_counter() - start
        template = prompts[role].at(visit // len(roles) + 1)
        embeds, mask = _pad([_prompt(stage, template, text, received, index) for index, text in enumerate(questions)])
        if final:
            written = stage.model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            run.tokens, run.logits = written.sequences, torch.stack(written.logits, dim=1)
        else:
            assert stage.inner is not None
            assert stage.outer is not None
            latents = stage.inner(reference_rollout(stage.model, stage.inner, embeds, mask, steps))
            run.latents.append(latents)
            received = [row.detach().cpu() for row in stage.outer(latents)]
        del stage
        gc.collect()
    return run


def _load(folder: Path, role: str, receiver: str | None) -> Stage:
    agent = folder / "agents" / role
    model, tokenizer = AutoModelForCausalLM.from_pretrained(agent), AutoTokenizer.from_pretrained(agent)
    if receiver is None:
        return Stage(model, tokenizer, None, None)
    links = (folder / "links" / name for name in (role, f"{role}-{receiver}"))
    return Stage(model, tokenizer, *(RecursiveLink.from_pretrained(link) for link in links))


def _prompt(stage: Stage, template: str, question: str, received: Sequence[Tensor], index: int) -> Tensor:
    """Input embeddings ``[T, d]`` of one sample."""
    embed = stage.model.get_input_embeddings()
    pieces = []
    for part, text in enumerate(SLOT.split(template.replace("{{question}}", question))):
        if part > 0:
            pieces.append(received[index].to(embed.weight))
        ids = stage.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces.append(embed(torch.tensor(ids, dtype=torch.int64)))
    return torch.cat(pieces)


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows ``[T_i, d]`` as one batch ``[B, T, d]`` with zeros on the left, and its mask."""
    width = max(len(row) for row in rows)
    padded = [torch.cat([row.new_zeros(width - len(row), row.shape[1]), row]) for row in rows]
    masks = [torch.cat([torch.zeros(width - len(row)), torch.ones(len(row))]).long() for row in rows]
    return torch.stack(padded), torch.stack(masks)
