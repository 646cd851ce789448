"""State dicts that ``torch.save`` wrote, read as data: nothing of the pickle runs, nothing is allocated that the file
does not hold.

``torch.load(weights_only=True)`` runs no code either, but it allocates what a few bytes ask for: a 64 GiB bytearray, a
compressed entry, a tensor of stride 0. So the archive's entries are compared with the file's size, the pickle is
interpreted with four names, and each tensor with the entry that holds its elements.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGEST_PICKLE = 16 << 20
"""Bytes of names and shapes."""

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        ValueError: no archive of ``torch.save``, or one of something else than plain dense tensors; without the path.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _state_dict(archive, path.stat().st_size)
    except zipfile.BadZipFile as error:
        raise ValueError(f"no archive of torch.save ({error})") from None


def _state_dict(archive: zipfile.ZipFile, size: int) -> dict[str, Tensor]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"entry {entry.filename!r} is compressed")
    if sum(entry.file_size for entry in entries.values()) > size:
        raise ValueError("its entries are larger than the file")
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("no archive of torch.save (no data.pkl)")
    root = roots[0]
    if entries[f"{root}/data.pkl"].file_size > LARGEST_PICKLE:
        raise ValueError("its pickle is too large")
    order = f"{root}/byteorder"
    if order in entries and archive.read(order) != b"little":
        raise ValueError("its bytes are not in little-endian order")
    try:
        state = _Reader(archive, root, entries).load()
    except ValueError:
        raise
    except Exception as error:  # a broken pickle raises whatever its next instruction does with what it finds
        raise ValueError(f"a broken pickle ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError("holds no state dict of tensors")
    return dict(state)


class _Reader(pickle._Unpickler):  # in Python: the C one allocates what an index asks for
    """Knows four names; a storage becomes its bytes, once."""

    def __init__(self, archive: zipfile.ZipFile, root: str, entries: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root, self.entries = archive, root, entries
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) not in known:
            raise ValueError(f"holds {module}.{name}, which is no part of a state dict")
        return known[module, name]

    def persistent_load(self, described: Any) -> Tensor:
        """The elements of a storage, 1-D."""
        _, dtype, key, _, elements = described
        entry = self.entries.get(f"{self.root}/data/{key}")
        if entry is None or not isinstance(dtype, torch.dtype):
            raise ValueError(f"storage {key!r} is missing")
        if not isinstance(elements, int) or elements < 0 or elements * dtype.itemsize != entry.file_size:
            raise ValueError(f"storage {key!r} holds {entry.file_size} bytes, not the {elements} elements it should")
        if key not in self.storages:
            content = bytearray(self.archive.read(entry))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _tensor(storage: Tensor, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not len(shape) == len(strides) <= 8:
        raise ValueError(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
    numbers = [offset, *shape, *strides]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"a tensor of shape {tuple(shape)}, strides {tuple(strides)}, offset {offset}")
    elements = math.prod(shape)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if elements > storage.numel() or (elements and last >= storage.numel()):
        raise ValueError(f"a tensor of shape {tuple(shape)} in a storage of {storage.numel()} elements")
    return storage.as_strided(tuple(shape), tuple(strides), offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data
