"""``recmas info``: the kernel package's own page; with a system, the memory that it will take."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from recmas.cli.common import EXCHANGE, add_answering, add_device, add_offload, dump
from recmas.cli.parser import CommandLineParser
from recmas.sizing import BATCH_SIZE

if TYPE_CHECKING:
    from jsonargparse import Namespace


def add_options(parser: CommandLineParser) -> None:
    parser.add_argument(
        "system",
        type=str,
        nargs="?",
        default=None,
        help="folder of a system: show the memory that it will take, without loading it (default: show the kernels)",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add_device(parser)
    add_offload(parser)
    add_answering(parser, (*EXCHANGE, "max_new_tokens"))
    parser.add_argument("--prompt-tokens", type=PositiveInt, default=512, help="tokens of a prompt, messages aside")
    parser.add_argument("--batch-size", type=PositiveInt, default=BATCH_SIZE, help="questions answered at once")
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(options: Namespace) -> int:
    if options.system is None:
        from recmas_kernels import info

        return info.main(["--json"] if options.json else [])
    from recmas.sizing.report import memory_table, render

    table = memory_table(
        options.system,
        device=options.device,
        dtype=options.dtype,
        offload=options.offload,
        mode=options.mode,
        rounds=options.rounds,
        latent_steps=options.latent_steps,
        max_new_tokens=options.max_new_tokens,
        prompt_tokens=options.prompt_tokens,
        batch_size=options.batch_size,
        trust_remote_code=options.trust_remote_code,
        allow_outside=options.allow_outside,
        allow_hub=options.allow_hub,
    )
    if options.json:
        dump({**asdict(table), "devices": [{**asdict(line), "fits": line.fits} for line in table.devices]})
    else:
        print(render(table))
    return 0
