"""The machine that numbers come from: its name, its versions, and its limits as measured in the same run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

import recmas_kernels
from recmas_kernels import info
from recmas_kernels.backends import cpu, native

LIMIT_ROUNDS = 15
PRODUCT_SIZES = (256, 1024, 2048)
PRODUCT_SECONDS = 0.5  # a product that is expected to take longer is not tried
BEYOND_CACHES = 512 * 2**20  # a buffer of this many bytes fits into no cache


class Limits:
    """Rates that nothing on this machine exceeded: a stream of reads, and the library's matrix product.

    Args:
        device: where the buffers live; CPU only so far.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._streams: dict[int, float] = {}
        self._products: dict[torch.dtype, float] = {}

    def stream(self, size: int) -> float:
        """Bytes per second of reading a buffer of ``size`` bytes again and again (cached by power of two).

        A working set that fits into a cache is read at that cache's rate, so that a floor stays a floor.
        """
        rounded = min(BEYOND_CACHES, max(2**20, 1 << (size - 1).bit_length()))
        if rounded not in self._streams:
            buffer = torch.ones(rounded // 4, device=self._device)
            self._streams[rounded] = rounded / _best(lambda: buffer.sum())
        return self._streams[rounded]

    @property
    def memory_stream(self) -> float:
        """Bytes per second of reading main memory."""
        return self.stream(BEYOND_CACHES)

    def product(self, dtype: torch.dtype) -> float:
        """Operations per second of the best library product; never below float32's, since a kernel may convert."""
        if dtype not in self._products:
            rates = []
            for size in PRODUCT_SIZES:
                if rates and 2 * size**3 / rates[-1] > PRODUCT_SECONDS:
                    break  # no library that is so slow in this dtype sets the limit
                left = torch.randn(size, size, device=self._device).to(dtype)
                right = torch.randn(size, size, device=self._device).to(dtype)
                out = torch.empty(size, size, device=self._device, dtype=dtype)
                rates.append(2 * size**3 / _best(lambda: torch.mm(left, right, out=out)))  # noqa: B023
            fastest = max(rates)
            self._products[dtype] = fastest if dtype is torch.float32 else max(fastest, self.product(torch.float32))
        return self._products[dtype]

    def measured(self) -> dict[str, dict[str, float]]:
        """What has been measured so far, for the record."""
        return {
            "stream_gbps": {f"{size >> 20} MiB": rate / 1e9 for size, rate in sorted(self._streams.items())},
            "product_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in self._products.items()},
        }


def _best(call: Any) -> float:
    """Shortest time in seconds of several calls, after warming up."""
    call()
    call()
    times = []
    for _ in range(LIMIT_ROUNDS):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


class Device:
    """The processor under measurement."""

    @cached_property
    def _cpuinfo(self) -> dict[str, str]:
        path = Path("/proc/cpuinfo")
        if not path.is_file():
            return {}
        first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}

    @property
    def name(self) -> str:
        return self._cpuinfo.get("model name") or platform.processor() or platform.machine()

    @property
    def vendor(self) -> str | None:
        """The processor's maker as it names itself ("AuthenticAMD"); None where the system does not say."""
        return self._cpuinfo.get("vendor_id")

    @property
    def has_bf16_products(self) -> bool:
        """Whether the chip multiplies bfloat16 itself, and does not imitate one that cannot."""
        flags = self._cpuinfo.get("flags", "").split()
        return not self.imitated and ("avx512_bf16" in flags or "amx_bf16" in flags)

    @property
    def imitated(self) -> str | None:
        """The lower instruction set that ``RECMAS_CPU_ISA`` asks for; None for the processor's own."""
        best = cpu.ISAS[native.load("cpu").best_isa()] if cpu.unavailable() is None else None
        used = cpu.instruction_set()[0] if best else None
        return None if used == best else used

    @cached_property
    def _caches(self) -> dict[str, str]:
        folders = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
        found = {}
        for folder in sorted(folders):
            kind, level = (folder / "type").read_text().strip(), (folder / "level").read_text().strip()
            if kind != "Instruction":
                found[f"l{level}"] = (folder / "size").read_text().strip()
        return found

    @property
    def slug(self) -> str:
        """Names the results folder: the processor, its family and model, what it imitates, the number of threads."""
        family = "-".join(self._cpuinfo[key] for key in ("cpu family", "model") if key in self._cpuinfo)
        imitated = f"as {self.imitated}" if self.imitated else ""
        return slug_of(f"cpu {self.name} {family} {imitated} {torch.get_num_threads()} threads")

    def clock_mhz(self) -> float | None:
        """Present clock of the first core, where the system tells."""
        path = Path("/proc/cpuinfo")
        match = re.search(r"cpu MHz\s*:\s*([\d.]+)", path.read_text()) if path.is_file() else None
        return float(match.group(1)) if match else None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "slug": self.slug,
            "threads": torch.get_num_threads(),
            "caches": self._caches,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "bf16_products": self.has_bf16_products,
            "instruction_set": info.collect()["instruction_set"],
        }


def slug_of(words: str) -> str:
    """``words`` as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "recmas_kernels": recmas_kernels.__version__,
    }
    if importlib.util.find_spec("zentorch") is not None:  # an optional peer
        found["zentorch"] = importlib.metadata.version("zentorch")
    return found


def git_commit() -> dict[str, Any]:
    """Commit of the working tree and whether tracked files differ from it; nulls outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def origin() -> dict[str, Any]:
    """What a record was made with: the commit, the versions and the number of threads."""
    return {"commit": git_commit(), "versions": versions(), "threads": torch.get_num_threads()}
