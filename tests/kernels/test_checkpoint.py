"""Links on disk: our folders, the reference implementation's files, and everything that can be wrong with them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from recmas_kernels import FusedRecursiveLink, LinkConfig, RecursiveLink
from recmas_kernels.testing import check_budget, configs, eager_twin, make_link, make_rows


@pytest.mark.parametrize("kind", configs())
def test_a_saved_link_comes_back(tmp_path, kind):
    link = make_link(configs()[kind], torch.bfloat16)
    link.save_pretrained(tmp_path / "link")
    again = FusedRecursiveLink.from_pretrained(tmp_path / "link")
    assert again.config == link.config
    for (name, value), (other, loaded) in zip(link.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert loaded.dtype == torch.bfloat16
        assert torch.equal(value, loaded)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    first, second = make_link(configs()["inner"], seed=0), make_link(configs()["inner"], seed=5)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    loaded = RecursiveLink.from_pretrained(tmp_path)
    assert torch.equal(loaded.proj1.weight, second.proj1.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_write_keeps_the_good_file(tmp_path, monkeypatch):
    link = make_link(configs()["inner"])
    link.save_pretrained(tmp_path)

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make_link(configs()["inner"], seed=9).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(RecursiveLink.from_pretrained(tmp_path).proj1.weight, link.proj1.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_changed_eps_is_saved(tmp_path):
    link, x = make_link(configs()["outer"]), 0.1 * make_rows(3, 40)
    link.ln_source.eps = link.ln_target.eps = 0.3
    link.save_pretrained(tmp_path)
    assert torch.equal(FusedRecursiveLink.from_pretrained(tmp_path)(x), link(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda link: setattr(link, "proj1", nn.Linear(40, 16)), r"'proj1.weight' has shape \(16, 40\), expected"),
        (lambda link: setattr(link, "pre_ln", nn.Identity()), "'pre_ln.bias' is missing"),
        (lambda link: weight_norm(link.proj1), "'proj1.parametrizations.weight.original0' is not expected"),
        (lambda link: setattr(link.pre_ln, "eps", 0.5), "different eps: 1e-05 and 0.5"),
    ],
    ids=["shape", "missing", "parametrized", "eps"],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change, message):
    link = make_link(configs()["inner"])
    link.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(link)
    with pytest.raises(ValueError, match=message):
        link.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_subclass_that_is_made_in_another_way_is_saved(tmp_path):
    class Square(RecursiveLink):
        def __init__(self, features: int) -> None:
            super().__init__(LinkConfig("inner", features, features, features, "identity"))

    link, x = Square(8), make_rows(3, 8)
    link.save_pretrained(tmp_path)
    assert torch.equal(RecursiveLink.from_pretrained(tmp_path)(x), link(x))


class TestBadFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        make_link(configs()["inner"]).save_pretrained(tmp_path)
        return tmp_path

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no link folder"):
            RecursiveLink.from_pretrained(tmp_path / "absent")

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            RecursiveLink.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_truncated_file(self, folder, name):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match=name):
            RecursiveLink.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 2}, "key 'format' is 2, this version reads 1"),
            ({"gate": 1}, "unknown key 'gate'"),
            ({"kind": "middle"}, "kind is 'middle'"),
            ({"hidden_features": 7}, r"key 'proj1.weight' has shape \(40, 40\), expected \(7, 40\)"),
            ({"residual": "linear"}, "key 'residual_proj.bias' is missing"),
            ({"norm": False}, "key 'post_ln.bias' is not expected"),
        ],
    )
    def test_wrong_config(self, folder, change, message):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ValueError, match=message):
            RecursiveLink.from_pretrained(folder)

    def test_missing_config_key(self, folder):
        path = folder / "config.json"
        values = json.loads(path.read_text())
        del values["residual"]
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match="missing key.*residual"):
            RecursiveLink.from_pretrained(folder)


UPSTREAM = {
    "linear_adapter": (RecursiveLink.inner, (8,), {"layers": 1, "norm": False, "residual": "none"}),
    "linear_res_adapter": (RecursiveLink.inner, (8,), {"layers": 1, "norm": False}),
    "adapter": (RecursiveLink.inner, (8,), {"norm": False, "residual": "none"}),
    "res_adapter": (RecursiveLink.inner, (8,), {"norm": False}),
    "ln_res_adapter": (RecursiveLink.inner, (8,), {}),
    "outer_linear_adapter": (RecursiveLink.outer, (8, 5), {"layers": 1, "norm": False, "residual": "none"}),
    "outer_linear_res_adapter": (RecursiveLink.outer, (8, 5), {"layers": 1, "norm": False}),
    "outer_adapter": (RecursiveLink.outer, (8, 5, 5), {"norm": False, "residual": "none"}),
    "outer_res_adapter": (RecursiveLink.outer, (8, 5, 5), {"norm": False}),
    "outer_ln_adapter": (RecursiveLink.outer, (8, 5), {"residual": "none"}),
    "outer_ln_res_adapter": (RecursiveLink.outer, (8, 5), {}),
}


@pytest.mark.parametrize("adapter_type", UPSTREAM)
def test_every_upstream_type_loads_strictly(tmp_path, adapter_type):
    make, sizes, options = UPSTREAM[adapter_type]
    torch.manual_seed(0)
    original = make(*sizes, **options, dtype=torch.bfloat16)
    torch.save(original.state_dict(), tmp_path / "adapter.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"adapter_type": adapter_type}))
    x = make_rows(64, 8, dtype=torch.bfloat16)
    for source, known in ((tmp_path, None), (tmp_path / "adapter.pt", None), (original.state_dict(), adapter_type)):
        link = FusedRecursiveLink.from_upstream(source, known)
        assert link.state_dict().keys() == original.state_dict().keys()
        truth = eager_twin(original, torch.float64)(x.double())
        check_budget("y", link(x), original(x), truth, torch.bfloat16)


@pytest.mark.parametrize(("alias", "kind"), [("2layer_ln_res", "inner"), ("2layer_ln_res", "outer")])
def test_aliases_serve_both_kinds(alias, kind):
    original = RecursiveLink.inner(8) if kind == "inner" else RecursiveLink.outer(8, 5)
    assert FusedRecursiveLink.from_upstream(original.state_dict(), alias).config == original.config


def test_released_forms_need_no_type(tmp_path):
    for original in (RecursiveLink.inner(8), RecursiveLink.outer(8, 5)):
        save_file(original.state_dict(), tmp_path / "link.safetensors")
        assert FusedRecursiveLink.from_upstream(tmp_path / "link.safetensors").config == original.config


@pytest.mark.parametrize("kind", configs())
def test_a_module_of_ours_says_what_its_parameters_do_not(kind):
    """Residual, activation and eps."""
    original = eager_twin(make_link(configs()[kind]), torch.float32)
    for norm in [layer for layer in original.children() if isinstance(layer, nn.LayerNorm)]:
        norm.eps = 0.3
    x = make_rows(3, original.config.in_features)
    torch.testing.assert_close(FusedRecursiveLink.from_upstream(original)(x), original(x))


def test_a_residual_that_does_not_show_must_be_named():
    state = RecursiveLink.inner(8, norm=False).state_dict()
    with pytest.raises(ValueError, match="do not say whether the link has a residual: pass adapter_type"):
        FusedRecursiveLink.from_upstream(state)


@pytest.mark.parametrize(
    ("adapter_type", "message"),
    [
        ("mlp", "unknown adapter_type 'mlp'"),
        ("linear_adapter", r"has 1 layer\(s\), the parameters have 2"),
        ("res_adapter", "has no norms, the parameters differ"),
        ("outer_ln_res_adapter", "needs ln_source and ln_target, the parameters differ"),
    ],
)
def test_a_type_that_does_not_fit_is_refused(adapter_type, message):
    with pytest.raises(ValueError, match=message):
        FusedRecursiveLink.from_upstream(RecursiveLink.inner(8).state_dict(), adapter_type)


def test_files_that_are_no_state_dicts(tmp_path):
    (tmp_path / "adapter.pt").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="adapter.pt is not a readable state dict: no archive of torch.save"):
        FusedRecursiveLink.from_upstream(tmp_path / "adapter.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt is not a readable state dict: holds no state dict"):
        FusedRecursiveLink.from_upstream(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="absent.pt does not exist"):
        FusedRecursiveLink.from_upstream(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="key 'proj1.weight' is missing"):
        FusedRecursiveLink.from_upstream({})


def test_pickles_run_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"proj1.weight": Payload()}, tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="adapter.pt"):
        FusedRecursiveLink.from_upstream(tmp_path / "adapter.pt")
    assert not (tmp_path / "ran").exists()


def test_tied_weights_are_saved_whole(tmp_path):
    link = RecursiveLink.inner(8)
    link.proj2.weight = link.proj1.weight
    link.save_pretrained(tmp_path)
    again = RecursiveLink.from_pretrained(tmp_path)
    assert torch.equal(again.proj2.weight, link.proj1.weight)
    assert torch.equal(again.proj1.weight, link.proj1.weight)
