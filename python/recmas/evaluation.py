"""Accuracy of a system on rows with known answers: one record per question, and a summary with its uncertainty.

With an output file each batch's records are appended as JSON lines as soon as they exist. Calling again with the same
arguments answers only what is missing; records of another system, other settings or other rows are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from recmas.spec import edge_name

if TYPE_CHECKING:
    from recmas.system import RecursiveMAS

Row = Mapping[str, object]
Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Record:
    """One answered question.

    Attributes:
        index: of the question's row.
        key: digest of the row, the settings and the system's links.
        text: what the last agent wrote; ``expected``: the row's answer; ``correct``: the metric's verdict.
        text_tokens: tokens of text written for it by all agents; ``latent_steps``: latent steps of all agents.
        seconds: the batch's time divided by its questions.
    """

    index: int
    key: str
    text: str
    expected: str
    correct: bool
    text_tokens: int
    latent_steps: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Over all questions; ``low`` and ``high`` bound the accuracy by Wilson's 95 % interval, the rest are means."""

    questions: int
    correct: int
    accuracy: float
    low: float
    high: float
    text_tokens: float
    latent_steps: float
    seconds: float


class Evaluation(NamedTuple):
    records: list[Record]
    summary: Summary


def wilson(correct: int, questions: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion; (0, 1) for no questions."""
    if questions == 0:
        return 0.0, 1.0
    share, z2 = correct / questions, Z95 * Z95
    centre = (share + z2 / (2 * questions)) / (1 + z2 / questions)
    half = Z95 / (1 + z2 / questions) * math.sqrt(share * (1 - share) / questions + z2 / (4 * questions**2))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))  # rounding never excludes the share


def summarize(records: Sequence[Record]) -> Summary:
    """The summary of records of any number of questions."""
    count, correct = len(records), sum(record.correct for record in records)

    def mean(name: str) -> float:
        return sum(getattr(record, name) for record in records) / count if count else 0.0

    low, high = wilson(correct, count)
    accuracy = correct / count if count else 0.0
    return Summary(count, correct, accuracy, low, high, mean("text_tokens"), mean("latent_steps"), mean("seconds"))


def _exact(text: str, expected: str) -> bool:
    """Equal but for white space at the ends."""
    return text.strip() == expected.strip()


def _last_word(text: str, expected: str) -> bool:
    """The last words, white space between them, are equal."""
    return text.split()[-1:] == expected.split()[-1:]


def _choice(text: str, expected: str) -> bool:
    """The chosen letter: the last boxed one, else the last after "answer", else the last that stands alone."""
    for pattern in (r"\\boxed\{\W*([A-Z])\b", r"(?i:answer)(?i:\s+is)?\W*([A-Z])\b", r"\b([A-Z])\b(?!')"):
        if found := re.findall(pattern, text):
            return bool(found[-1] == expected.strip().strip("()."))
    return False


def _math(text: str, expected: str) -> bool:
    """Mathematically equal, by math-verify."""
    parse, verify = _math_verify()
    gold = expected if "$" in expected or "\\boxed" in expected else f"${expected}$"
    return bool(verify(parse(gold), parse(text)))


def _math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ImportError("metric 'math' needs math-verify: pip install 'recmas-kernels[eval]'") from None
    return parse, verify


METRICS: dict[str, Callable[[str, str], bool]] = {
    "exact": _exact,
    "last_word": _last_word,
    "choice": _choice,
    "math": _math,
}


def evaluate(
    system: RecursiveMAS,
    rows: Sequence[Row],
    *,
    metric: str = "exact",
    answer_field: str = "answer",
    mode: str = "latent",
    rounds: int | None = None,
    latent_steps: int | Mapping[str, int] | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Answer every row and compare with its answer.

    Args:
        system: what answers.
        rows: questions with the fields its templates name, and the answer.
        metric: "exact" (whole text), "last_word", "choice" (a letter) or "math" (needs the [eval] extra).
        answer_field: field of the row that holds the answer.
        mode, rounds, latent_steps, max_new_tokens, temperature, top_p: as `RecursiveMAS.answer` takes them; each batch
            draws from ``seed`` and the number of its first question.
        seed: of sampling.
        batch_size: questions answered together.
        output: JSONL file of records, written batch by batch; None keeps them in memory only.
        progress: show a bar.

    Returns:
        Records in the order of rows, and their summary.

    Raises:
        ValueError: unknown metric, no rows, a row without an answer, or an output file of another run (names the line).
        ImportError: the metric's library is missing.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not rows:
        raise ValueError("rows: expected at least one question, got none")
    if metric == "math":
        _math_verify()
    expected = [_expected(row, index, answer_field) for index, row in enumerate(rows)]
    options: dict[str, Any] = {
        "mode": mode,
        "rounds": rounds,
        "latent_steps": latent_steps,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    run = [_digest(system), metric, answer_field, seed, batch_size, options]
    keys = [
        hashlib.sha256(json.dumps([run, row], sort_keys=True, default=str).encode()).hexdigest()[:16] for row in rows
    ]
    path = None if output is None else Path(output)
    done = {} if path is None else _recorded(path, keys)
    bar = tqdm(total=len(rows), initial=len(done), desc="evaluate", disable=not progress, unit="question")
    with bar:
        for first in range(0, len(rows), batch_size):
            batch = range(first, min(first + batch_size, len(rows)))
            missing = [index for index in batch if index not in done]
            if not missing:
                continue
            asked = [rows[index] for index in batch]
            answers = system.answer(asked, seed=seed + first, batch_size=batch_size, **options)
            seconds = sum(answers.seconds.values()) / len(batch)
            made = []
            for index in missing:
                answer = answers[index - first]
                correct = METRICS[metric](answer.text, expected[index])
                tokens, steps = sum(answer.text_tokens.values()), sum(answer.latent_steps.values())
                made.append(Record(index, keys[index], answer.text, expected[index], correct, tokens, steps, seconds))
            if path is not None:
                _append(path, made)
            done.update({record.index: record for record in made})
            bar.update(len(made))
    records = [done[index] for index in range(len(rows))]
    return Evaluation(records, summarize(records))


def _expected(row: Row, index: int, field: str) -> str:
    if not isinstance(row, Mapping) or field not in row:
        raise ValueError(f"row {index}: no field {field!r} with the answer")
    return str(row[field])


def _digest(system: RecursiveMAS) -> str:
    """Of what decides a system's answers, the agents' weights apart: prompts, where agents came from, all links."""
    digest = hashlib.sha256(repr(system.pattern).encode())
    for role, agent in system.agents.items():
        digest.update(repr((role, agent.source, agent.dtype, system.settings[role], system.defaults)).encode())
    tensors: dict[str, torch.Tensor] = {edge_name(edge): score for edge, score in system.edge_scores.items()}
    links = {**system.inner_links, **{edge_name(edge): link for edge, link in system.outer_links.items()}}
    for name, link in links.items():
        tensors.update({f"{name}.{key}": value for key, value in link.state_dict().items()})
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _recorded(path: Path, keys: Sequence[str]) -> dict[int, Record]:
    """Records of an earlier call, by index; a last line that was cut short is removed from the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    done: dict[int, Record] = {}
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: not a record of an evaluation") from None
        if not 0 <= record.index < len(keys) or record.key != keys[record.index]:
            raise ValueError(
                f"{path}, line {number}: of another system, other settings or other rows; use another file"
            )
        done[record.index] = record
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return done


def _append(path: Path, records: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
