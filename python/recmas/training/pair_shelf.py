"""The pairs of one agent on disk, in shards that are replaced whole or not at all.

A shard is a file ``00000.safetensors``: keys uint8 [texts, 16], lengths int32 [texts], hidden [n, d], ids int32 [n].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from recmas.files import replacing
from recmas.files.reading import check_regular, inside
from recmas.training.pairs import Pairs, Utterance


class Shelf:
    """The pairs of one agent, memory-mapped.

    Attributes:
        places: shard, first pair and number of pairs by key.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: list[Mapping[str, torch.Tensor]] = []
        self._next = 0
        self.places: dict[bytes, tuple[int, int, int]] = {}
        for path in sorted(folder.glob("[0-9]*.safetensors")):
            self._open(path)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one more shard, and open it."""
        path = self._folder / f"{self._next:05d}.safetensors"
        with replacing(path) as file:
            file.write(save(dict(tensors)))
        self._open(path)

    def pairs(self, said: Sequence[Place]) -> Pairs:
        """Of these utterances, one after the other, on the CPU."""
        hidden, ids = [], []
        for place in said:
            shard, start, count = self.places[place.key]
            hidden.append(self._shards[shard]["hidden"][start : start + count])
            ids.append(self._shards[shard]["ids"][start : start + count])
        lengths = [len(part) for part in ids]
        return Pairs(torch.cat(hidden), torch.cat(ids).long(), lengths, [place.text for place in said])

    def _open(self, path: Path) -> None:
        inside(self._folder, path.name, str(self._folder))
        try:
            check_regular(path)
            shard = load_file(path)
            keys, lengths = shard["keys"].numpy(), shard["lengths"].tolist()
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it and its pairs are made again") from None
        start = 0
        for key, length in zip(keys, lengths, strict=True):
            self.places[key.tobytes()] = len(self._shards), start, length
            start += length
        self._shards.append(shard)
        self._next = int(path.stem) + 1


class Place(NamedTuple):
    """What is kept of an utterance whose pairs are in a cache."""

    key: bytes
    text: str

    @classmethod
    def of(cls, said: Utterance) -> Place:
        return cls(key_of(said), said.text)


def key_of(said: Utterance) -> bytes:
    """A digest of the ids that the agent reads and says, 16 bytes."""
    digest = hashlib.blake2b(len(said.prompt).to_bytes(8, "little"), digest_size=16)
    digest.update(said.prompt)
    digest.update(said.said)
    return digest.digest()
