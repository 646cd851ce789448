"""``recmas info``: kernels and sandboxes; with a system, the memory that it will take and what is off for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import PositiveInt

from recmas.cli.common import EXCHANGE, add_accelerate, add_answering, add_device, add_offload, dump
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
        help="folder of a system: show the memory that it will take, without loading it, and what is off for its "
        "models, small ones of which are loaded for that alone (default: show the kernels and the sandbox of tools)",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add_device(parser)
    add_offload(parser)
    add_accelerate(parser)
    add_answering(parser, (*EXCHANGE, "max_new_tokens"))
    parser.add_argument("--prompt-tokens", type=PositiveInt, default=512, help="tokens of a prompt, messages aside")
    parser.add_argument("--batch-size", type=PositiveInt, default=BATCH_SIZE, help="questions answered at once")
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(options: Namespace) -> int:
    if options.system is None:
        return _machine(options.json)
    from recmas.sizing.report import memory_table, render

    table = memory_table(
        options.system,
        device=options.device,
        dtype=options.dtype,
        offload=options.offload,
        accelerate=not options.no_accelerate,
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
    off = _off(options)
    if options.json:
        devices = [{**asdict(line), "fits": line.fits} for line in table.devices]
        dump({**asdict(table), "devices": devices, "off": off})
    else:
        print(render(table))
        for line in dict.fromkeys(off.values()):
            print(f"{', '.join(role for role, own in off.items() if own == line)}: {line}")
    return 0


def _off(options: Namespace) -> dict[str, str]:
    """By role, what is off for the role's model."""
    import transformers

    from recmas.agents.checking import off_of_checkpoint
    from recmas.config.parts import Trust, model_source
    from recmas.config.system_json import read_spec
    from recmas.training.proofs import TRAINING

    transformers.utils.logging.disable_progress_bar()
    folder, trust = Path(options.system), Trust(options.allow_outside, options.allow_hub)
    spec, root = read_spec(folder), None if trust.outside else folder
    found: dict[str, str] = {}
    told: dict[tuple[str, str], str] = {}
    for role, agent in spec.agents.items():
        dtype = agent.dtype if options.dtype == "auto" else options.dtype
        model = model_source(folder, spec, role, trust), dtype
        if model not in told:
            code = options.trust_remote_code
            told[model] = off_of_checkpoint(*model, role, tuple(TRAINING), trust_remote_code=code, root=root)
        found[role] = told[model]
    return found


def _machine(as_json: bool) -> int:
    """What runs here: kernels, and the sandbox of tools and foreign code."""
    from recmas.sandbox import reasons
    from recmas_kernels import info

    kernels, sandboxes = info.collect(), reasons()
    if as_json:
        dump({**kernels, "sandboxes": sandboxes})
        return 0
    chosen = next((name for name, reason in sandboxes.items() if reason is None), None)
    print(info.render(kernels))
    print(f"\nsandbox of tools and foreign code: {chosen or 'none, so they run with --unsafe only'}")
    for name, reason in sandboxes.items():
        if name != chosen:
            print(f"  {name}: {reason or 'works, too'}")
    return 0
