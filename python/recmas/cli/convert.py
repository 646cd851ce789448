"""``recmas convert upstream|safetensors|pt``: to and from the reference implementation's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recmas.cli.common import add_unsafe, dump, sandbox
from recmas.cli.parser import CommandLineParser
from recmas.upstream.clone import CODE_FORMS
from recmas.upstream.styles import STYLES, TASKS

if TYPE_CHECKING:
    from jsonargparse import Namespace

DIRECTIONS = {
    "upstream": "make a system of one of the reference implementation's",
    "safetensors": "make a link folder of a .pt state dict or of a role folder",
    "pt": "write a link as a .pt state dict, or a system as the folders the reference implementation loads",
}


def add_options(parser: CommandLineParser) -> None:
    def add(direction: str, command: CommandLineParser) -> None:
        {"upstream": _add_upstream, "safetensors": _add_safetensors, "pt": _add_pt}[direction](command)
        command.add_argument("--json", action="store_true", help="print JSON")

    parser.add_commands("direction", DIRECTIONS, add)


def execute(options: Namespace) -> int:
    direction, chosen = options.direction, options[options.direction]
    summary, text = {"upstream": _upstream, "safetensors": _safetensors, "pt": _pt}[direction](chosen)
    if chosen.json:
        dump(summary)
    else:
        print(text)
    return 0


def _add_upstream(parser: CommandLineParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--code",
        type=str,
        required=True,
        help="your clone of the reference implementation; its prompt builders are run, in a sandbox",
    )
    parser.add_argument("--style", type=str, required=True, help=f"which released system: {', '.join(STYLES)}")
    parser.add_argument(
        "--weights",
        type=str,
        default=None,
        help="folder with a folder per repository, under its hub name or the role's (default: take them from the hub)",
    )
    parser.add_argument(
        "--override",
        type=str,
        action="append",
        default=None,
        help="ROLE=PATH or ROLE=HUB_ID: locally trained weights of one role, or of outer; may be repeated",
    )
    parser.add_argument(
        "--task",
        type=str,
        default="math",
        help=f"prompts and links for: {', '.join(TASKS)}; choice expects the lettered options in the question, and its "
        "prompts add the instruction to choose",
    )
    parser.add_argument(
        "--code-form",
        type=str,
        default="complete",
        help=f"of --task code: {' or '.join(CODE_FORMS)} (rows then carry its name in the field fn_name)",
    )
    parser.add_argument(
        "--reference-quirks",
        action="store_true",
        help="keep oddities of its prompts: a fixed round number, mathematical feedback on code, GPQA's answer format",
    )
    parser.add_argument("--out", type=str, required=True, help="folder of the system to make")
    add_unsafe(parser, "the clone's prompt builders")


def _add_safetensors(parser: CommandLineParser) -> None:
    parser.add_argument("source", type=str, help=".pt state dict, or folder with adapter.pt and adapter_config.json")
    parser.add_argument("out", type=str, help="link folder to make")
    parser.add_argument("--adapter-type", type=str, default=None, help="of the link, where no file beside it names it")


def _add_pt(parser: CommandLineParser) -> None:
    parser.add_argument("source", type=str, help="folder of a link or of a system")
    parser.add_argument("out", type=str, help=".pt file to write for a link, folder to make for a system")
    parser.add_argument(
        "--allow-outside", action="store_true", help="read models and links that the system names in other folders"
    )


def _upstream(options: Namespace) -> tuple[dict[str, Any], str]:
    from recmas.config.parts import needed_flags
    from recmas.upstream import convert_upstream

    overrides = {}
    for pair in options.override or []:
        role, sign, path = pair.partition("=")
        if not (role and sign and path):
            raise ValueError(f"--override: {pair!r} is not of the form ROLE=PATH")
        overrides[role.strip()] = path
    spec = convert_upstream(
        options.code,
        options.style,
        options.out,
        weights=options.weights,
        overrides=overrides,
        task=options.task,
        code_form=options.code_form,
        reference_quirks=options.reference_quirks,
        sandbox=sandbox(options),
    )
    inner = sum(agent.inner_link is not None for agent in spec.agents.values())
    summary = {
        "system": options.out,
        "models": {role: agent.model for role, agent in spec.agents.items()},
        "inner_links": inner,
        "outer_links": len(spec.outer_links),
        "rounds": spec.defaults.rounds,
        "latent_steps": spec.defaults.latent_steps,
    }
    text = (
        f"{options.out}: {len(spec.agents)} agents, {inner} inner and {len(spec.outer_links)} outer links, "
        f"{spec.defaults.rounds} rounds of {spec.defaults.latent_steps} latent steps; models stay where they are"
    )
    flags = needed_flags(Path(options.out), spec)
    text += f"; commands load it with {' '.join(flags)}"
    return summary, text


def _safetensors(options: Namespace) -> tuple[dict[str, Any], str]:
    from recmas.upstream import link_to_safetensors

    config = link_to_safetensors(options.source, options.out, adapter_type=options.adapter_type)
    text = f"{options.out}: an {config.kind} link of {config.in_features} to {config.out_features} features"
    return {"link": options.out, **config.to_dict()}, text


def _pt(options: Namespace) -> tuple[dict[str, Any], str]:
    from recmas.upstream import to_pt

    written = [str(path) for path in to_pt(options.source, options.out, allow_outside=options.allow_outside)]
    return {"written": written}, f"{options.out}: {len(written)} state dicts"
