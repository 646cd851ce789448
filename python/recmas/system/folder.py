"""A system on disk: ``system.json``, ``links/<name>/`` and, for models that are not on the hub, ``agents/<role>/``.

``system.json`` names the folders of all parts, and renaming it into place is what replaces a system. A save writes its
parts into folders that are not there yet, ``links/<name>.2/`` beside ``links/<name>/``, and removes what is no longer
named when the new ``system.json`` is on the disk. Cut short at any moment it leaves the old system or the new one; the
next save removes what it left.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from safetensors.torch import save as to_safetensors

from recmas.agents.agent import Agent
from recmas.agents.loading import is_gguf
from recmas.config.parts import checksums, is_hub_id
from recmas.config.pattern import LinkKey, Pattern
from recmas.config.system_json import FILE_NAME, SystemSpec, edge_name, read_spec, spec_text, write_spec
from recmas.files import replacing, replacing_folder, sync, write_atomically
from recmas.files.locks import one_writer
from recmas.files.reading import inside
from recmas.files.writing import naming, sync_tree
from recmas.system.system import System

EDGE_SCORES = "links/edge_scores.safetensors"
_ROUND = re.compile(r"@([1-9][0-9]{0,2})(\.[0-9]+)?$")
"""Ends the name of the folder of a link of one round; a later save's has a number after it."""


def describe(system: System, folder: Path | None = None) -> SystemSpec:
    """What ``system.json`` says of `system`, checksums aside.

    Args:
        system: what is described.
        folder: where it is to be, if something stands there: that is not overwritten, and agents that were loaded from
            there stay where they are.
    """
    taken: set[str] = set()

    def free(path: str) -> str:
        """`path`, or the next name of that part: ``a-b`` to ``c`` and ``a`` to ``b-c`` would have one."""
        there = (name for name in _numbered(path) if folder is None or not os.path.lexists(folder / name))
        taken.add(found := next(name for name in there if name not in taken))
        return found

    homes: dict[tuple[int, int], str] = {}
    agents = {}
    for role, agent in system.agents.items():
        who = (id(agent.model), id(agent.tokenizer))
        if who not in homes:
            if _is_local(agent):
                homes[who] = _home(agent, folder) or free(f"agents/{role}")
            else:
                homes[who] = str(agent.source)
        inner_link = free(f"links/{role}") if role in system.inner_links else None
        agents[role] = replace(system.settings[role], model=homes[who], inner_link=inner_link)
    outer_links = {key: free(_link_path(key)) for key in system.outer_links}
    edge_scores = free(EDGE_SCORES) if system.edge_scores else None
    return SystemSpec(system.pattern, agents, outer_links, system.defaults, edge_scores)


def check_place(folder: Path) -> None:
    """Raise ValueError where a system cannot be saved: a file, or a folder of something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder")
    if not is_new(folder):
        if not (folder / FILE_NAME).exists():
            raise ValueError(f"{folder}: exists and is not a system; nothing was written")
        for kind in ("links", "agents"):
            inside(folder, kind, str(folder))


def is_new(folder: Path) -> bool:
    """Whether nothing stands at `folder`, or an empty folder."""
    return not folder.is_dir() or not any(folder.iterdir())


def save(system: System, folder: Path, beside: Mapping[str, str | None] | None = None) -> None:
    """Write `system` into `folder`: a new one, or one that holds a system, which is replaced whole.

    Args:
        system: what is written.
        folder: where.
        beside: what a new one begins with: files by their text, and empty folders, None.

    Raises:
        ValueError: as `check_place`, settings that could not be read again, a damaged ``system.json`` in the way, or
            another process is writing there.
        OSError: the disk is full, and so on; names a path. The old system stays.
    """
    check_place(folder)
    spec_text(folder, describe(system))  # before the parts, which may be large
    if is_new(folder):
        with replacing_folder(folder) as fresh:
            _write(system, describe(system), fresh, SystemSpec(system.pattern, {}))
            for name, text in (beside or {}).items():
                (fresh / name if text is None else (fresh / name).parent).mkdir(parents=True, exist_ok=True)
                if text is not None:
                    write_atomically(fresh / name, text)
        return
    with one_writer(folder):
        old = read_spec(folder)
        patterns = {system.pattern, old.pattern}
        _sweep(folder, patterns)
        try:
            _write(system, describe(system, folder), folder, old)
        finally:
            _sweep(folder, patterns)  # the old parts, or those of a save that failed


def _write(system: System, spec: SystemSpec, folder: Path, old: SystemSpec) -> None:
    """Write the parts that `spec` names, but for agents that `old` has there, and at last ``system.json`` itself."""
    with naming(folder):
        written: list[str] = []
        for role, agent in system.agents.items():
            home = spec.agents[role].model
            if _is_local(agent) and home not in written and _home(agent, folder) != home:
                _save_agent(agent, folder / home)
                written.append(home)
        for role, link in system.inner_links.items():
            link.save_pretrained(folder / str(spec.agents[role].inner_link))
            written.append(str(spec.agents[role].inner_link))
        for key, link in system.outer_links.items():
            link.save_pretrained(folder / spec.outer_links[key])
            written.append(spec.outer_links[key])
        if spec.edge_scores is not None:
            (folder / spec.edge_scores).parent.mkdir(parents=True, exist_ok=True)
            scores = {edge_name(key): score.detach().cpu() for key, score in system.edge_scores.items()}
            with replacing(folder / spec.edge_scores) as file:
                file.write(to_safetensors(scores))
            written.append(spec.edge_scores)
        kept = {name: digest for name, digest in old.sha256.items() if _within(name, _parts(spec))}
        spec.sha256 = kept | checksums(folder, written)
        for name in written:
            sync_tree(folder / name)
        for parent in dict.fromkeys((folder / name).parent for name in written):
            sync(parent)
        sync(folder)
        write_spec(folder, spec)


def _save_agent(agent: Agent, folder: Path) -> None:
    try:
        agent.save_pretrained(folder)
    except Exception as error:  # safetensors and tokenizers each raise their own, and name no file
        if "os error" not in str(error):
            raise
        raise OSError(f"{folder}: cannot be written: {error}") from None


def _parts(spec: SystemSpec) -> set[str]:
    """Paths of all parts that a ``system.json`` names."""
    links = [agent.inner_link for agent in spec.agents.values()]
    scores = (spec.edge_scores or EDGE_SCORES) if spec.pattern.combine == "weighted" else None
    named = chain((agent.model for agent in spec.agents.values()), links, spec.outer_links.values(), [scores])
    return {os.path.normpath(name) for name in named if name}


def _names(pattern: Pattern, folder: Path) -> list[str]:
    """Paths that a save gives to the parts of a system of this pattern, in a new folder, and for rounds found here."""
    rounds = {int(found.group(1)) for path in folder.glob("links/*@*") if (found := _ROUND.search(path.name))}
    edges = pattern.edges(2)
    outer = [*map(_link_path, edges), *(_link_path((*edge, round)) for edge in edges for round in rounds)]
    inner, agents = ([f"{kind}/{role}" for role in pattern.roles] for kind in ("links", "agents"))
    return [EDGE_SCORES, *inner, *outer, *agents]


def _link_path(key: LinkKey) -> str:
    return f"links/{key[0]}-{key[1]}" + "".join(f"@{round}" for round in key[2:])


def _numbered(path: str) -> Iterable[str]:
    """`path`, and the names that later saves may give to that part: ``links/planner``, ``links/planner.2``, ..."""
    stem, suffix = os.path.splitext(path)
    return chain([path], (f"{stem}.{number}{suffix}" for number in count(2)))


def _sweep(folder: Path, patterns: Iterable[Pattern]) -> None:
    """Remove parts with names that saves give to systems of these patterns, unless ``system.json`` names them."""
    kept = _parts(read_spec(folder))
    for path in {name for pattern in patterns for name in _names(pattern, folder)}:
        for name in _numbered(path):
            if not os.path.lexists(folder / name):
                if name != path:
                    break
            elif not any(_within(named, [name]) or _within(name, [named]) for named in kept):
                place = folder / name
                shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}/") for part in parts)


def _home(agent: Agent, folder: Path | None) -> str | None:
    """The path of an agent that was loaded from `folder`, relative to it; None for others."""
    if folder is None or agent.source is None or not Path(agent.source).is_dir():
        return None
    place, root = Path(agent.source).resolve(), folder.resolve()
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else None


def _is_local(agent: Agent) -> bool:
    return agent.source is None or Path(agent.source).is_dir() or is_gguf(agent.source) or not is_hub_id(agent.source)
