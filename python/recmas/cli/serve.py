"""``recmas serve``: answer requests over HTTP, in the OpenAI format."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from recmas.cli.common import add_compile, add_offload, add_system, add_tools, dump, loaded, toolbox
from recmas.cli.engine import add_engine, check_engine, joined, loading_of
from recmas.cli.fields import add_fields, read_fields
from recmas.cli.parser import CommandLineParser
from recmas.serving.settings import ServeSettings

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from recmas.config.outline import Outline
    from recmas.scheduling.executor import Executor
    from recmas.tools import Toolbox

PACE = 0.02
"""Seconds between two pieces of a text that come from another process."""

_KINDS: dict[str, Any] = {
    "host": str,
    "port": NonNegativeInt,
    "api_keys": str,
    "window": float,
    "timeout": float,
    "drain": float,
} | {field.name: PositiveInt for field in fields(ServeSettings) if field.name.startswith(("batch_", "queue", "max_"))}
_NAMES = tuple(field.name for field in fields(ServeSettings) if field.name != "open")


def add_options(parser: CommandLineParser) -> None:
    add_system(parser)
    add_offload(parser)
    add_engine(parser)
    add_fields(parser, ServeSettings, _KINDS, _NAMES)
    parser.add_argument("--open", action="store_true", help="serve whoever reaches the address, without keys")
    parser.add_argument("--name", type=str, default=None, help="of the model (default: that of the folder)")
    add_compile(parser)
    add_tools(parser)


def execute(options: Namespace) -> int:
    from recmas.config.outline import Outline
    from recmas.config.system_json import read_spec

    settings = ServeSettings(**read_fields(options, ServeSettings, _KINDS, _NAMES), open=options.open)
    check_engine(options)
    settings.check_system(Outline.of(read_spec(options.system)))
    try:
        from recmas.serving.keys import ApiKeys
        from recmas.serving.server import address, serve, url
    except ImportError as error:
        raise ImportError(
            f"recmas serve needs the serve extra: pip install 'recmas-kernels[serve]' ({error})"
        ) from None
    if settings.api_keys is not None:
        ApiKeys(Path(settings.api_keys))
    tools = toolbox(options)
    name = options.name or Path(options.system).resolve().name
    with address(settings) as taken, running(options, tools) as (outline, executor):
        print(f"{name} at {url(taken)}", file=sys.stderr, flush=True)
        if options.json:
            dump({"model": name, "url": url(taken)})
        from recmas.cli import Ended

        with contextlib.suppress(Ended, KeyboardInterrupt):  # requests have ended before the server lets these through
            serve(name, outline, executor, settings, taken)
    return 0


@contextlib.contextmanager
def running(options: Namespace, tools: Toolbox | tuple[()]) -> Iterator[tuple[Outline, Executor]]:
    """The system that the options name, where the engine has it; whoever takes the executor closes it."""
    if options.engine == "local":
        with loaded(options) as mas:
            from recmas.scheduling.executor import LocalExecutor

            yield mas.outline, LocalExecutor(mas, tools or None)
        return
    with joined(options):
        from recmas.config.outline import Outline
        from recmas.config.system_json import read_spec
        from recmas.distributed.executor import RayExecutor

        spec = read_spec(options.system)
        yield Outline.of(spec), RayExecutor(spec, loading_of(options, tools), pace=PACE)
