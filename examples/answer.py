"""Answer questions with the shipped three-agent system: latents against text, and one answer as it is written."""

from __future__ import annotations

import json
from pathlib import Path

from recmas import RecursiveMAS

RELAY = Path(__file__).parent / "relay"


def main() -> None:
    rows = [json.loads(line) for line in (RELAY / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    mas = RecursiveMAS.from_pretrained(RELAY)  # device="cuda", or a device by role, where there is one

    # A question of k hops goes k times through all three agents, so with fewer rounds the answer is a guess.
    for rounds in (1, 2, 3):
        for mode in ("latent", "text"):
            answers = mas.answer(rows, mode=mode, rounds=rounds)
            right = sum(answer.text.split()[-1:] == [row["answer"]] for answer, row in zip(answers, rows, strict=True))
            seconds = sum(answers.seconds.values())
            print(f"rounds {rounds}, {mode:6}: {right} of {len(rows)} right in {seconds:.1f} s")
            if rounds == 3:
                assert right > 0.9 * len(rows), (mode, right)

    first = answers[0]
    print(f"question {rows[0]['question']!r}: {first.text!r}, text tokens by role {first.text_tokens}")

    print("streamed:", end=" ")
    for piece in mas.stream(rows[0], rounds=3):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
