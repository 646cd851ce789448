"""What the GPU itself can do, measured in the same run: copies, reads out of L2, products, the gap between launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness.gpu import cuda, probes

COPY_BYTES = 2**30  # per side; many times any L2
PRODUCT_SIZE = 8192
ROUNDS = 10


class GpuLimits:
    """Rates nothing on this device exceeded; each is measured when first asked for.

    Args:
        l2_bytes: size of the last cache.
        best: shortest time in seconds of a call; `cuda.seconds` over a few rounds unless a test says otherwise.
    """

    def __init__(self, l2_bytes: int, best: Callable[[Callable[[], object]], float] | None = None) -> None:
        self._l2_bytes = l2_bytes
        self._best = best or shortest
        self._rates: dict[str, float] = {}
        self._products: dict[torch.dtype, float] = {}

    @property
    def memory_stream(self) -> float:
        """Bytes per second of a large copy, bytes read plus bytes written."""
        return self._measured("copy", self._copy)

    def stream(self, size: int) -> float:
        """Bytes per second for operands of ``size`` bytes used again and again: L2's rate where half of it holds them.

        L2 has two halves and the far one is slower, so that operands which fill it are no longer served at its rate.
        """
        if size > self._l2_bytes / 2:
            return self.memory_stream
        return max(self.memory_stream, self._measured("L2 read", self._read))

    def product(self, dtype: torch.dtype) -> float:
        """Operations per second of the library's best large square product on random data."""
        if dtype not in self._products:
            left = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=dtype)
            right = torch.randn_like(left) * PRODUCT_SIZE**-0.5
            out = torch.empty_like(left)
            times = []
            for library in ("cublas", "cublaslt"):
                with cuda.blas(library):
                    times.append(self._best(lambda: torch.mm(left, right, out=out)))
            self._products[dtype] = 2 * PRODUCT_SIZE**3 / min(times)
        return self._products[dtype]

    def _measured(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self._rates:
            self._rates[name] = measure()
        return self._rates[name]

    def _copy(self) -> float:
        source = torch.ones(COPY_BYTES // 4, device="cuda")
        target = torch.empty_like(source)
        return 2 * COPY_BYTES / self._best(lambda: target.copy_(source))

    def _read(self) -> float:
        probe = probes.L2Read(self._l2_bytes // 3)
        return probe.bytes_per_call / self._best(probe)

    def measured(self) -> dict[str, dict[str, float]]:
        """What has been measured so far, for the record."""
        return {
            "stream_gbps": {name: rate / 1e9 for name, rate in self._rates.items()},
            "product_gflops": {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in self._products.items()},
        }


def shortest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS calls, after two to warm up."""
    call()
    call()
    return min(cuda.seconds(call) for _ in range(ROUNDS))
