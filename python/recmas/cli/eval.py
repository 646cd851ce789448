"""``recmas eval``: accuracy on questions with known answers, over modes, rounds and latent steps."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from recmas.cli.common import (
    DECODING,
    add_answering,
    add_compile,
    add_data,
    add_offload,
    add_system,
    add_tools,
    answer_options,
    check_output,
    dump,
    read_rows,
    settling,
    toolbox,
)
from recmas.cli.engine import add_engine, add_micro_batch, asked_system, check_engine, faults_line, faults_of
from recmas.cli.parser import COUNTS, LATENT_STEPS, CommandLineParser, Kind, several, some_of
from recmas.evaluation import MODES

if TYPE_CHECKING:
    from jsonargparse import Namespace


def _read_sweep(value: Any) -> tuple[int | dict[str, int], ...]:
    by_role = isinstance(value, str) and "=" in value
    return tuple(LATENT_STEPS(one) for one in ([value] if by_role else several(value)))


def _read_rounds(value: Any) -> tuple[int, ...] | str:
    return "auto" if value == "auto" else COUNTS(value)


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    add_offload(parser)
    add_engine(parser)
    add_micro_batch(parser)
    add_data(parser)
    parser.add_argument("--limit", type=PositiveInt, default=None, help="only the first so many questions")
    parser.add_argument(
        "--mode",
        type=some_of(MODES),
        default="latent",
        help="latent; text: the same agents, prompts and rounds, text in the slots; single: the answering agent alone; "
        "loop: the answering agent reading its own latents",
    )
    parser.add_argument(
        "--rounds",
        type=Kind("N,... or auto", _read_rounds),
        default=None,
        help="rounds of the recursion, to try in turn; or auto: as many as each question needs (--settle), at most the "
        "system's own (default: the system's)",
    )
    parser.add_argument(
        "--latent-steps",
        type=Kind("N,... or ROLE=N,...", _read_sweep),
        default=None,
        help="latent thoughts per message, to try in turn: 0,16,32; or once, by role: planner=2,solver=3",
    )
    parser.add_argument("--samples", type=PositiveInt, default=1, help="answers to each question, for pass@k")
    add_answering(parser, DECODING)
    add_compile(parser)
    add_tools(parser)
    parser.add_argument(
        "--output", type=str, default=None, help="JSONL file of records; a run that was cut short goes on from it"
    )


def execute(options: Namespace) -> int:
    check_output(options.output)
    check_engine(options)
    rows = read_rows(options, options.limit)
    auto = options.rounds == "auto"
    asked = answer_options(options, DECODING, tools=toolbox(options), **settling(options, auto))
    with asked_system(options, asked) as mas:
        from recmas.evaluation.summary import table
        from recmas.evaluation.sweeps import sweep

        summaries = sweep(
            mas,
            rows,
            metric=options.metric,
            answer_field=options.answer_field,
            modes=options.mode,
            rounds=(None,) if auto else options.rounds or (None,),
            latent_steps=options.latent_steps or (None,),
            samples=options.samples,
            options=asked,
            output=options.output,
        ).summaries
        faults = faults_of(mas)
    if options.json:
        dump({"cells": [asdict(summary) for summary in summaries], "faults": faults})
    else:
        print(table(summaries), *filter(None, [faults_line(faults)]), sep="\n")
    return 0
