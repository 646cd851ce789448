"""``recmas lab build|questions|eval|demo|notes|gym``: the lab, three small agents that can only answer together.

Its tasks are the relay, of short messages and several rounds, and the list, of one round and messages of 20 tokens.
``notes`` and ``gym`` write questions of other tasks, in natural language, for models that can read.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from recmas.cli.common import add_system, check_output, chosen_backend, dump, loaded, write_lines
from recmas.cli.parser import COUNTS, NAMES, CommandLineParser

if TYPE_CHECKING:
    from jsonargparse import Namespace

TASKS = {
    "build": "pretrain three agents from nothing, train their links, and write an ordinary system",
    "questions": "write fresh questions with their answers and training targets",
    "eval": "measure a lab's system on fresh questions: hops x rounds (relay: 1-3), latents, text and controls",
    "demo": "a short eval, then the links' time, fused against eager",
    "notes": "write questions of the notes task: private notes and natural language, for language models",
    "gym": "write questions of reasoning-gym, dealt out to a reader and a solver as those of the notes task",
}


def add_options(parser: CommandLineParser) -> None:
    own = {"build": _build_options, "questions": _questions_options, "notes": _notes_options, "gym": _gym_options}
    parser.add_commands("task", TASKS, lambda task, command: own.get(task, _measure_options)(command))


def execute(options: Namespace) -> int:
    run = {"build": _build, "questions": _questions, "eval": _eval, "demo": _demo, "notes": _notes, "gym": _gym}
    run[options.task](options[options.task])
    return 0


def _build_options(parser: CommandLineParser) -> None:
    parser.add_argument("system", type=str, help="folder to write")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    _add_task(parser)
    parser.add_argument("--seed", type=int, default=1, help="of agents, lessons, links and their questions")
    parser.add_argument("--link-seed", type=int, default=None, help="of links and questions, where it should differ")
    parser.add_argument("--agents", type=str, default=None, help="built lab whose agents are linked anew")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _questions_options(parser: CommandLineParser) -> None:
    parser.add_argument("output", type=str, help="JSONL file to write")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    _add_task(parser)
    parser.add_argument("--seed", type=int, default=1, help="of the test worlds")
    parser.add_argument("--count", type=int, default=256, help="number of questions")
    parser.add_argument("--hops", type=COUNTS, default=None, help="hop counts to draw from (default: the task's)")


def _add_task(parser: CommandLineParser) -> None:
    parser.add_argument("--task", type=str, default="relay", help="relay or list")


def _notes_options(parser: CommandLineParser) -> None:
    parser.add_argument("output", type=str, help="JSONL file to write")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--split", type=str, default="test", help="name that questions are drawn under, such as train")
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    parser.add_argument("--count", type=PositiveInt, default=64, help="number of questions")
    parser.add_argument("--hops", type=int, choices=[1, 2], default=1, help="2 needs the solver's own notes, too")
    parser.add_argument(
        "--halves", type=NAMES, default=["known", "unknown"], help="of names and values, in turn; links train on known"
    )


def _gym_options(parser: CommandLineParser) -> None:
    parser.add_argument("output", type=str, help="JSONL file to write")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--name", type=str, default="needle_haystack", help="of the data set, there")
    parser.add_argument("--split", type=str, default="test", help="name that questions are drawn under, such as train")
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    parser.add_argument("--count", type=PositiveInt, default=64, help="number of questions")


def _measure_options(parser: CommandLineParser) -> None:
    add_system(parser)
    parser.add_argument("--seed", type=int, default=1, help="of the test worlds")
    parser.add_argument("--questions", type=int, default=None, help="per number of hops (default: eval 2048, demo 256)")


def _build(options: Namespace) -> None:
    import transformers

    from recmas.lab.build import build
    from recmas.lab.tasks import task_named
    from recmas.lab.threads import one_thread

    task = task_named(options.task)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    with one_thread():
        record = build(options.system, options.seed, task=task, link_seed=options.link_seed, agents=options.agents)
    minutes = (time.perf_counter() - started) / 60
    if options.json:
        dump(record)
        return
    for role, reached in record["pretraining"].items():
        print(f"{role}: {reached['accuracy']:.3f} of its look-ups right after {reached['steps']} steps")
    for stage, accuracy in record["links"]["validation"].items():
        print(f"links after {stage}: {accuracy:.4f} of the validation questions")
    print(f"kept: {record['links']['kept']}; as stored {record['validation_accuracy']:.4f}")
    print(f"{options.system} written in {minutes:.1f} minutes")


def _questions(options: Namespace) -> None:
    from recmas.lab.tasks import task_named

    task = task_named(options.task)
    if options.count < 1:
        raise ValueError(f"--count: {options.count} is not positive")
    check_output(options.output)
    write_lines(options.output, task.questions("test", options.seed, options.hops or task.hops, options.count))
    print(f"{options.count} questions in {options.output}")


def _notes(options: Namespace) -> None:
    from recmas.lab.notes import questions

    check_output(options.output)
    rows = questions(options.split, options.seed, options.count, options.halves, options.hops)
    write_lines(options.output, rows)
    print(f"{options.count} questions in {options.output}")


def _gym(options: Namespace) -> None:
    from recmas.lab.gym import questions

    check_output(options.output)
    write_lines(options.output, questions(options.name, options.split, options.seed, options.count))
    print(f"{options.count} questions in {options.output}")


def _eval(options: Namespace) -> None:
    cells = _measured(options, 2048)
    if options.json:
        dump([asdict(cell) for cell in cells])


def _demo(options: Namespace) -> None:
    from recmas.lab.timing import link_times, time_table

    cells = _measured(options, 256)
    with chosen_backend(options):
        times = link_times()
    if options.json:
        dump({"grid": [asdict(cell) for cell in cells], "links": [asdict(row) for row in times]})
    else:
        print(f"\nlinks, no gradients, fp32, medians [p20, p80] by turns\n{time_table(times)}")


def _measured(options: Namespace, default: int) -> list[Any]:
    """The grid; its table is printed cell by cell unless JSON is wanted."""
    from tqdm.auto import tqdm

    from recmas.lab.grid import CONTROLS, MODES, Measurement, check, grid, heading, line, runs, summary
    from recmas.lab.threads import one_thread

    count = default if options.questions is None else options.questions
    if count < 2:
        raise ValueError(f"--questions: {count} is too few; latents are shuffled among 2 questions or more")
    methods = (*MODES, *CONTROLS)
    with loaded(options) as mas, tqdm(desc="lab", leave=False, disable=None) as bar:

        def show(cell: Measurement) -> None:
            if not options.json:
                bar.write(line(cell))
            bar.update()

        task = check(mas, count)
        bar.total = len(task.hops) * len(runs(methods, task.hops))
        if not options.json:
            bar.write(f"{count} fresh questions per number of hops, test worlds of seed {options.seed}, one thread")
            bar.write(heading())
        with one_thread():
            cells = grid(mas, options.seed, count, methods=methods, on_cell=show)
    if not options.json:
        print(f"\n{summary([cell for cell in cells if cell.method in MODES])}")
    return cells
