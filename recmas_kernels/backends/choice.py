"""Which backend serves which call: the table, the user's request, and the choice that follows from both.

A backend is a module with

- ``unavailable() -> reason | None``: why it cannot serve any call on this machine,
- ``declines(call) -> reason | None``: why it does not serve this call,
- one function per op, named as the op and called as the function of that name in ``recmas_kernels.reference``;
- optionally, for `explain`, ``describe(call) -> facts`` and ``variants(call, residual, norm, device) -> lines``.

Both reasons depend on nothing that changes while a process runs, so choices are remembered. The reference serves every
call.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

from recmas_kernels.backends import settings
from recmas_kernels.backends.call import Call

# Tried in this order for tensors on a device; the first that is available and does not decline serves the call.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
ELSEWHERE = ("reference",)
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
_MODULES = {
    "reference": "recmas_kernels.reference",
    "cpu": "recmas_kernels.backends.cpu",
    "cuda": "recmas_kernels.backends.cuda",
    "triton": "recmas_kernels.backends.triton",
}


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message says why."""


@dataclass(eq=False)
class _Request:
    name: str


_requests: list[_Request] = []


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


def requested() -> str:
    """The backend asked for: by the innermost ``use_backend``, else by ``RECMAS_BACKEND``, else "auto"."""
    return _known(_asked_for())


def _asked_for() -> str:
    return _requests[-1].name if _requests else settings.backend() or "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op inside the block with one backend.

    The request holds for the whole process, since autograd runs backward passes on threads of its own. Where several
    threads are in such blocks, the one that began last counts.

    Args:
        name: one of ``BACKENDS``. "auto" takes the first backend that can serve a call. Any other name never falls
            back: a call that it cannot serve raises `BackendUnavailableError` with the reason.

    Raises:
        ValueError: no backend has this name.
    """
    request = _Request(_known(name))
    _requests.append(request)
    try:
        yield
    finally:
        # By identity: another thread's block may have begun after this one and not ended yet.
        _requests[:] = [other for other in _requests if other is not request]


def order(device: str) -> tuple[str, ...]:
    """The backends for tensors on a device, in the order in which they are tried."""
    return ORDER.get(device, ELSEWHERE)


@cache
def load(name: str) -> ModuleType:
    """The module of a backend. Importing it loads nothing compiled."""
    return importlib.import_module(_MODULES[name])


def refusal(name: str, call: Call) -> str | None:
    """Why backend ``name`` does not serve ``call``; None if it does."""
    if name == "reference":
        return None
    if name not in order(call.device):
        return f"it does not serve {call.device} tensors"
    try:
        module = load(name)
    except ModuleNotFoundError as error:
        if error.name != _MODULES[name]:
            raise
        return "this build does not contain it"
    return module.unavailable() or module.declines(call)


def choose(call: Call) -> ModuleType:
    """The backend module that serves ``call``, by the table and the user's request.

    Raises:
        BackendUnavailableError: the backend that was asked for cannot serve it.
        ValueError: ``RECMAS_BACKEND`` names no backend.
    """
    return _serving(_asked_for(), call, order(call.device))


@lru_cache(maxsize=4096)
def _serving(name: str, call: Call, candidates: tuple[str, ...]) -> ModuleType:
    if _known(name) != "auto":
        reason = refusal(name, call)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend {name!r} cannot serve {call.op} on {call.device} in {call.dtype}: {reason}; "
                "use_backend('auto') chooses one that can"
            )
        return load(name)
    for candidate in candidates:
        if refusal(candidate, call) is None:
            return load(candidate)
    raise AssertionError("the reference backend serves every call")


def expect_reference(what: str) -> None:
    """Raise BackendUnavailableError if kernels were asked for by name where only plain torch can serve ``what``."""
    name = requested()
    if name not in ("auto", "reference"):
        raise BackendUnavailableError(f"backend {name!r} cannot serve {what}: plain torch does, by use_backend('auto')")
