"""Where ``recmas train`` has its rows from: parquet files, data sets of the hub, columns of other names."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from recmas.cli import main
from tests.runtime.lean import contents, lean_rows, write_lean

QUICK = ["--steps", "1", "--batch-size", "2", "--rounds", "1"]
COLUMNS = "question=problem,targets.planner=plan,targets.critic=critique,targets.solver=solution"


def flat_rows(rows):
    names = {"planner": "plan", "critic": "critique", "solver": "solution"}
    return [{"problem": row["question"]} | {names[role]: text for role, text in row["targets"].items()} for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A system, its rows as JSONL, as parquet, and as flat columns, and what a run on the first gives."""
    folder = write_lean(tmp_path_factory.mktemp("data"))
    parquet.write_table(pyarrow.Table.from_pylist(lean_rows()), folder / "rows.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(flat_rows(lean_rows())), folder / "flat.parquet")
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lean_rows(4)))
    (folder / "broken.parquet").write_bytes(b"PAR1 no more")
    parquet.write_table(
        pyarrow.Table.from_pylist([], schema=pyarrow.schema([("a", "string")])), folder / "none.parquet"
    )
    words = ["train", "all", str(folder / "system"), "--data", str(folder / "rows.jsonl"), *QUICK]
    assert main([*words, "--output", str(folder / "known")]) == 0
    return folder


@pytest.fixture
def place(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def test_parquet_and_columns_of_other_names_are_the_same_rows(place):
    words = ["train", "all", "system", *QUICK]
    assert main([*words, "--data", "rows.parquet", "--output", "parquet"]) == 0
    flat = ["--data", "flat.parquet", "--column", COLUMNS]
    assert main([*words, *flat, "--output", "flat"]) == 0
    for name in ("parquet", "flat"):
        assert contents(place / name / "links") == contents(place / "known" / "links")
    record = json.loads((place / "parquet" / "training" / "outer" / "run.json").read_text())
    known = json.loads((place / "known" / "training" / "outer" / "run.json").read_text())
    assert record["data"].pop("source") == "rows.parquet"
    assert record["data"]["rows"] == 12
    assert record["data"]["sha256"] == known["data"]["sha256"]
    assert record["settings"]["stage"] == "OuterConfig"


def test_rows_and_texts_of_the_hub(place, monkeypatch):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return [{"content": "fox", "problem": "x"}] if name == "owner/texts" else flat_rows(lean_rows())

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    words = ["--data", "owner/rows", "--texts", "owner/texts", "--column", f"{COLUMNS},text=content"]
    words += ["--validation", "owner/rows", "--subset", "main", "--split", "all", "--validation-split", "test"]
    assert main(["train", "all", "system", *QUICK, *words, "--output", "hub"]) == 0
    assert asked == [("owner/rows", "main", "all"), ("owner/texts", "main", "all"), ("owner/rows", "main", "test")]
    records = [
        json.loads((place / "hub" / "training" / run / "run.json").read_text())
        for run in ("inner-planner", "warmup-planner-critic", "outer")
    ]
    assert [record["data"]["source"] for record in records] == ["owner/texts", "owner/texts", "owner/rows"]
    assert [record["validation"] for record in records[:2]] == [None, None]  # the last stage alone measures them
    assert records[2]["validation"]["source"] == "owner/rows"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data", "flat.parquet", "--column", "question=task"],
            "row 0: no column 'task' for 'question'; it has ",
        ),
        (["--data", "flat.parquet", "--column", "question"], "--column: "),
        (["--data", "broken.parquet"], "broken.parquet: not a readable parquet file ("),
        (["--data", "nowhere.parquet"], "nowhere.parquet: no such file"),
        (["--data", "system.parquet"], "system.parquet: "),
        (["--data", "none.parquet"], "none.parquet: holds no rows"),
        (["--data", "rows.jsonl", "--validation", "broken.parquet"], "broken.parquet: not a readable"),
    ],
)
def test_bad_data_is_one_line_and_nothing_is_written(place, capsys, words, message):
    (place / "system.parquet").mkdir(exist_ok=True)
    before = contents(place)
    try:
        status = main(["train", "outer", "system", *QUICK, *words, "--output", "bad"])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert contents(place) == before


@pytest.mark.parametrize(
    ("other", "began", "found"),
    [
        (["--data", "few.jsonl"], "12 rows of ", "4 rows of few.jsonl (sha256 "),
        (["--data", "rows.jsonl", "--texts", "texts.jsonl"], "12 rows of ", "1 rows of texts.jsonl (sha256 "),
        (
            ["--data", "rows.jsonl", "--validation", "few.jsonl"],
            "no validation rows, ",
            "4 validation rows of few.jsonl (sha256 ",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_rows(place, capsys, other, began, found):
    (place / "texts.jsonl").write_text('{"text": "fox"}\n')
    before = contents(place)
    assert main(["train", "all", "system", *QUICK, *other, "--output", "known", "--resume"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"recmas: error: known/training/inner-planner: was begun on {began}")
    assert f"this run has {found}" in err
    assert contents(place) == before


def test_validation_losses_of_a_run_are_of_the_same_rows(place, capsys):
    """The best of a run's links are those with the least of these losses, whichever process measured them."""
    words = ["train", "inner", "system", *QUICK, "--roles", "critic", "--data", "rows.jsonl", "--output", "validated"]
    assert main([*words, "--validation", "rows.jsonl"]) == 0
    assert main([*words, "--validation", "rows.jsonl", "--resume"]) == 0
    capsys.readouterr()
    for other, found in ([["--validation", "few.jsonl"], "4 validation rows of few.jsonl"], [[], "no validation rows"]):
        assert main([*words, *other, "--resume"]) == 2
        err = capsys.readouterr().err
        assert "validated/training/inner-critic: was begun on 12 validation rows of rows.jsonl (sha256 " in err
        assert f"this run has {found}" in err
