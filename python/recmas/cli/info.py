"""``recmas info``: the kernel package's own page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recmas.cli.parser import CommandLineParser

if TYPE_CHECKING:
    from jsonargparse import Namespace


def add_options(parser: CommandLineParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(options: Namespace) -> int:
    from recmas_kernels import info

    return info.main(["--json"] if options.json else [])
