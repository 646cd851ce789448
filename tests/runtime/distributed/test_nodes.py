"""Two machines answer as one process does, and go on when one of them is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recmas import DISTILLATION, RecursiveMAS
from recmas.config.system_json import PlacementSpec
from tests.runtime.scheduling.rows import PATTERNS, tiny_system
from tests.torture.amounts import FULL

QUESTIONS = [f"fox {number}" for number in range(24)]


PLACED = PATTERNS if FULL else {"distillation": DISTILLATION}


def test_two_machines_answer_as_one_process_and_one_that_is_lost_loses_no_question(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    expected = {}
    for name, pattern in PLACED.items():
        made = tiny_system(pattern)
        for setting in made.settings.values():
            setting.placement = PlacementSpec(threads=1, resources={"first": 0.1})
        made.settings[pattern.last].placement = PlacementSpec(threads=1, resources={"second": 0.5})
        made.save_pretrained(tmp_path / name)
        local = RecursiveMAS.from_pretrained(tmp_path / name)
        expected[name] = [answer.text for answer in local.answer(QUESTIONS)]
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(path for path in (str(root), os.environ.get("PYTHONPATH")) if path)
    words = [sys.executable, "-m", "tests.runtime.distributed.two_nodes", *(str(tmp_path / name) for name in PLACED)]
    ended = subprocess.run(
        words, cwd=root, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["before"] == list(expected.values())
    assert found["during"] == expected[list(PLACED)[-1]]
    assert found["restarts"] >= 1
    assert "no machine of the cluster has had room for its process" in found["after"]
