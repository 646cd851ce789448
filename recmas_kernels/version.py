"""The version of both packages, ``recmas_kernels`` and ``recmas``. The build reads this file without importing it."""

__version__ = "0.1.0"
