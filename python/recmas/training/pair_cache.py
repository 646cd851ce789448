"""Pairs on disk: every text runs through its frozen agent once, however often links are trained on it.

A cache is a folder with one folder per role in it. That holds shards (`recmas.training.pair_shelf`) and ``pairs.json``,
which says what the pairs depend on beside the token ids: model, tokenizer, prompts and dtype.

A text's key is a digest of the ids that the agent reads and says, so neither other data nor another round can be taken
for it; what is held already, by whichever stage, is not run again. Shards are replaced whole or not at all, and texts
are put into shards in an order of their own: an interrupted cache is completed to the very bits of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from recmas.agents.agent import Agent
from recmas.agents.fingerprint import model_digest, tokenizer_digest
from recmas.files import write_atomically
from recmas.files.locks import one_writer
from recmas.files.reading import inside, read_json
from recmas.system.system import System
from recmas.training.pair_shelf import Shelf, key_of
from recmas.training.pairs import Utterance, speak
from recmas.training.processes import processes
from recmas.training.progress import Shown, bar

IDENTITY = "pairs.json"
SHARD_BYTES = 64 * 2**20
"""Of hidden states; what an interrupt can cost."""
POSITIONS = 4096
"""Of prompts and texts, padding included, in one forward."""
STORED = ("auto", "float32", "bfloat16")


class PairCache:
    """A folder that keeps pairs.

    Args:
        folder: of the cache; made where it does not exist.
        dtype: of hidden states on disk: "float32", "bfloat16", or "auto", the model's own.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: str = "auto") -> None:
        if dtype not in STORED:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(STORED)}")
        self.folder, self.dtype = Path(folder), dtype

    def plan(self, system: System, said: Mapping[str, Sequence[Utterance]]) -> dict[str, Plan]:
        """By role, the pairs that a run reads: checked, and made when `Plan.fill` is called. Nothing is written here.

        Args:
            system: whose agents these are.
            said: utterances by role, repeats allowed.

        Raises:
            ValueError: the cache holds pairs of another model, tokenizer, prompt or dtype, or a file that cannot be
                read; or the disk has no room for what is missing.
        """
        plans = {}
        for role, utterances in said.items():
            stored = system.agents[role].dtype if self.dtype == "auto" else getattr(torch, self.dtype)
            inside(self.folder, role, str(self.folder))
            identity = _identity(system, role, stored)
            plans[role] = Plan(self.folder / role, system.agents[role], identity, stored, utterances)
        _check_room(self.folder, [plan.missing() for plan in plans.values()])
        return plans


class Plan:
    """The pairs of one agent that a run reads.

    Args:
        folder: of this agent's pairs; it need not exist.
        agent: says the utterances.
        identity: what pairs depend on beside the token ids.
        stored: dtype of hidden states on disk.
        said: utterances, repeats allowed.

    Raises:
        ValueError: the folder holds pairs of another identity.
    """

    def __init__(
        self,
        folder: Path,
        agent: Agent,
        identity: Mapping[str, str],
        stored: torch.dtype,
        said: Sequence[Utterance],
    ) -> None:
        self._folder, self._agent, self._identity, self._stored = folder, agent, identity, stored
        self._asked = {key_of(one): one for one in said}
        _check_identity(folder, identity)

    def missing(self, shelf: Shelf | None = None) -> Missing:
        """What the folder, or the open `shelf`, does not hold, in the order in which it is made."""
        held = (shelf or Shelf(self._folder)).places
        missing = {key: one for key, one in self._asked.items() if key not in held}
        order = sorted(missing, key=lambda key: (-len(missing[key].prompt) - len(missing[key].said), key))
        return Missing([missing[key] for key in order], self._width)

    def fill(self, *, progress: Shown = True) -> Shelf:
        """Make the pairs that the folder does not hold yet, and open all.

        The size of what is to be written is announced on stderr before (with ``progress``).

        Args:
            progress: announce, and show a bar where stderr is a terminal; "always" wherever it goes.

        Raises:
            ValueError: as `PairCache.plan`, for what has changed since; or another process fills the folder.
        """
        together = processes()
        if together.writes:
            self._write(progress)
        together.wait()
        return Shelf(self._folder)

    def _write(self, progress: Shown) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with one_writer(self._folder):
            if not _check_identity(self._folder, self._identity):
                write_atomically(self._folder / IDENTITY, json.dumps(dict(self._identity), indent=1) + "\n")
            shelf = Shelf(self._folder)
            missing = self.missing(shelf)
            _check_room(self._folder, [missing])
            if missing.said and progress:
                _announce(self._folder, missing, len(self._asked) - len(missing.said))
            with bar(progress, total=len(missing.said), desc=f"pairs of {self._folder.name}", unit="text") as made:
                for shard in _shards(missing.said, self._width):
                    shelf.add(_made(self._agent, shard, self._stored))
                    made.update(len(shard))

    @property
    def _width(self) -> int:
        """Bytes of a hidden state."""
        return self._agent.hidden_size * self._stored.itemsize


class Missing(NamedTuple):
    """Utterances whose pairs are to be made, and bytes of a hidden state."""

    said: list[Utterance]
    width: int

    @property
    def size(self) -> int:
        """Bytes on disk."""
        pairs = sum(len(one.said) for one in self.said)
        shards = min(len(self.said), 1 + pairs * self.width // SHARD_BYTES)
        return pairs * (self.width + 4) + len(self.said) * 20 + shards * 1024


def _identity(system: System, role: str, stored: torch.dtype) -> dict[str, str]:
    agent, setting = system.agents[role], system.settings[role]
    template = getattr(agent.tokenizer, "chat_template", None) if setting.chat else None
    prompts = repr((setting.prompt.first, setting.prompt.later, setting.system, template))
    return {
        "model": model_digest(agent),
        "tokenizer": tokenizer_digest(agent.tokenizer),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "dtype": str(stored).removeprefix("torch."),
    }


def _check_identity(folder: Path, identity: Mapping[str, str]) -> bool:
    """Whether the folder says what its pairs depend on; raise ValueError, naming what differs, if it is another."""
    path = folder / IDENTITY
    inside(folder, IDENTITY, str(folder))
    if not path.exists():
        return False
    try:
        found = dict(read_json(path))
    except (ValueError, TypeError):
        raise ValueError(f"{path}: does not describe a cache of pairs") from None
    for what, value in identity.items():
        if found.get(what) != value:
            differ = f"{str(found.get(what))[:12]} there, {value[:12]} here"
            raise ValueError(
                f"{folder}: holds pairs of another {what} ({differ}); "
                "choose another folder (--cache DIR, cache=DIR) or delete this one"
            )
    return True


def _check_room(folder: Path, missing: Sequence[Missing]) -> None:
    """Raise ValueError if the disk has no room for what is missing."""
    needed, free = sum(one.size for one in missing), _free(folder)
    if needed > free:
        texts = sum(len(one.said) for one in missing)
        raise ValueError(
            f"{folder}: {needed / 1e6:,.1f} MB of pairs for {texts:,} texts do not fit, {free / 1e6:,.1f} MB are free; "
            "choose another disk (--cache DIR, cache=DIR) or go without a cache (--cache off, cache=None)"
        )


def _free(folder: Path) -> int:
    """Bytes of the disk that the folder is on, or will be."""
    there = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    if not there.is_dir():
        raise ValueError(f"{there}: is a file, expected a folder for pairs")
    return shutil.disk_usage(there).free


def _announce(folder: Path, missing: Missing, held: int) -> None:
    """Say what will be written."""
    there = f", {held:,} are there" if held else ""
    size = f"{missing.size / 1e6:,.1f} MB of pairs for {len(missing.said):,} texts"
    tqdm.write(f"{folder}: {size} to write{there}; {_free(folder) / 1e6:,.1f} MB are free", file=sys.stderr)


def _shards(said: Sequence[Utterance], width: int) -> Iterator[list[Utterance]]:
    """As many of the next utterances as fill a shard, again and again."""
    shard: list[Utterance] = []
    size = 0
    for one in said:
        shard.append(one)
        size += len(one.said) * width
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _made(agent: Agent, said: Sequence[Utterance], stored: torch.dtype) -> dict[str, torch.Tensor]:
    """The content of a shard."""
    parts = [speak(agent, batch) for batch in _batches(said)]
    return {
        "keys": torch.tensor([list(key_of(one)) for one in said], dtype=torch.uint8),
        "lengths": torch.tensor([len(one.said) for one in said], dtype=torch.int32),
        "hidden": torch.cat([part.hidden.to("cpu", stored) for part in parts]),
        "ids": torch.cat([part.ids.to("cpu", torch.int32) for part in parts]),
    }


def _batches(said: Sequence[Utterance]) -> Iterator[list[Utterance]]:
    """Utterances of a forward: at most `POSITIONS` with their padding, at least one."""
    batch: list[Utterance] = []
    prompt = words = 0
    for one in said:
        widest = max(prompt, len(one.prompt)), max(words, len(one.said))
        if batch and (len(batch) + 1) * sum(widest) > POSITIONS:
            yield batch
            batch, widest = [], (len(one.prompt), len(one.said))
        batch.append(one)
        prompt, words = widest
    yield batch
