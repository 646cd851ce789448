"""``recmas run``: answer questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recmas.answering.options import AnswerOptions
from recmas.cli.common import (
    ANSWERING,
    add_answering,
    add_compile,
    add_offload,
    add_system,
    add_tools,
    answer_options,
    check_output,
    dump,
    read_questions,
    settling,
    toolbox,
    write_lines,
)
from recmas.cli.engine import add_engine, add_micro_batch, asked_system, check_engine, faults_line, faults_of
from recmas.cli.parser import ROUNDS, CommandLineParser
from recmas.files.json_lines import OtherRunError, append_lines, read_lines
from recmas.prompts.rows import read_row

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.answering.answers import Answer, Answers
    from recmas.distributed.system import RaySystem
    from recmas.recursive_mas import RecursiveMAS

_NO_PART = ("batch_size", "prefix_reuse", "trace", "tools")
"""Options that change no answer but by rounding, and what `keys_of` writes down otherwise."""


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    add_offload(parser)
    add_engine(parser)
    add_micro_batch(parser)
    parser.add_argument(
        "--questions",
        type=str,
        default=None,
        help="JSONL file: an object per line with the fields that the system's prompts name, or with a chat's messages",
    )
    parser.add_argument("--question", type=str, default=None, help="a single question instead")
    add_answering(parser, [name for name in ANSWERING if name != "rounds"])
    parser.add_argument(
        "--rounds",
        type=ROUNDS,
        default=None,
        help="rounds of the recursion, or auto: as many as each question needs (--settle), at most the system's own "
        "(default: the system's)",
    )
    add_compile(parser)
    add_tools(parser)
    parser.add_argument(
        "--stream", action="store_true", help="print answers as they are written, one question at a time"
    )
    parser.add_argument(
        "--output",
        type=str,
        default=None,
        help="write answers here as they come, a JSON object per line; a run that was cut short goes on from it",
    )


def execute(options: Namespace) -> int:
    from recmas.answering.answers import RowsFailedError
    from recmas.files.locks import one_writer

    rows = read_questions(options)
    if options.stream and options.json:
        raise ValueError("--stream prints text as it is written; it cannot be had with --json")
    if options.stream and options.engine == "ray":
        raise ValueError("--stream: with --engine ray, many are answered at once; recmas serve streams them")
    check_output(options.output)
    check_engine(options)
    auto = settling(options, options.rounds == "auto")
    batch_size = 1 if options.stream else options.batch_size
    asked = answer_options(options, tools=toolbox(options), batch_size=batch_size, **auto)
    output = None if options.output is None else Path(options.output)
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(one_writer(output))
        mas = stack.enter_context(asked_system(options, asked))
        from tqdm.auto import tqdm

        rounds = mas.defaults.rounds if asked.rounds is None else asked.rounds
        visits = len(list(mas.pattern.visits(rounds)))
        keys = keys_of(mas, rows, asked)
        done = {} if output is None else read_answers(output, keys)
        printer = _Printer({number: str(known["text"]) for number, known in done.items()})

        def note(numbers: Sequence[int], answers: Answers) -> None:
            """Answers are on the disk as soon as they are there."""
            new = [
                record(rows[number], answer, number, keys[number])
                for number, answer in zip(numbers, answers, strict=True)
                if number not in done
            ]
            if output is not None:
                append_lines(output, new)
            done.update({made["index"]: made for made in new})

        hidden = True if options.stream else None  # None: where stderr is not a terminal
        with tqdm(total=len(rows) * visits, desc="run", unit="visit", delay=1, leave=False, disable=hidden) as bar:
            on_text = printer if options.stream else None
            known = set(done)
            failure = None
            try:
                answers = mas.answer(rows, asked, on_text=on_text, on_answers=note, skip=known, progress=bar.update)
            except RowsFailedError as error:  # the others are answered, and shown
                answers, failure = error.answers, error
        records, faults = [done[number] for number in sorted(done)], faults_of(mas)
        if output is not None:
            write_lines(options.output, records)  # in the order of the rows
    if options.json:
        reading = {stage: asdict(how) for stage, how in answers.reading.items()}
        dump({"answers": records, "seconds": answers.seconds, "reading": reading, "faults": faults})
    elif options.stream:
        printer.close(len(rows))
    elif options.output is None:
        for made in records:
            print(f"{made['index']}: {made['text']}")
    if not options.json:
        print(", ".join(filter(None, (_account(answers, records, len(known)), faults_line(faults)))))
    if failure is not None:
        raise failure
    return 0


def _account(answers: Answers, records: Sequence[dict[str, Any]], known: int) -> str:
    """What this run did, as a line; how prompts were read is known of agents in this process."""
    steps = sum(sum(made["latent_steps"].values()) for made in records)
    tokens = sum(sum(made["text_tokens"].values()) for made in records)
    seconds = sum(answers.seconds.values())
    positions = sum(how.positions for how in answers.reading.values())
    reused = positions - sum(how.computed for how in answers.reading.values())
    read = f"{positions} prompt positions ({reused} reused), " if answers.reading else ""
    answered = "1 answer" if len(records) == 1 else f"{len(records)} answers"
    earlier = f" ({known} of them known)" if known else ""
    return f"{answered}{earlier}, {read}{steps} latent steps, {tokens} text tokens, {seconds:.2f} s"


def keys_of(mas: RecursiveMAS | RaySystem, rows: Sequence[dict[str, object]], asked: AnswerOptions) -> list[str]:
    """What distinguishes each row's answer: system, options, row and its number; not which rows share a batch."""
    from recmas.evaluation.fingerprint import key_of

    tools = asked.toolbox
    how = {field.name: getattr(asked, field.name) for field in fields(asked) if field.name not in _NO_PART}
    how["tools"] = [sorted(tools.tools), tools.max_calls, tools.max_output] if tools.tools else []
    whole = mas.fingerprint()
    return [key_of(whole, how, number, row) for number, row in enumerate(rows)]


def read_answers(output: Path, keys: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The answers that an earlier call of this run has written, by row."""

    def known(line: dict[str, Any]) -> dict[str, Any]:
        if not 0 <= line["index"] < len(keys) or line["key"] != keys[line["index"]]:
            raise OtherRunError
        return line

    return {line["index"]: line for line in read_lines(output, known, "an answer of recmas run", '{"index": ')}


class _Printer:
    """Prints the pieces of one answer after another, each under its number; `known` are texts of earlier answers."""

    def __init__(self, known: Mapping[int, str]) -> None:
        self._begun, self._known = 0, known

    def __call__(self, row: int, piece: str) -> None:
        self._begin(row)
        print(piece, end="", flush=True)

    def close(self, rows: int) -> None:
        """End the last line; answers without text have been passed over and still need theirs."""
        self._begin(rows - 1)
        print()

    def _begin(self, row: int) -> None:
        while self._begun <= row:
            known = self._known.get(self._begun, "")
            print(f"\n{self._begun}: {known}" if self._begun else f"0: {known}", end="")
            self._begun += 1


def record(row: dict[str, object], answer: Answer, index: int, key: str) -> dict[str, Any]:
    """One answer as JSON."""
    return {
        "index": index,
        "key": key,
        "question": read_row(row, index).get("question"),
        "text": answer.text,
        "rounds": answer.rounds,
        "tokens": answer.tokens,
        "latent_steps": answer.latent_steps,
        "text_tokens": answer.text_tokens,
        "tool_calls": [asdict(call) for call in answer.tool_calls],
    }
