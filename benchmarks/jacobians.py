"""``python -m benchmarks.jacobians RECORD``: Theorem 4.1 of arXiv 2604.25917, by random channels.

It says of gradients through a round that

- the Jacobian ``W_in (diag p - p p^T) W_out`` of a text channel ``W_in softmax(W_out h)`` has a norm of O(p's entropy),
- the norm of the Jacobian ``I + W2 diag(gelu'(W1 h)) W1`` of a link differs from 1 by O(sqrt(log(1/delta) / d)), with
  probability 1 - delta.

Both are drawn at random: matrices of the text channel with rows of unit length in the mean, and ``h`` as long as an
entropy demands; weights of the link as `torch.nn.Linear` draws them (Kaiming's uniform). Norms are the largest singular
value, and the gain ``|J v| / |v|`` of a random direction. Neither LayerNorms nor frozen models are in it, as in the
theorem. All in float64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.machine import origin
from recmas.files import write_atomically

WIDTHS = (64, 128, 256, 512)
VOCABULARY = 2048
ENTROPIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats
TEXT_DRAWS, LINK_DRAWS = 8, 100


def text_norm(width: int, entropy: float, vocabulary: int, made: torch.Generator) -> float:
    """The largest singular value of a text channel's Jacobian where its output has this entropy."""
    read, write = (torch.randn(vocabulary, width, generator=made, dtype=torch.float64) / width**0.5 for _ in range(2))
    logits = write @ torch.randn(width, generator=made, dtype=torch.float64)
    low, high = 0.0, 1e4  # the longer h is, the lower the entropy
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy((middle * logits).softmax(0)) > entropy else (low, middle)
    p = (high * logits).softmax(0)
    jacobian = (read.T * p) @ write - torch.outer(read.T @ p, p @ write)
    return largest(jacobian)


def largest(matrix: Tensor) -> float:
    """The largest singular value, by the eigenvalues of the square: a fifth of the time of all singular values."""
    return float(torch.linalg.eigvalsh(matrix.T @ matrix)[-1].sqrt())


def _entropy(p: Tensor) -> float:
    return float(torch.special.entr(p).sum())


def link_gains(width: int, made: torch.Generator) -> tuple[float, float]:
    """Of a link's Jacobian: its largest singular value, and the gain of a random direction."""
    first, second = (
        (torch.rand(width, width, generator=made, dtype=torch.float64) * 2 - 1) / width**0.5 for _ in range(2)
    )
    h, v = torch.randn(2, width, generator=made, dtype=torch.float64)
    inner = (first @ h).requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.gelu(inner).sum(), inner)
    jacobian = torch.eye(width, dtype=torch.float64) + second @ (slope[:, None] * first)
    return largest(jacobian), float((jacobian @ v).norm() / v.norm())


def measure(widths: Sequence[int], vocabulary: int, text_draws: int, link_draws: int) -> dict[str, Any]:
    """The record: all norms of the text channels, and of the links both norms."""
    made = torch.Generator().manual_seed(0)
    text = [
        {
            "d": width,
            "entropy": entropy,
            "norms": [text_norm(width, entropy, vocabulary, made) for _ in range(text_draws)],
        }
        for width in widths
        for entropy in ENTROPIES
    ]
    links = []
    for width in widths:
        norms, gains = zip(*(link_gains(width, made) for _ in range(link_draws)), strict=True)
        links.append({"d": width, "norms": norms, "gains": gains})
    return {"made": origin(), "vocabulary": vocabulary, "text": text, "links": links}


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 1 or given[0].startswith("-"):
        print("usage: python -m benchmarks.jacobians RECORD", file=sys.stderr)
        return 2
    record = measure(WIDTHS, VOCABULARY, TEXT_DRAWS, LINK_DRAWS)
    write_atomically(Path(given[0]), json.dumps(record, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
