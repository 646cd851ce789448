"""``recmas init``: a new system of given models, with fresh links."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import NonNegativeInt, PositiveInt

from recmas.cli.common import dump
from recmas.cli.parser import PAIRS, CommandLineParser
from recmas.config.pattern import NAMED, Pattern

if TYPE_CHECKING:
    from jsonargparse import Namespace


def add_options(parser: CommandLineParser) -> None:
    parser.add_argument("system", type=str, help="folder to make")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--pattern",
        type=str,
        default="sequential",
        help=f"{', '.join(NAMED)}, or stages such as 'reader,coder>writer': ',' within a stage, '>' between stages",
    )
    parser.add_argument(
        "--combine",
        type=str,
        default="slots",
        help="where several senders meet: slots (one each), mean, or weighted (learned)",
    )
    parser.add_argument(
        "--exchange",
        type=str,
        default="stage",
        help="stage, or all: from round 2 on every agent also reads every other one",
    )
    parser.add_argument("--models", type=PAIRS, required=True, help="folder or hub id by role: planner=PATH,solver=ID")
    parser.add_argument(
        "--rounds", type=PositiveInt, default=3, help="the system's default; links are made for so many"
    )
    parser.add_argument(
        "--links-per-round", action="store_true", help="an outer link of its own for each round (default: one for all)"
    )
    parser.add_argument("--latent-steps", type=NonNegativeInt, default=32, help="the system's default")
    parser.add_argument(
        "--link-scale",
        type=str,
        default="embedding",
        help="size of what fresh links write: embedding (that of the embeddings around it) or none",
    )
    parser.add_argument("--dtype", type=str, default="auto", help="of the models: auto, float32, bfloat16 or float16")
    parser.add_argument("--seed", type=int, default=0, help="of the links")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(options: Namespace) -> int:
    pattern = read_pattern(options.pattern, options.combine, options.exchange)
    folder = Path(options.system)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; nothing was written")
    for role in options.models:
        if role not in pattern.roles:
            raise ValueError(f"--models: unknown role {role!r}; the pattern has {', '.join(pattern.roles)}")
    import transformers

    from recmas.config.parts import needed_flags
    from recmas.dtypes import DTYPES
    from recmas.recursive_mas import RecursiveMAS

    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype: {options.dtype!r} is not one of {', '.join(DTYPES)}")
    transformers.utils.logging.disable_progress_bar()
    mas = RecursiveMAS.create(
        options.models,
        pattern,
        link_scale=options.link_scale,
        rounds=options.rounds,
        latent_steps=options.latent_steps,
        links_per_round=options.links_per_round,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        seed=options.seed,
    )
    mas.save_pretrained(folder)
    links = [*mas.inner_links.values(), *mas.outer_links.values()]
    parameters = sum(weight.numel() for link in links for weight in link.parameters())
    if options.json:
        dump({"system": str(folder), "links": len(links), "link_parameters": parameters})
    else:
        print(f"{folder}: {len(mas.agents)} agents, {len(links)} untrained links of {parameters:,} parameters in all")
        flags = "".join(f" {flag}" for flag in needed_flags(folder, mas.spec()))
        print(f"edit the prompts in system.json, then train the links: recmas train inner | warmup | outer{flags}")
        if flags:
            print(f"its models are not in the folder, so every command that loads it needs{flags}")
    return 0


def read_pattern(name: str, combine: str, exchange: str) -> Pattern:
    """One of the named patterns, or the stages written with ',' and '>'."""
    if name in NAMED:
        stages = NAMED[name].stages
    elif ">" in name:
        stages = tuple(tuple(role.strip() for role in stage.split(",")) for stage in name.split(">"))
    else:
        raise ValueError(f"--pattern: {name!r} is neither one of {', '.join(NAMED)} nor stages such as 'a,b>c'")
    return Pattern(stages, combine, exchange)
