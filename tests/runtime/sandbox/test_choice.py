"""Which sandbox is chosen, and that nothing runs where none works unless it is asked to."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from recmas.cli import main
from recmas.sandbox import Limits, choice, choose, reasons, run
from recmas.tools import PythonTool
from recmas.upstream.clone import read_prompts
from recmas.upstream.styles import STYLES
from tests.runtime.upstream.fakes import BUILDERS, write_clone

FAMILY = STYLES["sequential_light"].family


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which no sandbox works."""
    monkeypatch.setattr(choice, "_reason", lambda name: f"no {name} today")


def test_the_first_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    working = {"bubblewrap": None, "landlock": None}
    monkeypatch.setattr(choice, "_reason", lambda name: working[name])
    assert choose() == "bubblewrap"
    working["bubblewrap"] = "no user namespaces"
    assert choose() == "landlock"
    assert reasons() == {"bubblewrap": "no user namespaces", "landlock": None}
    with pytest.raises(ValueError, match=r"^sandbox: bubblewrap does not work here: no user namespaces$"):
        choose("bubblewrap")


@pytest.mark.usefixtures("nothing")
def test_without_a_sandbox_nothing_runs_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "sandbox: none works here (bubblewrap: no bubblewrap today; landlock: no landlock today)"
    with pytest.raises(ValueError, match=r"^[^\n]*--unsafe[^\n]*$") as caught:
        PythonTool()
    assert str(caught.value).startswith(why)
    mark = tmp_path / "mark"
    clone = write_clone(tmp_path / "clone", builders=f"open({str(mark)!r}, 'w')\n{BUILDERS}")
    command = ["convert", "upstream", "--code", str(clone), "--style", "sequential_light", "--out", str(tmp_path / "o")]
    assert main(command) == 2
    assert f"recmas: error: {why}" in capsys.readouterr().err
    assert not mark.exists()
    with pytest.raises(ValueError, match="none works here"):
        read_prompts(clone, FAMILY, "math")
    assert read_prompts(clone, FAMILY, "math", sandbox="none").system == "Mind your manners."
    assert mark.exists()
    assert PythonTool(sandbox="none").run("6 * 7") == "42"


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize("command", ["run", "eval"])
def test_tools_are_refused_before_anything_is_loaded(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"run": ["--question", "?"], "eval": ["--data", "examples/relay/questions.jsonl"]}[command]
    assert main([command, "nowhere", *data, "--tools", "python"]) == 2
    assert "recmas: error: sandbox: none works here" in capsys.readouterr().err
    assert main([command, "nowhere", *data, "--tools", "python", "--unsafe"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_info_says_which(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_reason", {"bubblewrap": "no bwrap", "landlock": None}.get)
    assert main(["info"]) == 0
    assert capsys.readouterr().out.endswith("sandbox of tools and foreign code: landlock\n  bubblewrap: no bwrap\n")
    assert main(["info", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sandboxes"] == {"bubblewrap": "no bwrap", "landlock": None}
    assert shown["recmas_kernels"]
    monkeypatch.setattr(choice, "_reason", lambda name: "absent")
    assert main(["info"]) == 0
    assert "sandbox of tools and foreign code: none, so they run with --unsafe only" in capsys.readouterr().out


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^sandbox: 'docker' is not one of bubblewrap, landlock, none$"):
        choose("docker")


@pytest.mark.skipif(sys.platform != "linux", reason="on Linux the tools are tried")
def test_reasons_are_what_the_trial_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh = choice._reason.__wrapped__
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fresh("bubblewrap") == "bubblewrap is not installed (apt-get install bubblewrap)"
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho 'bwrap: Unknown option --size' >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(old))
    assert fresh("bubblewrap") == "bwrap: Unknown option --size"


def test_an_output_is_read_to_its_bound(tmp_path: Path) -> None:
    script = tmp_path / "flood.py"
    script.write_text("import sys\nwhile True:\n    sys.stdout.write('x' * 4096)\n")
    finished = run(script, b"", "none", Limits(60.0, file_size=1 << 20, output=1000))
    assert finished.output == b"x" * 1000
    assert b"File too large" in finished.errors[:1000] or len(finished.errors) == 1000
