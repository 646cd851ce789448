"""``recmas check``, and what other commands say of features that are off."""

from __future__ import annotations

import json

import pytest

from recmas.cli import main
from recmas.engine.proofs import FEATURES
from recmas.training.proofs import TRAINING
from tests.runtime.families.matrix import tiny
from tests.runtime.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    def make(model):
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return make


def test_every_proof_with_its_numbers(folder, capsys):
    assert main(["check", folder(tiny_model("llama"))]) == 0
    *proofs, verdict = capsys.readouterr().out.splitlines()
    assert len(proofs) == len({"embeddings", "causality", "logits", *FEATURES, *TRAINING})
    assert all(" holds  " in line and "differ by" in line and "rounding explains" in line for line in proofs)
    assert verdict == "a llama model can be an agent"


def test_what_is_off(folder, capsys):
    assert main(["check", folder(tiny("bart"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " FAILS  " in line] == ["padding", "prefix", "fixed"]
    assert "without padding: rows of other lengths run apart" in lines


def test_a_refused_model(folder, capsys):
    path = folder(tiny("bert"))
    assert main(["check", path]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "a bert model is refused: causality fails"
    assert main(["check", path, "--json"]) == 2
    shown = json.loads(capsys.readouterr().out)
    assert (shown["type"], shown["refused"], shown["off"]) == ("bert", "causality", {})
    assert shown["proofs"]["causality"]["error"] > shown["proofs"]["causality"]["bound"]


def test_a_refused_model_makes_no_system(folder, tmp_path, capsys):
    path = folder(tiny("bert"))
    models = ",".join(f"{role}={path}" for role in ("planner", "critic", "solver"))
    assert main(["init", str(tmp_path / "system"), "--models", models]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "recmas: error: agent 'planner': a bert model is refused: causality: states before and after" in err
    assert not (tmp_path / "system").exists()


def test_systems_say_what_is_off(folder, tmp_path, capsys):
    path = folder(tiny("openai-gpt"))
    system = str(tmp_path / "system")
    models = ",".join(f"{role}={path}" for role in ("planner", "critic", "solver"))
    assert main(["init", system, "--models", models, "--rounds", "1", "--latent-steps", "2"]) == 0
    capsys.readouterr()
    assert main(["info", system]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("planner, critic, solver: without cache: every step reads the whole sequence again; ")
    assert main(["inspect", system]) == 0
    assert "  without cache: every step reads the whole sequence again" in capsys.readouterr().out.splitlines()
    assert main(["run", system, "--question", "fox", "--max-new-tokens", "2", "--json"]) == 0
    reading = json.loads(capsys.readouterr().out)["reading"]
    for how in reading.values():
        assert how["reason"] == "openai-gpt model without cache: ValueError: its forward takes no cache"


def test_nothing_to_check(capsys):
    assert main(["check", "/no/such/folder"]) == 2
    assert capsys.readouterr().err == "recmas: error: agent 'folder': no such folder: /no/such/folder\n"
