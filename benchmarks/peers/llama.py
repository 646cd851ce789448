"""llama.cpp as a peer of an agent's steps, through its binding llama-cpp-python and a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.machine import Device

SWITCH = "RECMAS_BENCH_LLAMA"
_WORKER = Path(__file__).with_name("llama_worker.py")


def llama_python() -> str | None:
    """The interpreter that has llama-cpp-python, from ``RECMAS_BENCH_LLAMA``; None where llama.cpp is no peer.

    It is none, either, where a lower processor is imitated: llama.cpp uses what it was built for.
    """
    return None if Device().imitated else os.environ.get(SWITCH)


class LlamaSequences:
    """Sequences of one GGUF file, continued together by llama.cpp, with as many threads as torch has.

    Args:
        python: an interpreter that has llama-cpp-python.
        file: as `gguf_file.write_gguf` writes it.
        op: "think" feeds embeddings and answers with hidden states, "write" tokens and logits.
        batch: B.
        columns: positions of each sequence, prompt and steps.
        dtype: of the weights; beside 16-bit ones the cache is float16, llama.cpp's default, else float32.

    Attributes:
        build: the version of the binding, and the features that llama.cpp says it was built with.

    Raises:
        RuntimeError: the interpreter, or llama.cpp in it, does not run; it has said why on standard error.
    """

    def __init__(self, python: str, file: Path, op: str, batch: int, columns: int, dtype: torch.dtype) -> None:
        threads, cache = str(torch.get_num_threads()), "float32" if dtype is torch.float32 else "float16"
        command = [python, "-I", str(_WORKER), str(file), str(batch), str(columns), threads, cache, op]
        self._name = python
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": threads},
            )
        except OSError as error:
            raise RuntimeError(f"{SWITCH}={python} does not run: {error}") from error
        try:
            self.build: dict[str, str] = self._answer()
        except BaseException:
            self.close()
            raise

    def feed(self, rows: Tensor) -> Tensor:
        """Outputs ``[B, d]`` or ``[B, V]``, float32, after ``[B, S, d]`` embeddings or ``[B, S]`` tokens."""
        return torch.from_numpy(self._ask("feed", (rows.float() if rows.is_floating_point() else rows).numpy()))

    def steps(self, count: int) -> None:
        """So many steps, without a link: hidden states are fed back as they are; or greedy tokens."""
        self._ask("steps", count)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._process.stdin.close()

    def _ask(self, request: str, value: Any) -> Any:
        assert self._process.stdin is not None
        pickle.dump((request, value), self._process.stdin)
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except EOFError:
            code = self._process.wait()
            raise RuntimeError(f"llama.cpp in {self._name} ended with exit code {code}; see standard error") from None
