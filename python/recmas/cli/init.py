"""``recmas init``: a new system of given models, with fresh links."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import NonNegativeInt, PositiveInt

from recmas.cli.common import dump
from recmas.cli.parser import PAIRS, CommandLineParser
from recmas.config.pattern import NAMED, Pattern
from recmas.config.presets import PRESETS

if TYPE_CHECKING:
    from jsonargparse import Namespace


def add_options(parser: CommandLineParser) -> None:
    parser.add_argument("system", type=str, help="folder to make")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument(
        "--pattern",
        type=str,
        default="sequential",
        help=f"{', '.join(NAMED)}; {' or '.join(_named(links=False))}, which exchange texts and have no links; "
        f"{' or '.join(_named(links=True))}, one agent that reads its own latents; or stages such as "
        "'reader,coder>writer': ',' within a stage, '>' between stages",
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
    parser.add_argument(
        "--models",
        type=PAIRS,
        required=True,
        help="folder or hub id by role: planner=PATH,solver=ID; '*' stands for any part of a name: 'expert*=PATH'",
    )
    parser.add_argument(
        "--rounds",
        type=PositiveInt,
        default=None,
        help="the system's default; links are made for so many (default: 3, of moa 1)",
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
    preset, models = PRESETS.get(options.pattern), models_by_role(options.models, pattern)
    import transformers

    from recmas.config.parts import needed_flags
    from recmas.dtypes import DTYPES
    from recmas.recursive_mas import RecursiveMAS

    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype: {options.dtype!r} is not one of {', '.join(DTYPES)}")
    transformers.utils.logging.disable_progress_bar()
    mas = RecursiveMAS.create(
        models,
        pattern,
        links=preset is None or preset.links,
        link_scale=options.link_scale,
        prompts=None if preset is None else preset.prompts,
        rounds=options.rounds or (3 if preset is None else preset.rounds),
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
        made = f"{len(links)} untrained links of {parameters:,} parameters in all" if links else "no links"
        print(f"{folder}: {len(mas.agents)} agents, {made}")
        flags = "".join(f" {flag}" for flag in needed_flags(folder, mas.spec()))
        if links:
            print(f"edit the prompts in system.json, then train the links: recmas train inner | warmup | outer{flags}")
        else:
            print(f"its agents exchange texts: recmas run | eval {folder} --mode text{flags}")
        if flags:
            print(f"its models are not in the folder, so every command that loads it needs{flags}")
    return 0


def _named(links: bool) -> list[str]:
    """Presets with links, or without."""
    return [name for name, preset in PRESETS.items() if preset.links is links]


def read_pattern(name: str, combine: str, exchange: str) -> Pattern:
    """One of the named patterns, or the stages written with ',' and '>'."""
    if name in PRESETS and (combine, exchange) != ("slots", "stage"):
        raise ValueError(f"--pattern: {name} has prompts with a slot per sender; leave --combine and --exchange out")
    if name in NAMED or name in PRESETS:
        stages = (NAMED[name] if name in NAMED else PRESETS[name].pattern).stages
    elif ">" in name:
        stages = tuple(tuple(role.strip() for role in stage.split(",")) for stage in name.split(">"))
    else:
        known = ", ".join([*NAMED, *PRESETS])
        raise ValueError(f"--pattern: {name!r} is neither one of {known} nor stages such as 'a,b>c'")
    return Pattern(stages, combine, exchange)


def models_by_role(given: Mapping[str, str], pattern: Pattern) -> dict[str, str]:
    """A model for each role that one of the names means; a name without ``*`` goes before one with it."""
    models: dict[str, str] = {}
    for name in sorted(given, key=lambda name: "*" in name, reverse=True):
        meant = [role for role in pattern.roles if fnmatch.fnmatchcase(role, name)]
        if not meant:
            raise ValueError(f"--models: unknown role {name!r}; the pattern has {', '.join(pattern.roles)}")
        models.update(dict.fromkeys(meant, given[name]))
    return models
