"""What the errors of other libraries say, on one line. No torch here."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what it says, or its kind if it says nothing; advice for programmers follows in the others."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
