"""llama.cpp in a process of its own, so that its OpenMP runtime does not meet torch's; `llama.py` starts it.

Run by an interpreter that has llama-cpp-python, and neither torch nor this project; called with the model's file,
sequences, positions of each, threads, the dtype of the cache, and "think" or "write". It reads pickled requests from
its standard input and answers each on its standard output.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import pickle
import sys
from typing import Any

import llama_cpp
import numpy as np

CACHES = {"float32": llama_cpp.GGML_TYPE_F32, "float16": llama_cpp.GGML_TYPE_F16}
ERROR = 4  # llama.cpp's level of log lines that say what failed


class Sequences:
    """Equally long sequences of one model, continued together: by input embeddings (think) or by tokens (write)."""

    def __init__(self, file: str, batch: int, columns: int, threads: int, cache: str, thinks: bool) -> None:
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp does not read {file}")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = batch * columns, batch
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = CACHES[cache]
        if cache == "float32":  # llama.cpp's fused attention rounds to 16 bits whatever the cache holds
            wanted.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        wanted.embeddings, wanted.pooling_type = thinks, llama_cpp.LLAMA_POOLING_TYPE_NONE
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {batch} sequences of {columns} positions")
        self._thinks, self._batch, self._columns, self._length = thinks, batch, columns, 0
        self._features = llama_cpp.llama_model_n_embd(self._model)
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._width = self._features if thinks else vocabulary
        self._latest: list[Any] = []

    def feed(self, rows: Any) -> None:
        """Read ``[B, S]`` tokens or ``[B, S, d]`` embeddings beyond what was read."""
        batch, count = rows.shape[:2]
        if self._length + count > self._columns:
            raise ValueError(f"position {self._length + count} is beyond the {self._columns} that there are")
        total = batch * count
        held = llama_cpp.llama_batch_init(total, self._features if self._thinks else 0, 1)
        try:
            flat = np.ascontiguousarray(rows, np.float32 if self._thinks else np.int32)
            ctypes.memmove(held.embd if self._thinks else held.token, flat.ctypes.data, flat.nbytes)
            held.n_tokens = total
            for index in range(total):
                held.pos[index] = self._length + index % count
                held.n_seq_id[index] = 1
                held.seq_id[index][0] = index // count
                held.logits[index] = index % count == count - 1
            if (code := llama_cpp.llama_decode(self._context, held)) != 0:
                raise ValueError(f"llama_decode gave {code}")
        finally:
            llama_cpp.llama_batch_free(held)
        self._length += count
        output_of = llama_cpp.llama_get_embeddings_ith if self._thinks else llama_cpp.llama_get_logits_ith
        self._latest = [
            np.ctypeslib.as_array(output_of(self._context, (row + 1) * count - 1), (self._width,))
            for row in range(batch)
        ]

    def outputs(self) -> Any:
        """Final-norm hidden states ``[B, d]`` or logits ``[B, V]`` of the last position, float32."""
        return np.stack(self._latest)

    def steps(self, count: int) -> None:
        """Feed hidden states back as they are, or the likeliest tokens."""
        for _ in range(count):
            rows = self.outputs() if self._thinks else np.array([row.argmax() for row in self._latest])
            self.feed(rows[:, None])


def main(file: str, batch: str, columns: str, threads: str, cache: str, op: str) -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    sequences = Sequences(file, int(batch), int(columns), int(threads), cache, op == "think")
    features = llama_cpp.llama_print_system_info().decode()
    answer({"llama-cpp-python": importlib.metadata.version("llama-cpp-python"), "built for": features})
    while True:
        try:
            request, value = pickle.load(sys.stdin.buffer)
        except EOFError:  # whoever asked is done
            return
        if request == "feed":
            sequences.feed(value)
            answer(sequences.outputs())
        else:
            sequences.steps(value)
            answer(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
