"""How the benchmarks' commands end."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code(run: Callable[[], None]) -> int:
    """0 once ``run`` has returned; 2, after one line on stderr, where what it was given is to blame."""
    try:
        run()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
