"""When a text counts as the expected answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def _exact(text: str, expected: str) -> bool:
    """Equal, but for white space at the ends; case and punctuation count."""
    return text.strip() == expected.strip()


def _last_word(text: str, expected: str) -> bool:
    """The last words (what white space separates) are equal; case and punctuation count: "Paris." is not "Paris"."""
    return text.split()[-1:] == expected.split()[-1:]


def _begins(text: str, expected: str) -> bool:
    """The text begins with the expected one, and no letter or digit follows; case does not count."""
    said, wanted = text.strip().casefold(), expected.strip().casefold()
    return said.startswith(wanted) and not said[len(wanted) : len(wanted) + 1].isalnum()


def _choice(text: str, expected: str) -> bool:
    """The chosen letter: the last boxed one, else the last after "answer", else the last that stands alone."""
    for pattern in (r"\\boxed\{\W*([A-Z])\b", r"(?i:answer)(?i:\s+is)?\W*([A-Z])\b", r"\b([A-Z])\b(?!')"):
        if found := re.findall(pattern, text):
            return bool(found[-1] == expected.strip().strip("()."))
    return False


def _math(text: str, expected: str) -> bool:
    """Mathematically equal, by math-verify; of an answer with its reasoning before "####" only what follows counts."""
    parse, verify = _math_verify()
    answer = expected.rpartition("####")[2].strip()
    gold = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
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
    "begins": _begins,
    "choice": _choice,
    "math": _math,
}
"""By name, whether a text counts as the expected answer.

- exact: equal, but for white space at the ends.
- last_word: the last words, separated by white space, are equal.
- begins: it begins with the expected text, and no letter or digit follows; case does not count. For completions, which
  go on after the answer.
- choice: the letter that was chosen is the expected one.
- math: mathematically equal, by math-verify (the [eval] extra).

Case and punctuation count in exact and last_word: "Paris." is not "Paris".
"""


def check_metric(metric: str) -> None:
    """Raise ValueError for an unknown metric, ImportError for one whose library is missing."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if metric == "math":
        _math_verify()
