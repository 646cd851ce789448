"""``recmas audit``: does what the latents say matter, and would something simpler do as well."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from recmas.cli.common import add_answering, add_data, add_offload, add_system, answer_options, dump, loaded, read_rows
from recmas.cli.parser import CommandLineParser

if TYPE_CHECKING:
    from jsonargparse import Namespace

_ANSWERING = ("rounds", "latent_steps", "max_new_tokens", "batch_size")


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    add_offload(parser)
    add_data(parser)
    parser.add_argument("--questions", type=PositiveInt, default=None, help="draw so many rows (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions drawn, shuffles, noise and random links")
    parser.add_argument("--margin", type=float, default=0.05, help="difference of accuracy that counts as none")
    parser.add_argument("--nll-margin", type=float, default=0.1, help="difference in nats that counts as none")
    add_answering(parser, _ANSWERING)


def execute(options: Namespace) -> int:
    rows = read_rows(options)
    asked = answer_options(options, _ANSWERING)
    with loaded(options) as mas:
        from recmas.evaluation.audits import audit
        from recmas.evaluation.findings import table

        found = audit(
            mas,
            rows,
            questions=options.questions,
            seed=options.seed,
            metric=options.metric,
            answer_field=options.answer_field,
            margin=options.margin,
            nll_margin=options.nll_margin,
            options=asked,
        )
    if options.json:
        dump(asdict(found))
    else:
        print(table(found))
    return 0
