"""Processes that train an inner link together, again and again: `Together` starts them, this file's `main` is one.

They live as long as the benchmark, so that no call pays for their start. A line on its input lets a process train once;
it answers with a line of JSON.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.models import Setting
from recmas.training import InnerConfig, train_inner
from recmas.training.processes import processes

ROOT = Path(__file__).parents[3]
ROLE = "planner"


class Together:
    """So many processes of one thread each.

    Args:
        members: the processes, in the order of their numbers.
    """

    def __init__(self, members: list[subprocess.Popen[str]]) -> None:
        self._members = members
        self.seconds: list[float] = []

    def train(self) -> str:
        """Train once from the beginning; `seconds` gets what the steps took. Returns a digest of the link."""
        for member in self._members:
            assert member.stdin is not None
            member.stdin.write("\n")
            member.stdin.flush()
        answers = [self._answer(member) for member in self._members]
        self.seconds.append(max(answer["seconds"] for answer in answers if answer["writes"]))
        (link,) = {answer["link"] for answer in answers}
        return str(link)

    @staticmethod
    def _answer(member: subprocess.Popen[str]) -> dict[str, Any]:
        assert member.stdout is not None
        line = member.stdout.readline()
        if not line:
            raise RuntimeError(f"a process that trains has ended with status {member.wait()}; it has said why above")
        return dict(json.loads(line))


@contextmanager
def together(count: int, case: Setting, config: InnerConfig, folder: Path, joined: bool = True) -> Iterator[Together]:
    """Start so many processes, which keep their pairs and runs in ``folder``; they end with the block.

    Those that are not ``joined`` train the same link each by itself, and exchange nothing.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.suites.cpu.training_processes"]
    command += [json.dumps(asdict(case)), json.dumps(asdict(config))]
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    members = []
    try:
        for index in range(count):
            rank = index if joined else 0
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count if joined else 1)}
            members.append(
                subprocess.Popen(
                    [*command, str(folder if joined else folder / str(index))],
                    cwd=ROOT,
                    env=os.environ | shared | place,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        yield Together(members)
    finally:
        for member in members:
            member.kill()
            member.communicate()


def main(case: Setting, config: InnerConfig, folder: Path) -> None:
    """Train whenever a line comes in; answer with seconds of the steps and a digest of the link."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    system, rows = case.training()
    link = system.inner_links[ROLE]
    begun = copy.deepcopy(link.state_dict())
    for number, _ in enumerate(sys.stdin):
        link.load_state_dict(begun)
        output = folder / f"run-{number}"
        result = train_inner(system, rows, config, roles=[ROLE], output=output, cache=folder / "pairs", progress=False)
        digest = hashlib.sha256()
        for parameter in link.parameters():
            digest.update(parameter.detach().numpy())
        # Its log is the run's: the others begin while it makes the log's file ready, and wait for it.
        told = {"seconds": result[ROLE].records[-1].seconds, "link": digest.hexdigest(), "writes": processes().writes}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main(Setting(**json.loads(sys.argv[1])), InnerConfig(**json.loads(sys.argv[2])), Path(sys.argv[3]))
