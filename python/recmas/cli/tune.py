"""``recmas tune``: rounds, latent steps and pattern by validation under a budget of seconds or tokens."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recmas.answering.options import MODES
from recmas.cli.common import add_answering, add_data, add_offload, add_system, answer_options, dump, loaded, read_rows
from recmas.cli.parser import COUNTS, NAMES, CommandLineParser, some_of
from recmas.evaluation.records import UNITS

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.evaluation.tuning import Trial, Tuned

_ANSWERING = ("max_new_tokens", "batch_size")


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    add_offload(parser)
    add_data(parser)
    parser.add_argument("--budget", type=float, required=True, help="what may be used up; no trial begins later")
    parser.add_argument(
        "--budget-unit",
        default="seconds",
        choices=list(UNITS),
        help="of the budget: seconds, or tokens, which are the text tokens and latent steps of all agents",
    )
    parser.add_argument(
        "--others",
        type=NAMES,
        default=[],
        help="folders of more systems to try beside this one, such as of other patterns; those without links in texts",
    )
    parser.add_argument("--mode", type=some_of(MODES), default="latent", help="what is tried")
    parser.add_argument("--rounds", type=COUNTS, default=(1, 2, 3), help="what is tried")
    parser.add_argument(
        "--latent-steps", type=COUNTS, default=(1, 2, 4, 8, 16, 32), help="what is tried, for all agents"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the questions")
    parser.add_argument("--write", action="store_true", help="make the best latent candidate the system's defaults")
    add_answering(parser, _ANSWERING)


def execute(options: Namespace) -> int:
    if options.write and "latent" not in options.mode:
        raise ValueError("--write: no latent candidate is asked for, and a system's defaults hold no other")
    rows = read_rows(options)
    asked = answer_options(options, _ANSWERING)
    folders = [options.system, *options.others]
    with ExitStack() as stack:
        systems = {folder: stack.enter_context(loaded(options, Path(folder))) for folder in folders}
        from recmas.evaluation.tuning import tune

        found = tune(
            systems,
            rows,
            options.budget,
            unit=options.budget_unit,
            metric=options.metric,
            answer_field=options.answer_field,
            modes=options.mode,
            rounds=options.rounds,
            latent_steps=options.latent_steps,
            seed=options.seed,
            options=asked,
        )
    written = _write(found) if options.write else None
    if options.json:
        dump(
            {
                "trials": [_described(trial) for trial in found.trials],
                "seconds": found.seconds,
                "tokens": found.tokens,
                "ended": found.ended,
                "written": written,
            }
        )
        return 0
    width = max(map(len, folders)) + 2 if options.others else 0  # of the column that names systems
    heads = f"{'mode':<7} {'rounds':>6} {'steps':>5} {'questions':>9}  {'accuracy':<22} {'tokens':>7} {'ms':>8}"
    print(f"{'system' if width else '':<{width}}{heads}")
    for trial in found.trials:
        one = trial.accuracy
        share = f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" if trial.correct else "not tried"
        cell = trial.cell
        tokens = trial.tokens / max(1, len(trial.correct))
        print(
            f"{trial.system if width else '':<{width}}{cell.mode:<7} {cell.rounds:>6} {cell.steps!s:>5} "
            f"{len(trial.correct):>9}  {share:<22} "
            f"{tokens:>7.1f} {1000 * trial.seconds:>8.1f}"
        )
    print(f"{found.seconds:.1f} seconds, {found.tokens} tokens; {found.ended}")
    if written:
        print(written)
    return 0


def _described(trial: Trial) -> dict[str, Any]:
    one = trial.accuracy
    return {
        "system": trial.system,
        **trial.cell._asdict(),
        "questions": len(trial.correct),
        "correct": sum(trial.correct),
        "accuracy": [one.value, one.low, one.high],
        "seconds": trial.seconds,
        "tokens": trial.tokens / max(1, len(trial.correct)),
    }


def _write(found: Tuned) -> str:
    """Put the best latent candidate into its system's ``system.json``; what was written, in words."""
    from recmas.config.system_json import Defaults, read_spec, write_spec
    from recmas.files.locks import one_writer

    trial = next((trial for trial in found.trials if trial.cell.mode == "latent" and trial.correct), None)
    if trial is None:
        raise ValueError("--write: the budget ended before a latent candidate's turn")
    best, folder = trial.cell, Path(trial.system)
    assert isinstance(best.steps, int)
    with one_writer(folder):
        spec = read_spec(folder)
        spec.defaults = Defaults(best.rounds, best.steps)
        spec.agents = {role: replace(agent, latent_steps=None) for role, agent in spec.agents.items()}
        write_spec(folder, spec)
    return f"{folder}: rounds {best.rounds} and {best.steps} latent steps for all agents are the defaults now"
