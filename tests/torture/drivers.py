"""What is killed: commands and saves, as the processes of `tests.runtime.commands` run them."""

from __future__ import annotations

from pathlib import Path

SYSTEM = "s"


def command(words: tuple[str, ...]) -> int:
    """``recmas WORDS``, with pairs on disk in shards so small that there are many."""
    from recmas.cli import main
    from recmas.training import pair_cache

    pair_cache.SHARD_BYTES = 512
    return main(words)


def saves(times: int) -> None:
    """Save two systems over each other, again and again."""
    from tests.runtime.lean import lean_system

    systems = lean_system(1), lean_system(2)
    for number in range(times):
        systems[number % 2].save_pretrained(Path(SYSTEM))
