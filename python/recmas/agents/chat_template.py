"""Chat templates, applied in a process of their own: they are programs, and a downloaded one may never end.

The process (`recmas.agents.chat_worker`) is started at the first use, serves all templates, and is bounded in processor
time and memory by the operating system; a template cannot catch that. It shares nothing with this process but a pipe.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import wait
from typing import Any

from transformers import PreTrainedTokenizerBase

from recmas.agents.chat_worker import MEMORY, SECONDS
from recmas.prompts.renderer import ChatTemplateError

_PATIENCE = 120.0  # seconds for the process to start, and for a machine that is busy with other things


class ChatTemplate:
    """The chat template of a tokenizer: messages become text, with the generation prompt.

    Args:
        tokenizer: of transformers. One whose class applies templates in a way of its own (which needs
            ``trust_remote_code``) does so in this process, without limits.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        own = getattr(type(tokenizer), "apply_chat_template", None)
        self._bounded = own is PreTrainedTokenizerBase.apply_chat_template

    def __call__(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        """Apply the template.

        Args:
            messages: with role and content.
            tools: as the template knows them; None is none, and no list of them either.

        Raises:
            ChatTemplateError: the template raises an error, as some do for messages they do not take.
            ValueError: it takes too much time or memory.
        """
        if not self._bounded:
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False, "tools": tools}
            return str(self.tokenizer.apply_chat_template(messages, **options))
        request = {
            "template": self.tokenizer.get_chat_template(),
            "messages": messages,
            "tools": tools,
            "variables": {name: _plain(value) for name, value in self.tokenizer.special_tokens_map.items()},
        }
        answer = _process().ask(json.dumps(request))
        if "error" in answer:
            raise ChatTemplateError(answer["error"])
        return str(answer["text"])


def _plain(value: Any) -> str | list[str]:
    """A special token, or several, without what a tokenizer keeps beside their text."""
    return [str(one) for one in value] if isinstance(value, list) else str(value)


class _Process:
    """The process that applies templates; whoever asks waits for whoever asked before."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "recmas.agents.chat_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # an interrupt from the terminal is for this process alone
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: str) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(request.encode() + b"\n")
                self._process.stdin.flush()
                ready = wait([self._process.stdout.fileno()], _PATIENCE)
                line = self._process.stdout.readline() if ready else b""
            except BrokenPipeError:
                line = b""
            except BaseException:  # an interrupt: the next answer would be to this request
                self._process.kill()
                raise
            if line.endswith(b"\n"):
                return dict(json.loads(line))
            self._process.kill()
            status = self._process.wait()
        if status == -signal.SIGXCPU:
            raise ValueError(f"the chat template takes more than {SECONDS} seconds of processor time")
        raise ValueError(
            f"the chat template's process ended with status {status}; it may take {SECONDS} seconds of processor time "
            f"and {MEMORY >> 20} MiB of memory"
        )


_running: list[_Process] = []
_starting = threading.Lock()


def _process() -> _Process:
    """The process; a new one where there is none, it has ended, or a fork's parent owns it."""
    with _starting:
        if not _running or not _running[0].alive or _running[0].owner != os.getpid():
            _running[:] = [_Process()]
        return _running[0]
