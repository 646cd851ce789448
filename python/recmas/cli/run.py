"""``recmas run``: answer questions."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recmas.cli.common import (
    add_answering,
    add_compile,
    add_offload,
    add_system,
    add_tools,
    answer_options,
    check_output,
    dump,
    loaded,
    read_questions,
    toolbox,
    write_lines,
)
from recmas.cli.parser import CommandLineParser
from recmas.prompts.rows import read_row

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.answering.answers import Answers


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    add_offload(parser)
    parser.add_argument(
        "--questions",
        type=str,
        default=None,
        help="JSONL file: an object per line with the fields that the system's prompts name, or with a chat's messages",
    )
    parser.add_argument("--question", type=str, default=None, help="a single question instead")
    add_answering(parser)
    add_compile(parser)
    add_tools(parser)
    parser.add_argument(
        "--stream", action="store_true", help="print answers as they are written, one question at a time"
    )
    parser.add_argument("--output", type=str, default=None, help="write answers here, a JSON object per line")


def execute(options: Namespace) -> int:
    rows = read_questions(options)
    if options.stream and options.json:
        raise ValueError("--stream prints text as it is written; it cannot be had with --json")
    check_output(options.output)
    asked = answer_options(options, tools=toolbox(options), batch_size=1 if options.stream else options.batch_size)
    printer = _Printer()
    with loaded(options) as mas:
        from tqdm.auto import tqdm

        rounds = mas.defaults.rounds if options.rounds is None else options.rounds
        visits = len(list(mas.pattern.visits(rounds)))
        hidden = True if options.stream else None  # None: where stderr is not a terminal
        with tqdm(total=len(rows) * visits, desc="run", unit="visit", delay=1, leave=False, disable=hidden) as bar:
            on_text = printer if options.stream else None
            answers = mas.answer(rows, asked, on_text=on_text, progress=bar.update)
    records = [record(row, answers, index) for index, row in enumerate(rows)]
    if options.output is not None:
        write_lines(options.output, records)
    if options.json:
        reading = {stage: asdict(how) for stage, how in answers.reading.items()}
        dump({"answers": records, "seconds": answers.seconds, "reading": reading})
    elif options.stream:
        printer.close(len(rows))
    elif options.output is None:
        for index, answer in enumerate(answers):
            print(f"{index}: {answer.text}")
    if not options.json:
        steps = sum(sum(answer.latent_steps.values()) for answer in answers)
        tokens = sum(sum(answer.text_tokens.values()) for answer in answers)
        seconds = sum(answers.seconds.values())
        reused = sum(how.positions - how.computed for how in answers.reading.values())
        read = f"{sum(how.positions for how in answers.reading.values())} prompt positions ({reused} reused)"
        answered = "1 answer" if len(answers) == 1 else f"{len(answers)} answers"
        print(f"{answered}, {read}, {steps} latent steps, {tokens} text tokens, {seconds:.2f} s")
    return 0


class _Printer:
    """Prints the pieces of one answer after another, each under its number."""

    def __init__(self) -> None:
        self._begun = 0

    def __call__(self, row: int, piece: str) -> None:
        self._begin(row)
        print(piece, end="", flush=True)

    def close(self, rows: int) -> None:
        """End the last line; answers without text have been passed over and still need theirs."""
        self._begin(rows - 1)
        print()

    def _begin(self, row: int) -> None:
        while self._begun <= row:
            print(f"\n{self._begun}: " if self._begun else "0: ", end="")
            self._begun += 1


def record(row: dict[str, object], answers: Answers, index: int) -> dict[str, Any]:
    """One answer as JSON."""
    answer = answers[index]
    return {
        "index": index,
        "question": read_row(row, index).get("question"),
        "text": answer.text,
        "tokens": answer.tokens,
        "latent_steps": answer.latent_steps,
        "text_tokens": answer.text_tokens,
        "tool_calls": [asdict(call) for call in answer.tool_calls],
    }
