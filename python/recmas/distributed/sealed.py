"""A message between processes as bytes: what it says of itself, its numbers as they lie in memory, and a seal.

    "RECMAS1\\n" | length of the header, 4 bytes | header, JSON | payload | HMAC-SHA256 of all before it, 32 bytes

The header names the system, the link and the task that made the message, so that an honest message in another's place
is refused, too; the key belongs to one run. Nothing is unpickled.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from recmas.dtypes import DTYPES
from recmas.engine.messages import Latents, Message

_MAGIC = b"RECMAS1\n"
_SEAL = 32
_TEXT = "text"


class RefusedError(ValueError):
    """A message that is not the one that was expected, bit for bit; nothing of it was used."""


@dataclass(frozen=True)
class Stamp:
    """Which message it is.

    Attributes:
        system: digest of the system (`recmas.system.fingerprint`).
        link: digest of the sender's inner link; empty for texts.
        sender: the role.
        task: number of the task that made it; none has another's, so that an old message is not taken for a new one.
    """

    system: str
    link: str
    sender: str
    task: int


def seal(message: Message, stamp: Stamp, key: bytes) -> bytes:
    """The bytes of a message.

    Args:
        message: latents in float32, float16 or bfloat16, or texts.
        stamp: which message it is.
        key: of the run.
    """
    header: dict[str, Any] = asdict(stamp)
    if isinstance(message, Latents):
        states = message.states.detach().cpu().contiguous()
        dtype = str(states.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise TypeError(f"latents of {dtype} cannot be sent, only of {', '.join(DTYPES[1:])}")
        header |= {"shape": list(states.shape), "dtype": dtype}
        header["lengths"] = None if message.lengths is None else message.lengths.tolist()
        payload = states.reshape(-1).view(torch.uint8).numpy().data if states.numel() else b""
    else:
        payload = json.dumps(message).encode()
        header |= {"shape": [len(message)], "dtype": _TEXT, "lengths": None}
    head = json.dumps(header).encode()
    parts = (_MAGIC, len(head).to_bytes(4, "little"), head, payload)
    mac = hmac.new(key, digestmod="sha256")
    for part in parts:
        mac.update(part)
    return b"".join((*parts, mac.digest()))


def unseal(sealed: bytes, expected: Stamp, key: bytes) -> Message:
    """The message in `sealed`.

    Raises:
        RefusedError: its seal is not made with this key, or it is another message than the expected one.
    """
    body = memoryview(sealed)
    if len(body) < len(_MAGIC) + 4 + _SEAL or body[: len(_MAGIC)] != _MAGIC:
        raise RefusedError(f"the message of {expected.sender!r} is no sealed message")
    mac = hmac.new(key, body[:-_SEAL], "sha256")
    if not hmac.compare_digest(mac.digest(), body[-_SEAL:]):
        raise RefusedError(f"the message of {expected.sender!r} was changed on its way, or is of another run")
    start = len(_MAGIC) + 4
    end = start + int.from_bytes(body[len(_MAGIC) : start], "little")
    header = json.loads(bytes(body[start:end]))
    for name, value in asdict(expected).items():
        if header[name] != value:
            raise RefusedError(
                f"the message of {expected.sender!r} is another one: its {name} is {header[name]!r}, not {value!r}"
            )
    payload = body[end:-_SEAL]
    if header["dtype"] == _TEXT:
        texts: list[str] = json.loads(bytes(payload))
        return texts
    shape, dtype = header["shape"], getattr(torch, header["dtype"])
    states = torch.frombuffer(bytearray(payload), dtype=dtype) if payload else torch.empty(0, dtype=dtype)
    lengths = None if header["lengths"] is None else torch.tensor(header["lengths"], dtype=torch.int64)
    return Latents(states.reshape(shape), lengths)
