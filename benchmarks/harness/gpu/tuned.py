"""Calls as they run once Triton's tuner has chosen for them, beside calls that know nothing of its answers."""

from __future__ import annotations

import os
from tempfile import mkdtemp
from typing import Any
from unittest import mock

from benchmarks.harness.timing import Call


class Tuned:
    """Runs calls with the tuner on. What it finds out holds inside only: other calls keep the defaults.

    Attributes:
        answers: what it chose, by question.
    """

    def __init__(self) -> None:
        self.answers: dict[Any, Any] = {}
        self._folder = mkdtemp()

    def __call__(self, call: Call) -> None:
        from recmas_kernels.backends.triton import tuning

        variables = {"RECMAS_TUNE": "1", "RECMAS_TUNE_DIR": self._folder}
        with (
            mock.patch.dict(os.environ, variables),
            mock.patch.dict(tuning._answers, clear=True),
            mock.patch.dict(tuning._recalled, self.answers, clear=True),
        ):
            call()
            self.answers = dict(tuning._recalled)
