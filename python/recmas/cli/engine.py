"""Where a system's agents run: in this process, or in processes of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from recmas.cli.common import loaded
from recmas.cli.parser import CommandLineParser

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.answering.options import AnswerOptions
    from recmas.distributed.order import Loading
    from recmas.distributed.system import RaySystem
    from recmas.recursive_mas import RecursiveMAS
    from recmas.tools import Toolbox

ENGINES = ("local", "ray")
_ELSEWHERE = {"device": "cpu", "offload": False}
"""What placement in system.json says with --engine ray, and the values that say nothing."""


def add_engine(parser: CommandLineParser) -> None:
    """``--engine`` and what belongs to it."""
    parser.add_argument(
        "--engine",
        default="local",
        choices=list(ENGINES),
        help="local: all agents in this process; ray: each in processes of its own, where placement in system.json "
        "says (needs the ray extra)",
    )
    parser.add_argument(
        "--cluster",
        type=str,
        default=None,
        help="with --engine ray: address of a Ray cluster that runs, auto to find it; without, one is started here and "
        "ends with the command",
    )


def add_micro_batch(parser: CommandLineParser) -> None:
    """``--micro-batch``."""
    parser.add_argument(
        "--micro-batch",
        type=PositiveInt,
        default=None,
        help="with --engine ray: rows at once at one agent; agents work on several of these at the same time (default: "
        "the batch size)",
    )


def check_engine(options: Namespace) -> None:
    """Refuse options that the engine has not."""
    if options.engine == "local":
        for name in ("cluster", "micro_batch"):
            if options.get(name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: is for --engine ray")
        return
    for name, nothing in _ELSEWHERE.items():
        if options.get(name, nothing) != nothing:
            raise ValueError(f"--{name}: with --engine ray, placement in system.json says where agents are")


@contextlib.contextmanager
def asked_system(options: Namespace, asked: AnswerOptions) -> Iterator[RecursiveMAS | RaySystem]:
    """The system that the options name, where the engine has it."""
    if options.engine == "local":
        with loaded(options) as mas:
            yield mas
        return
    with joined(options):
        from recmas.distributed.system import RaySystem

        loading = loading_of(options, asked.toolbox, asked.prefix_reuse)
        with RaySystem(loading, micro_batch=options.micro_batch) as system:
            yield system


def faults_of(mas: RecursiveMAS | RaySystem) -> Mapping[str, int]:
    """How often what went wrong between processes, by its name in words; empty for one process."""
    found: Mapping[str, int] = getattr(mas, "faults", {})
    return found


def faults_line(faults: Mapping[str, int]) -> str:
    """The same for the end of a line."""
    return ", ".join(f"{count} {words}" for words, count in faults.items())


@contextlib.contextmanager
def joined(options: Namespace) -> Iterator[None]:
    """Within, this process is part of the cluster that the options name."""
    from recmas.config.system_json import read_spec

    read_spec(options.system)  # a broken file ends here, before a cluster is started
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--engine ray needs the ray extra: pip install 'recmas-kernels[ray]' ({error})") from None
    from recmas.distributed.cluster import cluster

    with cluster(options.cluster):
        yield


def loading_of(options: Namespace, tools: Toolbox | tuple[()], prefix_reuse: bool = True) -> Loading:
    """How the options say that agents are loaded."""
    from recmas.config.parts import Trust
    from recmas.distributed.order import Loading
    from recmas.tools import Toolbox

    return Loading(
        folder=str(Path(options.system).resolve()),
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        compile=options.get("compile", False),
        accelerate=not options.no_accelerate,
        trust=Trust(options.allow_outside, options.allow_hub),
        backend=options.backend,
        toolbox=tools or Toolbox(()),
        prefix_reuse=prefix_reuse,
    )
