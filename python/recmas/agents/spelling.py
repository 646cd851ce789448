"""How a vocabulary spells its tokens, so that two vocabularies can be compared."""

from __future__ import annotations

from recmas.agents.agent import Agent


def spelled(agent: Agent) -> dict[str, int]:
    """The id of each token by its text, spaces included; special tokens and ids without an embedding are left out."""
    special = set(agent.tokenizer.all_special_ids)
    known = ((token, number) for token, number in agent.tokenizer.get_vocab().items() if number < agent.vocabulary)
    return {
        token.replace("Ġ", " ").replace("▁", " "): number for token, number in known if number not in special
    }  # the marks that stand for a space in byte-level and in SentencePiece vocabularies
