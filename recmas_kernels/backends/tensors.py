"""One look at all tensors of a link, compiled, for tensors on any device. The only caller of ``_tensors``."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from recmas_kernels.backends import native
from recmas_kernels.reference import LinkArguments


@cache
def _native() -> ModuleType | None:
    try:
        return native.load("tensors")
    except ImportError:  # `info` says why; the checks in Python serve every call, some 20 us slower
        return None


def is_plain_link(arguments: LinkArguments, mixed: bool) -> bool:
    """Whether x and the ten parameters are plain tensors on one device that fit each other and need no conversion.

    Takes 0.4 us. False means "look closely": something does not fit, or this build has no ``_tensors``. ``mixed``
    allows parameters of another floating-point dtype than x's, as under autocast.
    """
    module = _native()
    return module is not None and module.is_plain_link(arguments, mixed)
