"""`docs/models.md`, drawn from what was examined."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers

from recmas.agents.checking import WITHOUT
from tests.runtime.families.matrix import CAUSAL, TYPES, VISION, Result
from tests.runtime.families.tiny_configs import VARIANTS

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_ROW = re.compile(r"^\| `(?P<type>[^`]+)` \| (?P<row>.+) \|$", re.MULTILINE)

_TEXT = """# Models

Drawn by `python -m tests.runtime.families --write` under transformers {version}; the test suite compares it with what
it examines.

Any causal language model of transformers can be an agent if it proves that it works as one. No list of names decides.
When an agent is made, a dozen tokens run through its model; a model that fails one of these proofs is refused, in one
line that names it:

- **embeddings**: token ids and their input embeddings give the same hidden states, as wide as the embeddings are.
- **causality**: a later token changes no earlier state.
- **logits**: the model's own forward, run from its hidden states on, gives its own logits. So factors, caps and
  transforms are the model's, and are never guessed.

Everything else that the runtime uses is proved when it is first needed, on the model's first layers in float32, against
the model's plain forward. What a model does not prove is off for it. The answers are the same:

{without}

A difference counts where it exceeds what rounding explains. That is measured: how far the states move when every input
embedding moves by one unit in the last place, times a factor for the number of layers (`recmas.engine.probe`). Proofs
hold for all models of one configuration, dtype, kind of attention and kind of device; they are made once per process.

`recmas check MODEL` runs them all on a model of yours, with the numbers, and exits with 2 if it is refused.
`Answers.reading` and `recmas inspect SYSTEM` say what is off.

Some types need a word:

- LongRoPE changes its frequencies where a row passes a length. Rows on different sides run apart, and a row that passes
  is read again, so that each has the frequencies of its own length.
- Gemma 3n and Gemma 4 look up an embedding per layer for every token. Tokens are known by their embeddings; a latent
  has none and gets the padding token's, as the soft tokens of these models' images do.
- A checkpoint of text and images is an agent through its text part.
- A checkpoint of an encoder and a decoder is refused when it is loaded; the rows of such types below are of their
  decoders alone.
- GGUF files (`FILE.gguf`, or `HUB-ID:FILE.gguf`) are read by transformers, with the `gguf` extra.

## What holds for which type

One tiny random model of every type was saved, loaded, and compared with its own plain forward, row by row: rollouts of
ragged batches, decoding with and without tool replies, prefix reuse, fixed shapes, teacher forcing, a whole system,
outer training in both modes, and the memory table. {counts}

| type | what holds |
|---|---|
{causal}

## Types of text and images

| type | what holds |
|---|---|
{vision}

## Settings

Types whose settings make another computation of them.

| type | what holds |
|---|---|
{variants}
"""


def draw(results: Mapping[str, Result]) -> str:
    """The page."""
    verdicts = Counter(results[name].verdict for name in TYPES)
    told = {
        "right": "right with everything",
        "right, features off": "right with features off",
        "refused": "refused by a named proof",
        "not built": "not examined, because transformers makes no tiny model of them here",
        "wrong": "wrong",
    }
    counts = [f"{verdicts[verdict]} are {words}" for verdict, words in told.items() if verdicts[verdict]]
    return _TEXT.format(
        version=transformers.__version__,
        without="\n".join(f"- without **{feature}**, {text}." for feature, text in WITHOUT.items()),
        counts=f"Of {len(TYPES)} types, " + ", ".join(counts) + ".",
        causal=_rows([results[name] for name in CAUSAL if name in results]),
        vision=_rows([results[name] for name in VISION if name in results]),
        variants=_rows([results[name] for name in VARIANTS if name in results]),
    )


def written() -> dict[str, str]:
    """By type, what the page says now."""
    return {found["type"]: found["row"] for found in _ROW.finditer(PAGE.read_text(encoding="utf-8"))}


def version() -> str:
    """Of the transformers that the page was drawn under."""
    found = re.search(r"under transformers (\S+);", PAGE.read_text(encoding="utf-8"))
    assert found is not None
    return found.group(1)


def cell(result: Result) -> str:
    """The row of a result, as a table cell."""
    return result.row.replace("|", "\\|")


def _rows(results: Sequence[Result]) -> str:
    return "\n".join(f"| `{result.model_type}` | {cell(result)} |" for result in results)
