"""Benchmarks of a GPU: CUDA graphs on both sides, warm and cold caches, the forecast row by row.

`cuda` holds every call that needs a device; the rest is arithmetic and order, tested without one.
"""
