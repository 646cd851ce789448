"""`train_all`: what its checks leave, and what its stages measure."""

from __future__ import annotations

from pathlib import Path

from recmas.training import AllConfig, train_all
from tests.runtime.lean import contents, lean_rows, lean_system


def test_checks_write_nothing(tmp_path: Path) -> None:
    """Every stage is checked by itself, and `on_start` is called once, after all of them."""
    seen: list[object] = []

    def start() -> bool:
        seen.append(contents(tmp_path))
        return True

    config = AllConfig(steps=1, batch_size=2)
    done = train_all(
        lean_system(), lean_rows(), config, output=tmp_path / "out", cache=tmp_path / "pairs", on_start=start
    )
    assert done == {}
    assert seen == [contents(tmp_path)]
    assert list(tmp_path.iterdir()) == []


def test_with_texts_the_last_stage_alone_measures_and_is_patient() -> None:
    """One measurement that is not better ends the run, so that a run of five steps measures at most five times."""
    texts = [{"text": f"fox {number}"} for number in range(4)]
    config = AllConfig(steps=5, batch_size=2, validate_every=1, patience=1)
    done = train_all(lean_system(), lean_rows(), config, texts=texts, validation=lean_rows(2), progress=False)
    measured = {name: [record.validation for record in result.records] for name, result in done.items()}
    for name, found in measured.items():
        if name == "outer":
            assert None not in found
        else:
            assert found == [None] * 5, name
    assert len(done) == 7
