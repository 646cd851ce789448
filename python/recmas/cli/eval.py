"""``recmas eval``: accuracy on questions with known answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from recmas.cli.common import add_answering, add_system, answering, dump, loaded
from recmas.cli.parser import CommandLineParser

if TYPE_CHECKING:
    from jsonargparse import Namespace


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    parser.add_argument("--data", type=str, required=True, help="JSONL file of questions with their answers")
    parser.add_argument(
        "--metric",
        type=str,
        default="exact",
        help="exact (whole text), last_word, choice (a letter) or math (needs the eval extra)",
    )
    parser.add_argument("--answer-field", type=str, default="answer", help="field of a row that holds the answer")
    add_answering(parser)
    parser.add_argument(
        "--output", type=str, default=None, help="JSONL file of records; a run that was cut short goes on from it"
    )


def execute(options: Namespace) -> int:
    from recmas.rows import read_rows

    rows = read_rows(options.data)
    with loaded(options) as mas:
        from recmas.evaluation import evaluate

        settings = {"metric": options.metric, "answer_field": options.answer_field, "output": options.output}
        _, summary = evaluate(mas, rows, **settings, **answering(options))
    if options.json:
        dump(asdict(summary))
    else:
        print(
            f"accuracy {summary.accuracy:.3f} (95 % interval {summary.low:.3f} to {summary.high:.3f}), "
            f"{summary.correct} of {summary.questions} questions"
        )
        print(
            f"per question: {summary.text_tokens:.1f} text tokens, {summary.latent_steps:.1f} latent steps, "
            f"{1000 * summary.seconds:.1f} ms"
        )
    return 0
