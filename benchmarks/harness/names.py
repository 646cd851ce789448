"""Names of implementations that more than one suite, table or plot uses."""

from __future__ import annotations

FUSED = "fused"  # what is under test
FUSED_PLAIN = "fused, plain agents"  # beside agents as the runtime loads them on a CPU, from packed weights
PRODUCTS = "products"  # the library's bare matrix products: an upper limit, no peer
READS = "reads"  # a bare read of as many bytes: an upper limit, no peer
EAGER_FLOAT32 = "eager, float32"  # beside cells of another dtype: the same link in float32
ZENTORCH = "zentorch"
COMPILE_FROZEN = "compile-frozen"
LLAMA = "llama.cpp"
COMPILED = ("compile", COMPILE_FROZEN, ZENTORCH)  # peers whose operators torch does not dispatch one by one
REFERENCE = "reference algorithm"
AGAIN = " (again)"  # appended to the name of the peer that is timed twice
