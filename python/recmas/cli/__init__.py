"""The command line: ``recmas COMMAND ...``. One module per command; nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from recmas.cli.parser import CommandLineParser, one_line, visible

COMMANDS = {
    "init": "make a system of given models, with fresh links",
    "run": "answer questions with a system",
    "serve": "answer requests over HTTP, in the OpenAI format",
    "eval": "measure a system's accuracy on questions with known answers",
    "audit": "ask whether what a system's latents say matters, and what does as well as they do",
    "tune": "find rounds, latent steps and pattern by validation under a budget",
    "train": "train a system's links: inner, warmup, outer or all",
    "lab": "the relay lab: build, questions, eval, demo; and questions of the notes task",
    "convert": "read and write the reference implementation's systems and links",
    "inspect": "show a system's parts, and what its latents look like",
    "check": "prove what a model can do as an agent, with the numbers",
    "info": "show versions, what is built and which kernels serve; of a system, its memory and what is off",
}
DESCRIPTION = """Recursive multi-agent systems whose agents pass latent thoughts instead of text.

A system is a folder with system.json, its links and, where local, its models. `recmas COMMAND --help` explains a
command; every option can also stand in a YAML file given with --config."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 on success, 2 after a one-line error, 1 after one of recmas itself; 130, 143 or 129 after SIGINT, SIGTERM or
        SIGHUP, but 0 where SIGTERM ended a training or a server in order.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _ending_signals():
            return _run(words)
    except KeyboardInterrupt:
        print("recmas: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Ended as end:
        print(f"recmas: ended by {signal.Signals(end.number).name}", file=sys.stderr)
        return 128 + end.number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        traced = "--traceback" in words
        if traced:
            traceback.print_exc()
        if (told := _told(error)) is not None:
            print(f"recmas: error: {told}", file=sys.stderr)
            return 2
        kind = type(error).__name__
        advice = "" if traced else "; recmas --traceback COMMAND shows where it arose"
        print(f"recmas: internal error: {kind}: {one_line(error)}{advice}", file=sys.stderr)
        return 1


class Ended(BaseException):
    """SIGTERM or SIGHUP has arrived; what is open is closed on the way out, as after an interrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise Ended(number)


@contextmanager
def _ending_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise `Ended`, unless they are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(words: list[str]) -> int:
    parser = CommandLineParser(words, prog="recmas", description=DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose")
    parser.add_commands(
        "command", COMMANDS, lambda name, command: importlib.import_module(f"recmas.cli.{name}").add_options(command)
    )
    try:
        parsed = parser.parse_args(words)
    except UnicodeDecodeError as error:  # of the one file that is read here
        raise ValueError(f"--config: not UTF-8 text ({error.reason} at byte {error.start})") from None
    result = importlib.import_module(f"recmas.cli.{parsed.command}").execute(parsed[parsed.command])
    sys.stdout.flush()
    return int(result)


class _Version(argparse.Action):
    """Reads the version when it is asked for, since the package that has it imports torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from recmas import __version__

        print(f"recmas {__version__}")
        parser.exit()


def _told(error: Exception) -> str | None:
    """One line, where the input or the machine is to blame; None where it is a mistake in recmas."""
    if isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
        return one_line(error)
    if not isinstance(error, RuntimeError):
        return None
    from torch import OutOfMemoryError

    from recmas.devices.failure import failure
    from recmas_kernels import BackendUnavailableError

    if isinstance(error, BackendUnavailableError | OutOfMemoryError):
        return one_line(error)
    return visible(failure(error)) or None
