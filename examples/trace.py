"""Look at what agents pass on: every handoff of one question, with the receiver's word nearest to each latent."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from recmas import Agent, RecursiveMAS

RELAY = Path(__file__).parent / "relay"


def nearest_words(vectors: torch.Tensor, agent: Agent) -> str:
    """The agent's tokens whose input embeddings have the largest cosine with each of `vectors` ``[m, d]``."""
    table = agent.embed(torch.arange(len(agent.tokenizer))[None])[0]
    closest = F.normalize(vectors, dim=-1) @ F.normalize(table, dim=-1).T
    return " ".join(agent.tokenizer.convert_ids_to_tokens(closest.argmax(dim=-1).tolist()))


@torch.no_grad()
def main() -> None:
    rows = [json.loads(line) for line in (RELAY / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    row = next(row for row in rows if row["hops"] == 3)
    mas = RecursiveMAS.from_pretrained(RELAY)

    (answer,) = mas.answer([row], rounds=3, trace=True)
    print(f"question {row['question']!r}, expected {row['answer']!r}")
    for handoff in answer.handoffs:
        latents = handoff.latents  # [latent steps, features of the sender], already through its inner link
        written = mas.outer_links[handoff.source, handoff.target](latents)  # what the receiver reads in its slot
        words = nearest_words(written, mas.agents[handoff.target])
        print(f"round {handoff.round}: {handoff.source:>7} -> {handoff.target:7} {tuple(latents.shape)}  {words}")
    print(f"answer {answer.text!r} after {answer.latent_steps} latent steps")
    assert len(answer.handoffs) == 8  # three agents, three rounds, and the last message is the answer
    assert answer.text.split()[-1] == row["answer"]


if __name__ == "__main__":
    main()
