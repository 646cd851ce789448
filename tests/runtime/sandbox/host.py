"""A host with something to lose, for programs that try to reach it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import recmas

SECRET = b"recmas-secret-" + uuid.uuid4().hex.encode()
LIBC = ctypes.CDLL(None, use_errno=True)


class Host:
    """What a program knows of us (`facts`), and what we look at afterwards."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.memory = ctypes.create_string_buffer(SECRET)
        self.file = folder / "home" / ".ssh" / "id"
        self.file.parent.mkdir(parents=True)
        self.file.write_bytes(SECRET)
        program = folder / "program"
        program.write_text("#!/bin/sh\necho ESCAPED\n")
        program.chmod(0o4755)
        self.mark = folder / "mark"
        self.open_file = os.open(self.file, os.O_RDONLY)
        os.set_inheritable(self.open_file, True)
        stack.callback(os.close, self.open_file)
        self.shared = Path("/dev/shm", SECRET.decode())
        self.shared.write_bytes(SECRET)
        stack.callback(self.shared.unlink)
        private, size, create = 0x7E57 + os.getpid(), 4096, 0o1600
        segment = LIBC.shmget(private, size, create)
        stack.callback(LIBC.shmctl, segment, 0, None)
        self.sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        stack.callback(self.sleeper.wait)
        stack.callback(self.sleeper.kill)
        abstract = "\0" + SECRET.decode()
        self.servers = {
            "tcp": _server(stack, socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "udp": _server(stack, socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "abstract": _server(stack, socket.AF_UNIX, socket.SOCK_DGRAM, abstract),
            "path": _server(stack, socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "socket")),
        }
        self.facts: dict[str, Any] = {
            "secret_size": len(SECRET),
            "pid": os.getpid(),
            "address": ctypes.addressof(self.memory),
            "file": str(self.file),
            "inode": self.file.stat().st_ino,
            "program": str(program),
            "mark": str(self.mark),
            "fd": self.open_file,
            "shared": str(self.shared),
            "key": private,
            "sleeper": self.sleeper.pid,
            "tcp": list(self.servers["tcp"].getsockname()),
            "udp": list(self.servers["udp"].getsockname()),
            "abstract": abstract,
            "path": str(folder / "socket"),
            "repository": str(Path(recmas.__file__).parent),
            "prefix": sys.prefix,
        }

    def unharmed(self) -> bool:
        """Whether everything is as it was: memory, files, the other process; and no message came."""
        assert self.memory.value == SECRET
        assert self.file.read_bytes() == SECRET
        assert self.file.stat().st_nlink == 1
        assert not self.mark.exists()
        assert self.sleeper.poll() is None
        for server in self.servers.values():
            with contextlib.suppress(BlockingIOError):
                assert not (server.accept() if server.type == socket.SOCK_STREAM else server.recv(100))
        return True


def _server(stack: contextlib.ExitStack, family: int, kind: int, address: Any) -> socket.socket:
    server = stack.enter_context(socket.socket(family, kind))
    server.bind(address)
    server.setblocking(False)
    if kind == socket.SOCK_STREAM:
        server.listen()
    return server


@contextlib.contextmanager
def standing(folder: Path) -> Iterator[Host]:
    """A host as long as the block runs."""
    with contextlib.ExitStack() as stack:
        yield Host(folder, stack)
