"""`convert_upstream`: a released or locally trained system of the reference implementation becomes one of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from recmas.config.parts import checksums
from recmas.config.pattern import Edge, LinkKey
from recmas.config.system_json import AgentSpec, Decoding, Defaults, SystemSpec, edge_name, write_spec
from recmas.files import replacing_folder
from recmas.prompts.template import Template
from recmas.upstream import weights as files
from recmas.upstream.clone import CODE_FORMS, ClonePrompts, read_prompts
from recmas.upstream.styles import OUTER, TASKS, TEMPERATURE, TOP_P, Style, style_named
from recmas_kernels import FusedRecursiveLink

Folder = str | os.PathLike[str]


def convert_upstream(
    code: Folder,
    style: str,
    out: Folder,
    *,
    weights: Folder | None = None,
    overrides: Mapping[str, str] | None = None,
    task: str = "math",
    code_form: str = "complete",
    reference_quirks: bool = False,
    sandbox: str | None = None,
) -> SystemSpec:
    """Write the system of one released style into `out`: ``system.json`` and ``links/``; models are linked, not copied.

    Rounds, latent steps and sampling are those the reference implementation recommends for the style and task.

    Args:
        code: the user's clone of the reference implementation; its prompt builders are run, in a sandbox.
        style: one of `styles.STYLES`.
        out: folder to make; may exist if empty.
        weights: holds a folder per repository, under the repository's name or the role's; None takes the hub's.
        overrides: folder or hub id by role, or by "outer": of that one, instead of `weights`.
        task: "math", "code" or "choice" (lettered options): which prompts, and which links where a release has several
            (choice uses those of math).
        code_form: on code, "complete" programs or a "function" (rows then carry its name in the field fn_name).
        reference_quirks: keep oddities of the reference's prompts; see `clone.read_prompts`.
        sandbox: in which the clone's code runs; see `clone.read_prompts`.

    Returns:
        What ``system.json`` says.

    Raises:
        ValueError: anything missing, unknown, ambiguous or of a wrong width; one line, and nothing is written.
    """
    chosen = style_named(style)
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not one of {', '.join(TASKS)}")
    if code_form not in CODE_FORMS:
        raise ValueError(f"code_form: {code_form!r} is not one of {', '.join(CODE_FORMS)}")
    place = new_folder(out)
    prompts = read_prompts(
        Path(code).expanduser(),
        chosen.family,
        task,
        code_form=code_form,
        reference_quirks=reference_quirks,
        sandbox=sandbox,
    )
    places = files.find_places(chosen, None if weights is None else Path(weights).expanduser(), overrides or {})
    widths = {role: files.model_width(role, places[role]) for role in chosen.family.pattern.roles}
    link_task = "code" if task == "code" else "math"
    outer = _outer_links(chosen, places[OUTER].folder, widths, link_task)
    senders = {source for source, _ in outer}
    inner = {
        role: _inner_link(role, places[role].folder, width, link_task)
        for role, width in widths.items()
        if role in senders
    }
    spec = _spec(chosen, task, places, prompts, inner, outer)
    with replacing_folder(place) as fresh:
        for role, link in inner.items():
            link.save_pretrained(fresh / str(spec.agents[role].inner_link))
        for edge, link in outer.items():
            link.save_pretrained(fresh / spec.outer_links[edge])
        spec.sha256 = checksums(fresh, [path.relative_to(fresh).as_posix() for path in fresh.glob("links/*")])
        write_spec(fresh, spec)
    return spec


def new_folder(path: Folder) -> Path:
    """`path` if nothing stands there, or an empty folder; else ValueError."""
    place = Path(os.path.abspath(Path(path).expanduser()))
    if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{place}: exists already; nothing was written")
    return place


def read_link(path: Path, adapter_type: str | None, where: str) -> FusedRecursiveLink:
    """A link file of the reference implementation; ValueError begins with `where` and names the file."""
    try:
        return FusedRecursiveLink.from_upstream(path, adapter_type)
    except (ValueError, OSError) as error:
        advice = ""
        if adapter_type is None and "adapter_type" in str(error):
            advice = f" (in {files.INNER_CONFIG} beside it, or in the manifest)"
        raise ValueError(f"{where}: {error}{advice}") from None


def _inner_link(role: str, folder: Path, width: int, task: str) -> FusedRecursiveLink:
    path, adapter_type = files.find_inner(role, folder, task)
    link = read_link(path, adapter_type, role)
    _check(link, "inner", (width, width), f"{role}: {path}")
    return link


def _outer_links(style: Style, folder: Path, widths: Mapping[str, int], task: str) -> dict[Edge, FusedRecursiveLink]:
    links = {}
    for edge, file in files.find_outer(style.family, folder, task).items():
        link = read_link(file.path, file.adapter_type, edge_name(edge))
        found = (link.config.in_features, link.config.out_features)
        for said, has, name in zip((file.in_features, file.out_features), found, ("in_dim", "out_dim"), strict=True):
            if said is not None and said != has:
                raise ValueError(f"{file.manifest}: {name} of {file.path.name} is {said}, its weights have {has}")
        _check(link, "outer", (widths[edge[0]], widths[edge[1]]), f"{edge_name(edge)}: {file.path}")
        links[edge] = link
    return links


def _check(link: FusedRecursiveLink, kind: str, widths: tuple[int, int], where: str) -> None:
    if link.config.kind != kind:
        raise ValueError(f"{where} holds an {link.config.kind} link, expected an {kind} one")
    found = (link.config.in_features, link.config.out_features)
    if found != widths:
        raise ValueError(f"{where} maps {found[0]} to {found[1]} features, the models need {widths[0]} to {widths[1]}")


def _spec(
    style: Style,
    task: str,
    places: Mapping[str, files.Place],
    prompts: ClonePrompts,
    inner: Mapping[str, FusedRecursiveLink],
    outer: Mapping[Edge, FusedRecursiveLink],
) -> SystemSpec:
    pattern = style.family.pattern
    latent_steps, rounds = style.settings[task]
    if pattern.edges(2) - outer.keys():
        rounds = 1
    decoding = Decoding(style.max_new_tokens(task), TEMPERATURE[task], TOP_P)
    for visit in pattern.visits(2):
        template = Template(prompts.prompts[visit.role].at(visit.round))
        template.check_senders(visit.senders, False, f"prompt of {visit.role!r}, round {visit.round}")
    agents = {
        role: AgentSpec(
            model=places[role].model,
            prompt=prompts.prompts[role],
            inner_link=f"links/{role}" if role in inner else None,
            system=prompts.system,
            decoding=decoding,
        )
        for role in pattern.roles
    }
    links: dict[LinkKey, str] = {edge: f"links/{edge[0]}-{edge[1]}" for edge in outer}
    return SystemSpec(pattern, agents, links, Defaults(rounds, latent_steps))
