"""``python -m recmas_kernels.info``: one row per op in words, and the reason for whatever is missing."""

from __future__ import annotations

import json

import pytest

from recmas_kernels import __version__, info, ops


def test_every_op_has_a_row_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    frozen = {
        "frozen_linear",
        "frozen_linear_bwd",
        "frozen_weight",
    }  # of packed weights, which only the CPU kernels have
    assert info.ROWS.keys() == ops.SCHEMAS.keys() - frozen
    assert info.main([]) == 0
    page = capsys.readouterr().out.splitlines()
    assert page[0].startswith(f"recmas-kernels {__version__} in ")
    for op, row in info.ROWS.items():
        (line,) = [line for line in page if line.startswith(f"  {row}  ")]
        assert op not in line


def test_json_names_modules_and_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert set(page["modules"]) == {"tensors", "cpu", "cuda"}
    assert page["chosen"]["cpu"].keys() == info.ROWS.keys()


@pytest.mark.parametrize("variable", ["RECMAS_BACKEND", "RECMAS_CPU_ISA"])
def test_a_setting_that_names_nothing_is_one_line(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recmas_kernels.backends import cpu
    from recmas_kernels.backends.cpu.module import isa_in_use

    if cpu.unavailable() is not None:
        pytest.skip(str(cpu.unavailable()))
    monkeypatch.setenv(variable, "turbo")
    isa_in_use.cache_clear()
    assert info.main([]) == 2
    assert "'turbo'" in capsys.readouterr().err
    isa_in_use.cache_clear()


def test_info_says_why_a_build_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log = ["ptxas fatal: unsupported architecture"]
    record = {"cuda": {"status": "failed", "reason": "compilation failed: ptxas", "log": log}}
    monkeypatch.setattr(info, "_build_record", lambda: record)
    monkeypatch.setattr(info, "_loaded", lambda name: {"loads": False, "load_error": "no module"})
    assert info.main([]) == 0
    page = capsys.readouterr().out
    assert "_cuda: failed, does not load" in page
    assert "compilation failed: ptxas" in page
    assert "| ptxas fatal: unsupported architecture" in page
