"""Runs the program of a call of the python tool, which it reads from standard input; `sandbox.launch` has confined it.

Standard library only.
"""

from __future__ import annotations

import ast
import importlib
import linecache
import sys
import textwrap
import traceback

NAME = "<call>"
KNOWN = {
    "math": "math",
    "itertools": "itertools",
    "functools": "functools",
    "fractions": "fractions",
    "statistics": "statistics",
    "sp": "sympy",
}
"""Names that a program may use without importing them."""


def run(source: str) -> int:
    """Execute a program, print its last expression's value, and return its exit status."""
    source = textwrap.dedent(source.strip("\n")).lstrip(" ")  # models write <python> x = 1 </python> too
    linecache.cache[NAME] = (len(source), None, source.splitlines(keepends=True), NAME)
    try:
        tree = ast.parse(source, NAME)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        own = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        variables: dict[str, object] = {"__name__": "__main__"}
        for name in KNOWN.keys() & {node.id for node in names} - own:
            variables[name] = importlib.import_module(KNOWN[name])
        exec(compile(tree, NAME, "exec"), variables)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), NAME, "eval"), variables)
            if value is not None:
                print(value)
    except SyntaxError as error:
        traceback.print_exception(type(error), error, None)
        return 1
    except Exception as error:
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None  # without this file's own
        traceback.print_exception(type(error), error, frames)
        return 1
    return 0


if __name__ == "__main__":
    program = sys.stdin.buffer.read().decode("utf-8")
    sys.argv = [NAME]
    sys.exit(run(program))
