"""Links and systems written back: what comes out loads strictly into plain modules and converts again bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recmas.cli import main
from recmas.config.pattern import Pattern
from recmas.config.system_json import read_spec, write_spec
from recmas.upstream import convert_upstream, link_to_safetensors, to_pt
from recmas.upstream.export import adapter_type
from recmas.upstream.styles import OUTER, STYLES
from recmas_kernels import FusedRecursiveLink, RecursiveLink
from tests.runtime.sandbox.needed import needs_sandbox
from tests.runtime.upstream.fakes import link_state, write_clone, write_inner, write_release

WIDTHS = {"planner": 32, "critic": 48, "solver": 32}
pytestmark = needs_sandbox  # for the clone's prompt builders
LIGHT = STYLES["sequential_light"]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(converted system, its clone)."""
    root = tmp_path_factory.mktemp("export")
    clone = write_clone(root / "clone")
    write_release(root / "weights", "sequential_light", WIDTHS, {}, inner="task", outer="tasks")
    convert_upstream(clone, "sequential_light", root / "system", weights=root / "weights")
    return root / "system", clone


class ReferenceInner(nn.Module):
    """Parameters of UPSTREAM's ln_res_adapter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj1, self.proj2 = nn.Linear(width, width), nn.Linear(width, width)
        self.pre_ln, self.post_ln = nn.LayerNorm(width), nn.LayerNorm(width)


class ReferenceOuter(nn.Module):
    """Parameters of UPSTREAM's outer_ln_res_adapter."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj1, self.proj2 = nn.Linear(width_in, 2 * width_out), nn.Linear(2 * width_out, width_out)
        self.residual_proj = nn.Linear(width_in, width_out)
        self.ln_source, self.ln_target = nn.LayerNorm(width_in), nn.LayerNorm(width_out)


def test_system_to_pt_and_back(system: tuple[Path, Path], tmp_path: Path) -> None:
    folder, clone = system
    out = tmp_path / "release"
    written = to_pt(folder, out, allow_outside=True)
    assert sorted(path.relative_to(out).as_posix() for path in written) == [
        "critic/adapter.pt",
        "outer/outer_12.pt",
        "outer/outer_23.pt",
        "outer/outer_31.pt",
        "planner/adapter.pt",
        "solver/adapter.pt",
    ]
    for role, width in WIDTHS.items():
        ReferenceInner(width).load_state_dict(torch.load(out / role / "adapter.pt", weights_only=True), strict=True)
        assert json.loads((out / role / "adapter_config.json").read_text()) == {"adapter_type": "ln_res_adapter"}
        assert (out / role / "model.safetensors").is_symlink()
        assert not (out / role / "adapter(math).pt").exists()
    manifest = json.loads((out / OUTER / "outerlink_config.json").read_text())
    companion = json.loads((out / OUTER / "outer_adapter_config.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["paradigm"] == "sequential"
    for entry in manifest["adapters"]:
        source, target = LIGHT.family.edges[entry["legacy_key"]]
        assert (entry["in_dim"], entry["out_dim"]) == (WIDTHS[source], WIDTHS[target])
        assert companion[f"{entry['legacy_key']}_type"] == entry["adapter_type"] == "outer_ln_res_adapter"
        state = torch.load(out / OUTER / entry["filename"], weights_only=True)
        ReferenceOuter(WIDTHS[source], WIDTHS[target]).load_state_dict(state, strict=True)
    convert_upstream(clone, "sequential_light", tmp_path / "again", weights=out)
    for link in folder.glob("links/*/model.safetensors"):
        assert link.read_bytes() == (tmp_path / "again" / link.relative_to(folder)).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_link_to_safetensors_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """Types that the parameters do not tell come from adapter_config.json or the caller; every bit is kept."""
    states = {
        "adapter.pt": {key: value.to(dtype) for key, value in link_state(24, norm=False).items()},
        "outer_12.pt": {key: value.to(dtype) for key, value in link_state(24, 40).items()},
    }
    (tmp_path / "adapter_config.json").write_text('{"adapter_type": "res_adapter"}')
    for name, state in states.items():
        torch.save(state, tmp_path / name)
        config = link_to_safetensors(tmp_path / name, tmp_path / "links" / name)
        assert config == FusedRecursiveLink.from_pretrained(tmp_path / "links" / name).config
        to_pt(tmp_path / "links" / name, tmp_path / "back" / name)
        back = torch.load(tmp_path / "back" / name, weights_only=True)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) and back[key].dtype == dtype for key in state)
    assert link_to_safetensors(tmp_path, tmp_path / "of folder").residual == "identity"
    torch.save(states["adapter.pt"], tmp_path / "loose.pt")
    assert link_to_safetensors(tmp_path / "loose.pt", tmp_path / "told", adapter_type="2layer").residual == "none"
    with pytest.raises(ValueError, match="do not say whether the link has a residual"):
        link_to_safetensors(tmp_path / "loose.pt", tmp_path / "ambiguous")
    assert not (tmp_path / "ambiguous").exists()


@pytest.mark.parametrize(
    ("link", "name"),
    [
        (RecursiveLink.inner(8), "ln_res_adapter"),
        (RecursiveLink.inner(8, norm=False), "res_adapter"),
        (RecursiveLink.inner(8, norm=False, residual="none"), "adapter"),
        (RecursiveLink.inner(8, norm=False, layers=1), "linear_res_adapter"),
        (RecursiveLink.inner(8, norm=False, residual="none", layers=1), "linear_adapter"),
        (RecursiveLink.outer(8, 6), "outer_ln_res_adapter"),
        (RecursiveLink.outer(8, 6, residual="none"), "outer_ln_adapter"),
        (RecursiveLink.outer(8, 6, hidden=6, norm=False), "outer_res_adapter"),
        (RecursiveLink.outer(8, 6, hidden=6, norm=False, residual="none"), "outer_adapter"),
        (RecursiveLink.outer(8, 6, norm=False, layers=1, hidden=6), "outer_linear_res_adapter"),
        (RecursiveLink.outer(8, 6, norm=False, layers=1, hidden=6, residual="none"), "outer_linear_adapter"),
    ],
)
def test_type_names(link: RecursiveLink, name: str) -> None:
    """The name we give a link is one under which its parameters read back as the same link."""
    assert adapter_type(link.config, "link") == name
    assert FusedRecursiveLink.from_upstream(link.state_dict(), name).config == link.config


@pytest.mark.parametrize(
    ("link", "lack"),
    [
        (RecursiveLink.inner(8, bias=False), "no biases"),
        (RecursiveLink.inner(8, hidden=4), "4 hidden features (it has 8)"),
        (RecursiveLink.outer(8, 6, norm=False), "12 hidden features (it has 6)"),
        (RecursiveLink.inner(8, activation="gelu_tanh"), "activation 'gelu_tanh'"),
        (RecursiveLink.inner(8, eps=1e-6), "eps 1e-06"),
        (RecursiveLink.inner(8, residual="none"), "norms without a residual"),
        (RecursiveLink.outer(8, 8, residual="identity"), "residual 'identity'"),
        (RecursiveLink.inner(8, layers=1), "norms around one layer"),
    ],
)
def test_links_it_does_not_have(tmp_path: Path, link: RecursiveLink, lack: str) -> None:
    link.save_pretrained(tmp_path / "link")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        to_pt(tmp_path / "link", tmp_path / "out.pt")
    assert f"the reference implementation has no link with {lack}" in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


def test_what_cannot_be_written_is_one_clear_line(system: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = system
    (tmp_path / "taken").write_text("mine")

    def refused(source: Path, out: Path, message: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            to_pt(source, out)
        assert message in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    refused(folder, tmp_path / "taken", "exists already; nothing was written")
    refused(tmp_path / "absent", tmp_path / "x", "is neither a system (no system.json) nor a link (no config.json)")
    refused(folder / "links" / "planner", tmp_path / "x", "is not the name of a .pt file")
    spec = read_spec(folder)
    spec.pattern = Pattern((("planner",), ("critic",), ("solver",)), combine="mean")
    (tmp_path / "other").mkdir()
    write_spec(tmp_path / "other", spec)
    refused(tmp_path / "other", tmp_path / "x", "its pattern is not one the reference implementation has")
    spec.pattern = LIGHT.family.pattern
    write_spec(tmp_path / "other", spec)
    refused(tmp_path / "other", tmp_path / "x", "no link folder")
    for source, message in ((tmp_path / "absent", "source: no such file or folder"), (tmp_path, "does not exist")):
        with pytest.raises(ValueError, match=message):
            link_to_safetensors(source, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    try:
        code = main(["convert", *map(str, words)])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_command_line(system: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, clone = system
    weights = folder.parent / "weights"
    trained = tmp_path / "trained"
    trained.mkdir()
    for path in (weights / LIGHT.repositories["planner"]).iterdir():
        if path.suffix != ".pt":
            (trained / path.name).symlink_to(path)
    (trained / "adapter_config.json").unlink()
    write_inner(trained, 32, 3)
    upstream = ["upstream", "--code", clone, "--style", "sequential_light", "--weights", weights]

    code, out, _ = run(capsys, *upstream, "--override", f"planner={trained}", "--out", tmp_path / "made", "--json")
    assert code == 0
    assert json.loads(out)["models"]["planner"] == str(trained.resolve())
    code, out, _ = run(capsys, "pt", tmp_path / "made", tmp_path / "release", "--allow-outside")
    assert (code, out) == (0, f"{tmp_path / 'release'}: 6 state dicts\n")
    code, out, _ = run(capsys, "safetensors", trained, tmp_path / "link")
    assert (code, out) == (0, f"{tmp_path / 'link'}: an inner link of 32 to 32 features\n")

    for words, message in (
        ([*upstream, "--out", tmp_path / "made"], "exists already"),
        ([*upstream, "--override", "planner", "--out", tmp_path / "x"], "--override: 'planner' is not of the form"),
        ([*upstream[:3], "--style", "chess", "--out", tmp_path / "x"], "style: 'chess' is not one of"),
        (["pt", tmp_path / "absent", tmp_path / "x"], "is neither a system"),
        (["upstream", "--style", "mixture", "--out", tmp_path / "x"], "code"),
    ):
        code, out, error = run(capsys, *words)
        assert (code, out) == (2, "")
        assert error.startswith("recmas: error: ")
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "x").exists()
