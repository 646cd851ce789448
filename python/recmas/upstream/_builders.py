"""Run as a program, in a sandbox: imports prompt builders of a clone, calls them, writes their texts as JSON.

Reads ``{"folder", "calls": [{"module", "name", "arguments"}]}`` from standard input. A call is of a function, or of a
constant when ``arguments`` is null; an argument ``args`` becomes an object with these attributes. Writes ``{"texts"}``
or ``{"error"}`` to standard output; what the clone itself prints goes to standard error. Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any


def text_of(call: dict[str, Any]) -> str:
    module = importlib.import_module(call["module"])
    if not hasattr(module, call["name"]):
        raise LookupError(f"module {call['module']} has no {call['name']}")
    found = getattr(module, call["name"])
    if call["arguments"] is not None:
        arguments = dict(call["arguments"])
        if "args" in arguments:
            arguments["args"] = SimpleNamespace(**arguments["args"])
        found = found(**arguments)
    if not isinstance(found, str):
        raise TypeError(f"{call['name']} gives {type(found).__name__}, expected a text")
    return found


def main() -> None:
    request = json.load(sys.stdin)
    sys.path.insert(0, request["folder"])
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer: dict[str, Any] = {"texts": [text_of(call) for call in request["calls"]]}
    except Exception as error:  # whatever the clone raises becomes one line of the converter
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
