"""A pattern of your own: two experts side by side, whose latents meet in a third agent's prompt."""

from __future__ import annotations

from tiny_models import DIGITS, adder, tiny_agent

from recmas import Pattern, PromptSpec, RecursiveMAS
from recmas.training import InnerConfig, WarmupConfig, train_inner, train_warmup


def main() -> None:
    larger = [(f"larger {a} {b} =", str(max(a, b))) for a in range(10) for b in range(10)]
    notes = [(f"note {a} {b} answer", f"{a} {b}") for a in DIGITS for b in DIGITS]
    models = {
        "adder": adder(),
        "comparer": tiny_agent("comparer", "qwen3", 32, [*DIGITS, "larger", "="], larger, steps=200),
        "writer": tiny_agent("writer", "llama", 48, [*DIGITS, "note", "answer"], notes, steps=300),
    }
    # Every agent of a stage receives from every agent of the stage before: two edges, adder->writer, comparer->writer.
    pattern = Pattern((("adder", "comparer"), ("writer",)))
    prompts = {
        "adder": PromptSpec("{{a}} + {{b}} ="),
        "comparer": PromptSpec("larger {{a}} {{b}} ="),
        "writer": PromptSpec("note {{from:adder}} {{from:comparer}} answer"),  # a slot per sender, no question
    }
    mas = RecursiveMAS.create(models, pattern, prompts=prompts, rounds=1, latent_steps=1, seed=0)
    for visit in pattern.visits(rounds=2):  # what two rounds would do: from the second on the writer sends back
        print(f"round {visit.round}: {visit.role} reads {', '.join(visit.senders) or 'its prompt alone'}")

    rows = []
    for a in range(10):
        for b in range(10):
            total, most = str((a + b) % 10), str(max(a, b))
            targets = {"adder": total, "comparer": most, "writer": f"{total} {most}"}
            rows.append({"a": a, "b": b, "targets": targets})
    train_inner(mas, rows, InnerConfig(steps=80, batch_size=50), progress=False)
    train_warmup(mas, rows, WarmupConfig(steps=80, batch_size=50), progress=False)

    answers = mas.answer(rows, max_new_tokens=3)
    right = sum(answer.text == row["targets"]["writer"] for answer, row in zip(answers, rows, strict=True))
    print(f"{right} of {len(rows)} pairs right; 7 and 8 give {answers[78].text!r}")
    assert right > 90, right


if __name__ == "__main__":
    main()
