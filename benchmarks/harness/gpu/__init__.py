"""Benchmarks of a GPU: CUDA graphs on both sides, warm and cold caches, the forecast row by row.

`cuda` holds every call that needs a device; everything else is tested without one.
"""
