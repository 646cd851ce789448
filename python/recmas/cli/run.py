"""``recmas run``: answer questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recmas.cli.common import add_answering, add_system, answering, dump, loaded, read_questions, write_lines
from recmas.cli.parser import CommandLineParser

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.running import Answers


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    parser.add_argument(
        "--questions",
        type=str,
        default=None,
        help="JSONL file: an object per line with the fields that the system's prompts name",
    )
    parser.add_argument("--question", type=str, default=None, help="a single question instead")
    add_answering(parser)
    parser.add_argument("--output", type=str, default=None, help="write answers here, a JSON object per line")


def execute(options: Namespace) -> int:
    rows = read_questions(options)
    with loaded(options) as mas:
        from tqdm.auto import tqdm

        rounds = mas.defaults.rounds if options.rounds is None else options.rounds
        visits = len(list(mas.pattern.visits(rounds)))
        with tqdm(total=len(rows) * visits, desc="run", unit="visit", delay=1, leave=False) as bar:
            answers = mas.answer(rows, progress=bar.update, **answering(options))
    records = [record(row, answers, index) for index, row in enumerate(rows)]
    if options.output is not None:
        write_lines(options.output, records)
    if options.json:
        dump({"answers": records, "seconds": dict(answers.seconds)})
    elif options.output is None:
        for index, answer in enumerate(answers):
            print(f"{index}: {answer.text}")
    if not options.json:
        steps = sum(sum(answer.latent_steps.values()) for answer in answers)
        tokens = sum(sum(answer.text_tokens.values()) for answer in answers)
        seconds = sum(answers.seconds.values())
        print(f"{len(answers)} answers, {steps} latent steps, {tokens} text tokens, {seconds:.2f} s")
    return 0


def record(row: dict[str, object], answers: Answers, index: int) -> dict[str, Any]:
    """One answer as JSON."""
    answer = answers[index]
    return {
        "index": index,
        "question": row.get("question"),
        "text": answer.text,
        "tokens": answer.tokens,
        "latent_steps": answer.latent_steps,
        "text_tokens": answer.text_tokens,
    }
