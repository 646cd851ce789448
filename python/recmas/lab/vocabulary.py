"""Three tokenizers that have nothing in common but the strings they read.

The planner's and the critic's take a whitespace-separated word as one token; the solver's spells names in two pieces
("ba ##ko"). A fact ("bako:red") is one token for the agent whose sheet holds it. Special tokens appear only where a
text writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recmas.lab.world import ANIMALS, COLOURS, WORDS

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def tokenizer_for(role: str, marks: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of ``"planner"``, ``"critic"`` or ``"solver"``, with pad, bos, eos and unknown tokens.

    ``marks`` are the task's words besides names and facts, a token each.
    """
    if role == "planner":
        return _word_level((*marks, *WORDS, *COLOURS, *_facts(WORDS, COLOURS)))
    if role == "critic":
        return _word_level((*marks, *WORDS, *COLOURS, *ANIMALS, *_facts(COLOURS, ANIMALS)))
    if role == "solver":
        return _word_piece(marks, (*WORDS, *ANIMALS), _facts(ANIMALS, WORDS))
    raise ValueError(f"role must be planner, critic or solver, got {role!r}")


def _facts(keys: Sequence[str], values: Sequence[str]) -> list[str]:
    return [f"{key}:{value}" for key in keys for value in values]


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _word_level(words: Sequence[str]) -> PreTrainedTokenizerFast:
    vocabulary = _numbered((*SPECIAL, *words))
    return _wrapped(Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))


def _word_piece(marks: Sequence[str], names: Sequence[str], facts: Sequence[str]) -> PreTrainedTokenizerFast:
    pieces = [piece for name in names for piece in spelled(name)]
    vocabulary = _numbered((*SPECIAL, *marks, *pieces, *facts))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return _wrapped(tokenizer)


def spelled(name: str) -> tuple[str, str]:
    """A name in the solver's two pieces: words are cut after two letters, animals after three."""
    cut = 3 if name in ANIMALS else 2
    return name[:cut], "##" + name[cut:]


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
