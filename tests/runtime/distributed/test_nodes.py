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
from tests.runtime.distributed.conftest import ONE_THREAD
from tests.runtime.scheduling.rows import tiny_system

QUESTIONS = [f"fox {number}" for number in range(24)]


def test_a_machine_that_is_lost_loses_no_question(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    made = tiny_system(DISTILLATION)
    made.settings["expert"].placement = ONE_THREAD
    made.settings["learner"].placement = PlacementSpec(threads=1, resources={"second": 0.5})
    made.save_pretrained(tmp_path / "system")
    local = RecursiveMAS.from_pretrained(tmp_path / "system")
    expected = [answer.text for answer in local.answer(QUESTIONS)]
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(path for path in (str(root), os.environ.get("PYTHONPATH")) if path)
    words = [sys.executable, "-m", "tests.runtime.distributed.two_nodes", str(tmp_path / "system")]
    ended = subprocess.run(
        words, cwd=root, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["before"] == expected
    assert found["during"] == expected
    assert found["restarts"] >= 1
