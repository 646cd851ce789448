"""What a safetensors file holds, from its header: no weight is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recmas.files.reading import inside, open_regular, read_json

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
LONGEST_HEADER = 100_000_000  # safetensors' own limit


class Stored(NamedTuple):
    """One tensor of a file; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> Iterator[Stored]:
    """The tensors of a model or link in `folder`: of its one file, or of those that its index names.

    Raises:
        ValueError: no safetensors files there, a shard of the index missing or outside of the folder, or a file that is
            cut short or has no readable header.
    """
    index = folder / INDEX
    names = [WEIGHTS]
    if index.exists():
        content = read_json(index, LONGEST_HEADER)
        try:
            names = sorted(set(content["weight_map"].values()))
            for name in names:
                inside(folder, name, f"{index}: weight_map")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: cannot be read: {error}") from None
    for name in names:
        for tensor, described in _header(folder / name).items():
            yield Stored(tensor, str(described["dtype"]), tuple(described["shape"]))


def _header(file: Path) -> dict[str, Any]:
    try:
        with open_regular(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < LONGEST_HEADER:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        whole = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if (size := file.stat().st_size) < whole:
            raise ValueError(f"{size} of {whole} bytes are there")
        return dict(header)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; only safetensors files are read") from None
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: is truncated or no safetensors file: {error}") from None
