"""What the documentation says is so: its code runs, its links and paths exist, and it names every public name."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import recmas
import recmas.evaluation
import recmas.training
import recmas_kernels
from recmas.cli import main
from tests.runtime.commands import script

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "benchmarks/README.md",
            "examples/relay/README.md",
            "examples/trio/README.md",
        )
    ),
]
SKIPPED_FOLDERS = {".git", ".venv", "build", "dist", "__pycache__"}
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n$")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Names that CMake or an f-string makes, and that no user sets.
INNER_VARIABLES = {"RECMAS_SOURCES", "RECMAS_BUILD_"}


class Block(NamedTuple):
    """A ``python`` block of a page; `left_out` is the reason that the marker before it gives for not running it."""

    code: str
    left_out: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        marker = NOT_RUN.search(text[: match.start()])
        found.append(Block(match.group(1), marker.group(1) if marker else None))
    return found


def run_afresh(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in `folder`, which sees the examples as a clone's root would."""
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # models this small lose time to threads
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_blocks_of_a_page_run_in_order(name: str, tmp_path: Path) -> None:
    code = [block.code for block in blocks(ROOT / name) if block.left_out is None]
    assert len(code) >= 2
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "page.py").write_text("\n".join(code), encoding="utf-8")
    if name == "README.md":
        done = run_afresh(["page.py"], tmp_path)
        assert done.returncode == 0, done.stderr
    else:
        ended = script(tmp_path, tmp_path / "page.py", EXAMPLES)
        assert ended.status == 0, ended.err


def test_one_block_is_left_out() -> None:
    reasons = [block.left_out for name in ("README.md", "docs/tutorial.md") for block in blocks(ROOT / name)]
    assert [reason for reason in reasons if reason] == ["loads models from a hub"]
    markers = sum(page.read_text(encoding="utf-8").count("<!-- not run") for page in PAGES)
    assert markers == 1, "a marker that stands before no python block leaves nothing out"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "tiny_models.py"))
def test_example_runs_and_is_short(name: str, tmp_path: Path) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 60
    (tmp_path / "examples").symlink_to(EXAMPLES)
    ended = script(tmp_path, tmp_path / "examples" / name)
    assert ended.status == 0, ended.err
    assert ended.out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_imports_public_names_only(page: Path) -> None:
    public = {"recmas", "recmas.training", "recmas.evaluation", "recmas_kernels"}
    for block in blocks(page):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("recmas", "recmas_kernels"):
                assert node.module in public
                exported = importlib.import_module(str(node.module)).__all__
                assert {alias.name for alias in node.names} <= set(exported)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target


def repository() -> set[str]:
    """Every file and folder of the repository, relative to its root."""
    found: set[str] = set()
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in SKIPPED_FOLDERS and not name.endswith(".egg-info")]
        found |= {os.path.relpath(os.path.join(folder, name), ROOT).replace(os.sep, "/") for name in [*names, *files]}
    return found


def test_paths_in_backticks_exist() -> None:
    """A path is found from the root, or as the end of one: pages about a folder name its files as they lie there."""
    known = repository()
    ends = {path[start:] for path in known for start in [0, *(m.end() for m in re.finditer("/", path))]}
    missing = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for quoted in re.findall(r"`([\w.][\w./-]*)`", text):
            folder = quoted.endswith("/") and quoted.rstrip("/") in ends
            is_path = re.search(r"\.(py|h|cpp|cu|inc|md|toml|yml|sh|txt|svg)$", quoted) or quoted.endswith("/")
            if is_path and not folder and quoted not in ends:
                missing.append(f"{page.relative_to(ROOT)}: {quoted}")
    # Of a user's system and of a run, not of the repository.
    assert [entry for entry in missing if entry.split(": ")[1] not in ("links/", "agents/", "summary.md")] == []


def test_every_public_name_has_an_entry_in_the_reference() -> None:
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)$", reference, re.MULTILINE))
    wanted = {
        f"{package.__name__}.{name}"
        for package in (recmas, recmas.training, recmas.evaluation, recmas_kernels)
        for name in package.__all__
        if not name.startswith("__")
    }
    assert entries == wanted


def command_lines(page: Path) -> list[list[str]]:
    """The words of every line of a page that calls ``recmas``, comments cut off."""
    lines = re.findall(r"^ {4}(recmas .+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [line.split("#")[0].split()[1:] for line in lines]


def test_options_in_command_lines_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for words in command_lines(page):
            options = [word.split("=")[0] for word in words if word.startswith("--") and word != "--traceback"]
            command = tuple(words[: 2 if words[0] in ("train", "lab", "convert") else 1])
            if command not in helps:
                with pytest.raises(SystemExit) as ended:
                    main([*command, "--help"])
                assert ended.value.code == 0, command
                helps[command] = capsys.readouterr().out
            known = re.findall(r"--[\w-]+", helps[command])
            assert set(options) <= set(known), (page.name, command)
    assert len(helps) >= 12


def test_every_variable_of_the_environment_is_explained() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "recmas_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"RECMAS_[A-Z_]+", path.read_text(encoding="utf-8"))}
    explained = set(re.findall(r"RECMAS_[A-Z_]+", (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")))
    assert explained == read - INNER_VARIABLES


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_citation_names_this_version() -> None:
    assert f"\nversion: {recmas_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
