"""Train the links of a two-agent system in three stages, save it, load it, and answer sums it was not trained on."""

from __future__ import annotations

import random
import tempfile

from tiny_models import adder, writer

from recmas import Pattern, PromptSpec, RecursiveMAS
from recmas.training import InnerConfig, OuterConfig, WarmupConfig, train_inner, train_outer, train_warmup

ROWS = [
    {"question": f"{a} + {b}", "targets": {"adder": str((a + b) % 10), "writer": str((a + b) % 10)}}
    for a in range(10)
    for b in range(10)
]


def accuracy(mas: RecursiveMAS, rows: list[dict]) -> float:
    answers = mas.answer(rows, max_new_tokens=2)
    right = [answer.text == row["targets"]["writer"] for answer, row in zip(answers, rows, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    random.Random(0).shuffle(ROWS)
    seen, unseen = ROWS[:50], ROWS[50:]
    mas = RecursiveMAS.create(
        {"adder": adder(), "writer": writer()},
        Pattern((("adder",), ("writer",))),
        prompts={"adder": PromptSpec("{{question}} ="), "writer": PromptSpec("note {{from:adder}} answer")},
        rounds=1,
        latent_steps=1,
        seed=0,
    )
    print(f"random links: {accuracy(mas, unseen):.0%} of the unseen sums")

    shared = {"batch_size": 50, "checkpoint_every": 0}
    with tempfile.TemporaryDirectory() as folder:
        logs = f"{folder}/training"  # a log and a checkpoint per link; resume=True continues from them
        train_inner(mas, seen, InnerConfig(steps=60, **shared), output=logs, progress=False)
        train_warmup(mas, seen, WarmupConfig(steps=60, **shared), output=logs, progress=False)
        train_outer(mas, seen, OuterConfig(steps=20, rounds=1, **shared), output=logs, progress=False)
        mas.save_pretrained(f"{folder}/system")
        trained = RecursiveMAS.from_pretrained(f"{folder}/system")

    reached = accuracy(trained, unseen)
    print(f"trained links: {reached:.0%}")
    assert reached > 0.9, reached


if __name__ == "__main__":
    main()
