"""Commands in two processes of one run, joined as torch's launcher joins them; forked, which costs no imports."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import TCPStore

from tests.runtime.commands import Started

PLACE = "127.0.0.1"


@contextlib.contextmanager
def joined(folder: Path, *words: str, module: str = "recmas.cli") -> Iterator[list[Started]]:
    """``main(WORDS)`` of a module, in two processes that meet in a store of this one, as they would in a launcher's."""
    store = TCPStore(PLACE, 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": PLACE, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    count = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(2)]
    yield [Started(folder, _join, meeting | count | rank, module, words) for rank in ranks]
    del store


def _join(environment: dict[str, str], module: str, words: tuple[str, ...]) -> int | None:
    os.environ.update(environment, ACCELERATE_USE_CPU="1")
    main = importlib.import_module(module).main
    status: int | None = main(words) if words else main()
    return status
