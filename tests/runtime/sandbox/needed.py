"""A mark for tests that run foreign code by default, and so need a sandbox that works."""

from __future__ import annotations

import pytest

from recmas.sandbox import choose


def _missing() -> str | None:
    try:
        choose()
    except ValueError as error:
        return str(error)
    return None


needs_sandbox = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))
