"""The process that applies chat templates: reads a request per line, answers with a line; see `chat_template`."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from typing import Any

SECONDS = 2
"""Of processor time for one template, rounded up to whole seconds."""
MEMORY = 512 << 20
"""Bytes beyond what the process takes when it is ready."""


def main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time()
        print(json.dumps(_answer(render_jinja_template, json.loads(line))), flush=True)


def _answer(render: Any, request: dict[str, Any]) -> dict[str, str]:
    try:
        rendered, _ = render(
            conversations=[request["messages"]],
            tools=request["tools"],
            chat_template=request["template"],
            add_generation_prompt=True,
            **{**request["variables"], "enable_thinking": False},
        )
    except MemoryError:
        return {"error": f"more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # a template may raise anything that its expressions can
        reason = (str(error).strip().splitlines() or [""])[0][:500]
        name = type(error).__name__
        return {"error": reason if name == "TemplateError" and reason else f"{name}: {reason}"}
    return {"text": rendered[0]}


def _limit_time() -> None:
    """The operating system ends this process that many seconds of processor time from now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime) + SECONDS, hard))


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


if __name__ == "__main__":
    main()
