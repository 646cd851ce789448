"""Tools that the answering agent may call while it writes.

The model writes ``<name> ... </name>``; the text between goes to the tool of that name, and `` <result> ... </result>``
follows in the model's own row. Nothing else changes: the row goes on upon its own cache, and so do its neighbours.
They wait while a tool runs, though, and calls run one at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from recmas.tools.caller import Caller
from recmas.tools.python import PythonTool
from recmas.tools.toolbox import Tool, Toolbox, ToolCall

__all__ = ["SHIPPED", "Caller", "PythonTool", "Tool", "ToolCall", "Toolbox"]

SHIPPED: dict[str, Callable[[str | None], Tool]] = {"python": lambda sandbox: PythonTool(sandbox=sandbox)}
"""Tools by name, each made with the sandbox of its programs (None: the first that works here)."""
