"""``recmas train inner|warmup|outer|all``: train a system's links."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recmas.cli.common import add_system, dump, loaded
from recmas.cli.fields import add_fields, read_fields
from recmas.cli.parser import COUNTS, LATENT_STEPS, NAMES, ROLES, WEIGHTS, CommandLineParser
from recmas.cli.training_data import add_data, read_data
from recmas.files.reading import inside

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.config.pattern import LinkKey
    from recmas.recursive_mas import RecursiveMAS

STAGES = {
    "inner": "train each agent's inner link, toward the embeddings of its own gold texts",
    "warmup": "train each outer link, toward the receiver's embeddings of the sender's gold texts",
    "outer": "train all outer links together, by the cross entropy of the answer through all rounds",
    "all": "train inner links, outer links by warm-up, then all outer links together: the stages one after the other",
}
SINGLE = [stage for stage in STAGES if stage != "all"]
KINDS = {"rounds": COUNTS, "latent_steps": LATENT_STEPS, "round_weights": WEIGHTS, "inner_target": ROLES}


def add_options(parser: CommandLineParser) -> None:
    parser.add_commands("stage", STAGES, _add_stage)


def _add_stage(stage: str, command: CommandLineParser) -> None:
    add_system(command)
    aligned = stage != "outer"
    add_data(command, stage)
    if aligned:
        _add_pairs(command)
    command.add_argument(
        "--output", type=str, default=None, help="folder for the trained system (default: the system itself)"
    )
    command.add_argument(
        "--progress",
        action="store_true",
        help="show bars where stderr is no terminal, too: a line every ten seconds",
    )
    command.add_argument(
        "--tracker",
        type=NAMES,
        default=[],
        help="tensorboard, wandb, ...: trackers of Accelerate that get every step's record; files go to "
        "training/tracked in the output",
    )
    command.add_argument(
        "--shard-agents",
        action="store_true",
        help="deal the layers of all agents out among the processes (FSDP2): each holds its share of the weights; "
        "as accelerate launch --use_fsdp asks for, too",
    )
    command.add_argument("--resume", action="store_true", help="go on from the output's last checkpoint")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show what would be trained, how long (two steps of each run are measured) and beside "
        "how much memory; write nothing",
    )
    if stage != "all":
        only = (
            ("--roles", "agents to train")
            if stage == "inner"
            else ("--edges", "links to train: a->b,... or of one round a->b@1,...")
        )
        command.add_argument(only[0], type=NAMES, default=None, help=f"{only[1]} (default: all)")
    add_fields(command, _config_class(stage), KINDS)


def _add_pairs(command: CommandLineParser) -> None:
    """Where the stages that align links on pairs keep them."""
    command.add_argument(
        "--cache",
        type=str,
        default=None,
        help="folder of the states that texts leave in their frozen agent, so that each text runs once; its size is "
        "announced; off runs the agents for every batch (default: training/pairs in the output)",
    )
    command.add_argument(
        "--cache-dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the cache; auto: the agent's"
    )


def execute(options: Namespace) -> int:
    from recmas import training
    from recmas.cli import Ended
    from recmas.config.system_json import edge_name, read_spec
    from recmas.files import write_atomically
    from recmas.files.locks import one_writer
    from recmas.system.folder import check_place, is_new, save
    from recmas.training.card import CARD, read_runs, write_card
    from recmas.training.origin import RECORD, check_origin, origin
    from recmas.training.processes import processes
    from recmas.training.run_record import RUN, check_data, run_record
    from recmas.training.sharding import asked_by_accelerate, check_sharding, shard_agents

    stage, chosen = options.stage, options[options.stage]
    chosen.shard_agents = chosen.shard_agents or asked_by_accelerate()
    config_class = _config_class(stage)
    given = read_fields(chosen, config_class, KINDS)
    config = config_class(**{name: _setting(name, value) for name, value in given.items()})
    system = Path(chosen.system)
    output = system if chosen.output is None else Path(chosen.output)
    logs = output / "training"
    data = read_data(stage, chosen)
    only = _only(stage, chosen, logs) | data.given
    rows = only.pop("rows")
    together = processes()
    new = output.resolve() != system.resolve()
    read_spec(system)
    if new:
        check_place(output)
    if new and not is_new(output):
        _check_resumable(output, stage, chosen.resume)
        check_origin(output, system)
        new, system = False, output  # it began as the system that it was made of
    for path in (logs, *logs.glob("*")):
        inside(output, str(path.relative_to(output)), str(output))
    read_spec(system)
    with ExitStack() as stack:
        if not new and together.writes and not chosen.dry_run:
            stack.enter_context(one_writer(output))
        read_runs(logs)  # the card will tell of them: what cannot be read is told before the first step
        mas = stack.enter_context(loaded(chosen, system))
        if chosen.shard_agents:
            check_sharding(mas)
        runs = _runs(stage, config, only, mas)
        if chosen.resume:
            for name, part, _ in runs:
                check_data(logs / name, data.described[part], data.validation[part])

        def start() -> None:
            """All has been checked: only now is anything written."""
            if together.writes:
                write()
            together.wait()
            if chosen.shard_agents:
                shard_agents(mas)

        def write() -> None:
            records = {
                f"{logs.name}/{name}/{RUN}": run_record(its, data.described[part], data.validation[part])
                for name, part, its in runs
            }
            if new:  # with its runs' folders, so that it can be resumed whenever it ends
                save(mas, output, records | {RECORD: origin(system)})
                for role, agent in read_spec(output).agents.items():
                    if (output / agent.model).is_dir():
                        mas.agents[role].source = str(output / agent.model)  # it is not written again
                stack.enter_context(one_writer(output))
            for name, text in records.items():
                if not (output / name).exists() or not chosen.resume:
                    (output / name).parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(output / name, text)

        train: Any = getattr(training, f"train_{stage}")
        if chosen.dry_run:
            train(mas, rows, config, output=logs, resume=chosen.resume, on_start=lambda: True, **only)
            if chosen.shard_agents:
                shard_agents(mas)
            planned = _planned(stage, config, only, rows, mas)
            if together.writes:
                _show(planned, chosen.json)
            return 0
        try:
            result: Any = train(mas, rows, config, output=logs, resume=chosen.resume, on_start=start, **only)
        except Ended as end:
            if end.number != signal.SIGTERM or not output.exists():
                raise
            print(f"recmas: ended by SIGTERM, all steps are in {logs}; --resume goes on", file=sys.stderr)
            return 0
        if not together.writes:
            return 0
        mas.save_pretrained(output)
        if not write_card(output, read_spec(output)):
            print(f"recmas: {output / CARD} is not what recmas train wrote, and stays as it is", file=sys.stderr)
    results = result if isinstance(result, dict) else {"outer links": result}
    summary = {
        name if isinstance(name, str) else edge_name(name): {"steps": done.steps, "loss": done.loss}
        for name, done in results.items()
    }
    if chosen.json:
        dump({"system": str(output), "results": summary})
    else:
        for name, done in summary.items():
            print(f"{name}: loss {done['loss']:.4f} after {done['steps']} steps")
        print(f"trained system in {output}, logs in {logs}")
    return 0


def _only(stage: str, options: Namespace, logs: Path) -> dict[str, Any]:
    """The arguments of a stage's function that its options name, but for rows."""
    from recmas import training

    only: dict[str, Any] = {"trackers": options.tracker, "progress": "always" if options.progress else True}
    if stage in ("warmup", "outer"):
        only["edges"] = _edges(options.edges)
    if stage == "inner":
        only["roles"] = options.roles
    if options.shard_agents and stage != "outer" and options.cache not in (None, "off"):
        raise ValueError("--cache: one process makes pairs, but layers of sharded agents run in all; give --cache off")
    if stage != "outer" and options.cache != "off" and not options.shard_agents:
        folder = logs / "pairs" if options.cache is None else options.cache
        only["cache"] = training.PairCache(folder, options.cache_dtype)
    return only


def _check_resumable(output: Path, stage: str, resume: bool) -> None:
    """Raise ValueError unless `output` holds a system, with a run of this stage that is to be resumed."""
    if not resume:
        raise ValueError(
            f"--output: {output} holds a system already; go on with its training (--resume), train it in place "
            f"(recmas train {stage} {output}), or choose another folder"
        )
    needed = SINGLE if stage == "all" else [stage]
    if not all(any((output / "training").glob(f"{each}*")) for each in needed):
        raise ValueError(f"--output: {output} holds no run of train {stage} that could be resumed")


def _parts(stage: str, config: Any, system: RecursiveMAS) -> list[tuple[str, Any]]:
    """A command's stages, one or all three, and their settings."""
    if stage != "all":
        return [(stage, config)]
    return list(zip(SINGLE, config.stages(system.defaults.rounds), strict=True))


def _runs(stage: str, config: Any, only: Mapping[str, Any], system: RecursiveMAS) -> list[tuple[str, str, Any]]:
    """The folders of a command's runs, their stages and their settings."""
    from recmas.training.alignment import run_name

    inner, outer = only.get("roles") or system.inner_links, only.get("edges") or system.outer_links
    runs: list[tuple[str, str, Any]] = []
    for name, settings in _parts(stage, config, system):
        keys: Any = inner if name == "inner" else outer
        folders = [name] if name == "outer" else [run_name(name, key) for key in keys]
        runs += [(folder, name, settings) for folder in folders]
    return runs


def _planned(
    stage: str, config: Any, only: Mapping[str, Any], rows: Sequence[Any], system: RecursiveMAS
) -> dict[str, Any]:
    """What a command would train; texts of train all, if given, are what its first two stages read."""
    from recmas.training.plan import Part, plan

    keys = only.get("roles" if stage == "inner" else "edges")
    texts, cached = only.get("texts", rows), only["cache"].dtype if "cache" in only else None
    return plan(
        system,
        [
            Part(name, settings, rows if name == "outer" else texts, keys, cached)
            for name, settings in _parts(stage, config, system)
        ],
    )


def _show(planned: dict[str, Any], as_json: bool) -> None:
    from recmas.training.plan import table

    if as_json:
        dump(planned)
    else:
        print(table(planned))


def _config_class(stage: str) -> Any:
    from recmas import training

    return getattr(training, f"{stage.capitalize()}Config")


def _setting(name: str, value: Any) -> Any:
    """A single round count stands for itself, several are drawn from."""
    return value[0] if name == "rounds" and isinstance(value, tuple) and len(value) == 1 else value


def _edges(names: list[str] | None) -> list[LinkKey] | None:
    from recmas.config.system_json import read_edge

    try:
        return None if names is None else [read_edge(name) for name in names]
    except ValueError as error:
        raise ValueError(f"--edges: {error}") from None
