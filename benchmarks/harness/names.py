"""Names of implementations that more than one suite, table or plot uses."""

from __future__ import annotations

FUSED = "fused"  # what is under test
PRODUCTS = "products"  # the library's bare matrix products: an upper limit, no peer
COMPILED = ("compile", "compile-frozen", "zentorch")  # peers whose operators torch does not dispatch one by one
REFERENCE = "reference algorithm"
AGAIN = " (again)"  # appended to the name of the peer that is timed twice
