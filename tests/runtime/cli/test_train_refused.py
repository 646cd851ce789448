"""A refused ``recmas train`` changes nothing: neither an output that holds something, nor what it would have made."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from recmas import RecursiveMAS
from recmas.cli import main
from recmas.config.system_json import edge_name
from tests.runtime.killing import another_writer
from tests.runtime.lean import contents, lean_rows, write_lean

STAGES = ("inner", "warmup", "outer", "all")
QUICK = ["--steps", "2", "--batch-size", "2", "--rounds", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``system``, ``rows.jsonl``, and for each stage ``out-STAGE``, which holds a system and a finished run."""
    folder = write_lean(tmp_path_factory.mktemp("trained"))
    for stage in STAGES:
        words = ["train", stage, str(folder / "system"), "--data", str(folder / "rows.jsonl"), *QUICK]
        assert main([*words, "--output", str(folder / f"out-{stage}")]) == 0
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("precious")
    rows = [json.dumps(row) for row in lean_rows(4)]
    bad = {
        "broken": '{"question": ',
        "list": "[1]",
        "no field": json.dumps({key: value for key, value in lean_rows(1)[0].items() if key != "question"}),
        "no target": json.dumps(lean_rows(1)[0] | {"targets": {"planner": "x"}}),
        "empty target": json.dumps(lean_rows(1)[0] | {"targets": dict.fromkeys(("planner", "critic", "solver"), " ")}),
        "long": json.dumps(lean_rows(1)[0] | {"question": "fox " * 400}),
        "nan": '{"question": NaN}',
    }
    for name, line in bad.items():
        (folder / f"{name}.jsonl").write_text("\n".join([*rows, line, *rows]) + "\n")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    os.mkfifo(folder / "pipe.jsonl")
    return folder


REFUSED = {
    "no steps": ["--steps", "0"],
    "a negative rate": ["--learning-rate", "-1"],
    "a rate without bounds": ["--learning-rate", "1e300"],
    "a negative decay": ["--weight-decay", "-1"],
    "a beta beyond 1": ["--betas", "[1.5, 0.9]"],
    "no rounds": ["--rounds", "0"],
    "too many rounds": ["--rounds", "257"],
    "rounds without links": ["--rounds", "1,x"],
    "an unknown setting": ["--speed", "3"],
    "an unknown schedule": ["--schedule", "sudden"],
    "patience without validation": ["--patience", "1"],
    "an unknown role": ["--roles", "poet"],
    "an unknown edge": ["--edges", "solver->poet"],
    "an edge that is none": ["--edges", "solver"],
    "weights of other rounds": ["--round-weights", "1,1"],
    "a negative weight": ["--round-weights", "-1"],
    "a weight that is none": ["--round-weights", "heavy"],
    "targets of an unknown role": ["--inner-target", "poet"],
    "distillation in one round": ["--distill", "1"],
    "an unknown tracker": ["--tracker", "abacus"],
    "an unknown device": ["--device", "abacus"],
    "an unknown backend": ["--backend", "abacus"],
    "no such rows": ["--data", "nowhere.jsonl"],
    "a folder of rows": ["--data", "system"],
    "a FIFO of rows": ["--data", "pipe.jsonl"],
    "a device of rows": ["--data", "/dev/zero"],
    "rows without an end": ["--data", "broken.jsonl"],
    "rows that are lists": ["--data", "list.jsonl"],
    "rows without a field": ["--data", "no field.jsonl"],
    "rows without a target": ["--data", "no target.jsonl"],
    "rows with an empty target": ["--data", "empty target.jsonl"],
    "rows beyond the context": ["--data", "long.jsonl"],
    "rows with NaN": ["--data", "nan.jsonl"],
    "no rows": ["--data", "empty.jsonl"],
    "rows that are no UTF-8": ["--data", "latin.jsonl"],
    "bad validation rows": ["--validation", "no target.jsonl"],
}
BY_STAGE = {
    "--learning-rate": ("inner", "outer"),
    "--weight-decay": ("inner", "outer"),
    "--betas": ("inner", "outer"),
    "--schedule": ("inner", "outer"),
    "--roles": ("inner",),
    "--edges": ("warmup", "outer"),
    "--round-weights": ("outer", "all"),
    "--distill": ("outer", "all"),
    "--inner-target": ("inner", "all"),
}
SETTINGS = {"--seed": "3", "--steps": "3", "--round-weights": "3", "--inner-target": "planner=solver"}


OUTPUTS = {"out": ["--resume"], "new": []}
"""A folder that holds a run of the stage, which is to be resumed, and one that is not there."""


@pytest.mark.parametrize(
    ("stage", "name", "output"),
    [
        (stage, name, output)
        for number, (name, (option, _)) in enumerate(REFUSED.items())
        for at, output in enumerate(OUTPUTS)
        for stage in [BY_STAGE.get(option, STAGES[number % 2 :: 2])[-at]]
    ],
)
def test_wrong_settings_and_bad_rows_change_nothing(trained, monkeypatch, capsys, stage, name, output):
    """Each in both kinds of outputs, and in two stages where as many take it."""
    option, value = REFUSED[name]
    asked = {"--data": "rows.jsonl"} | {option: value}
    words = ["train", stage, "system", *QUICK, *(word for pair in asked.items() for word in pair)]
    check_refused(trained, monkeypatch, capsys, [*words, "--output", f"{output}-{stage}", *OUTPUTS[output]])


def check_refused(folder, monkeypatch, capsys, words):
    monkeypatch.chdir(folder)
    before = contents(folder)
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("recmas: error: ")
    assert contents(folder) == before
    return err


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_changes_nothing(trained, monkeypatch, capsys, stage):
    """In another system's folder, in the trained one itself, with other settings, in a folder of something else."""
    data = ["--data", "rows.jsonl", *QUICK]
    again = ["train", stage, "system", *data, "--output", f"out-{stage}"]
    err = check_refused(trained, monkeypatch, capsys, again)
    assert f"out-{stage} holds a system already" in err
    err = check_refused(trained, monkeypatch, capsys, ["train", stage, f"out-{stage}", *data])
    assert "already holds a training run; go on with it (--resume" in err
    for setting, value in SETTINGS.items():
        if stage in BY_STAGE.get(setting, STAGES):
            err = check_refused(trained, monkeypatch, capsys, [*again, "--resume", setting, value])
            assert f"was made with {setting[2:].replace('-', '_')} = " in err
    err = check_refused(trained, monkeypatch, capsys, ["train", stage, "system", *data, "--output", "thesis"])
    assert "thesis: exists and is not a system; nothing was written" in err
    err = check_refused(trained, monkeypatch, capsys, ["train", stage, "system", *data, "--output", "rows.jsonl"])
    assert "rows.jsonl: is a file, expected a folder" in err
    other = "outer" if stage == "inner" else "inner"
    err = check_refused(
        trained, monkeypatch, capsys, ["train", stage, "system", *data, "--output", f"out-{other}", "--resume"]
    )
    assert f"out-{other} holds no run of train {stage} that could be resumed" in err


@pytest.mark.parametrize("stage", STAGES)
def test_a_command_while_another_process_writes_changes_nothing(trained, monkeypatch, capsys, stage):
    words = ["train", stage, "system", "--data", "rows.jsonl", *QUICK, "--output", f"out-{stage}", "--resume"]
    with another_writer(trained / f"out-{stage}"):
        err = check_refused(trained, monkeypatch, capsys, words)
    assert "another process is writing there" in err


@pytest.mark.parametrize("stage", STAGES)
def test_damage_in_the_output_is_told_and_not_written_over(trained, tmp_path, monkeypatch, capsys, stage):
    """A checkpoint, the log, and a link of the system that is to be resumed."""
    for name in ("system", f"out-{stage}"):
        shutil.copytree(trained / name, tmp_path / name)
    shutil.copy(trained / "rows.jsonl", tmp_path)
    words = ["train", stage, "system", "--data", "rows.jsonl", *QUICK, "--output", f"out-{stage}", "--resume"]
    for pattern in ("training/*/checkpoint-00000002*", "links/*.2/model.safetensors", "training/*/log.jsonl"):
        path = next((tmp_path / f"out-{stage}").glob(pattern))
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + b"#" + whole[-8:])
        err = check_refused(tmp_path, monkeypatch, capsys, words)
        assert path.name in err
        path.write_bytes(whole)


@pytest.mark.parametrize("stage", STAGES)
def test_another_system_is_not_gone_on_with(trained, monkeypatch, capsys, tmp_path, stage):
    """Resuming names the system that the output was made of: another one, or that one changed, is refused."""
    write_lean(tmp_path)
    spec = json.loads((tmp_path / "system" / "system.json").read_text())
    spec["defaults"]["latent_steps"] = 3
    (tmp_path / "system" / "system.json").write_text(json.dumps(spec))
    words = ["train", stage, str(tmp_path / "system"), "--data", "rows.jsonl", *QUICK, "--output", f"out-{stage}"]
    err = check_refused(trained, monkeypatch, capsys, [*words, "--resume"])
    assert f"--output: out-{stage} was made of {trained / 'system'} (sha256 " in err
    assert f"not of {tmp_path / 'system'} as it is now" in err
    words[2] = "system"
    assert main([*words, "--resume"]) == 0  # nothing is left to do


def test_weights_of_a_model_make_another_system(trained, monkeypatch, capsys, tmp_path):
    shutil.copytree(trained / "system", tmp_path / "system")
    weights = next((tmp_path / "system" / "agents").glob("*/model.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + bytes(4))
    words = ["train", "inner", str(tmp_path / "system"), "--data", "rows.jsonl", *QUICK, "--output", "out-inner"]
    assert "was made of" in check_refused(trained, monkeypatch, capsys, [*words, "--resume"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(trained, monkeypatch, capsys, stage):
    monkeypatch.chdir(trained)
    before = contents(trained)
    words = ["train", stage, "system", "--data", "rows.jsonl", *QUICK, "--output", "new", "--dry-run"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    runs = {"inner": 3, "warmup": 3, "outer": 1, "all": 7}[stage]
    assert len(told["runs"]) == runs
    mas = RecursiveMAS.from_pretrained("system")
    counts = {f"inner {role}": link for role, link in mas.inner_links.items()}
    counts |= {f"warmup {edge_name(edge)}": link for edge, link in mas.outer_links.items()}
    for run in told["runs"]:
        assert (run["steps"], run["rows_per_step"], run["epochs"]) == (2, 2, round(4 / run["rows"], 2))
        assert 0 < run["seconds_per_step"] < 60
        if run["run"] in counts:
            assert run["parameters"] == sum(p.numel() for p in counts[run["run"]].parameters())
    assert told["memory"]["models"] == sum(p.nbytes for p in mas.agents["solver"].model.parameters())
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("parameters") == out.count(" s per step") == runs
    assert "seconds per step are measured here" in out
    assert "memory beside activations: models " in out
    check_refused(trained, monkeypatch, capsys, [*words, "--data", "no target.jsonl"])
    assert contents(trained) == before


@pytest.mark.parametrize("stage", ["outer", "all"])
def test_a_dry_run_tells_settings_that_are_not_the_defaults(trained, monkeypatch, capsys, stage):
    monkeypatch.chdir(trained)
    words = ["train", stage, "system", "--data", "rows.jsonl", "--rounds", "2", "--round-weights", "0.1,1", "--dry-run"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    runs = told["runs"]
    assert runs[-1]["settings"]["round_weights"] == [0.1, 1.0]
    assert all("round_weights" not in run["settings"] for run in runs[:-1])
    if stage == "all":
        return
    assert main(words) == 0
    assert ", round_weights 0.1,1.0" in capsys.readouterr().out
    assert main([*words, "--round-norms", "true", "--json"]) == 0
    held = [each["memory"]["gradients_and_moments"] for each in (told, json.loads(capsys.readouterr().out))]
    assert held[1] == held[0] * 5 // 3  # two moments, the gradient, and one of each of two rounds
