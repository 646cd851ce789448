"""SIGKILL at random moments: nothing is lost, and who goes on ends with the bits of who was never killed.

Each scenario runs in chains: a command is killed, called again as a user would call it, killed again, and so on, until
it ends by itself; then a new chain begins, until there have been so many kills.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from recmas import RecursiveMAS
from recmas.config.system_json import read_spec
from recmas_kernels import named_weights
from tests.runtime.commands import Ended, Started
from tests.runtime.lean import contents, lean_system, write_lean
from tests.torture.amounts import FULL, SEED, amount
from tests.torture.drivers import SYSTEM, command, saves

STEPS = ("--steps", "30", "--checkpoint-every", "5") if FULL else ("--steps", "10", "--checkpoint-every", "3")
TRAIN = ("--data", "rows.jsonl", *STEPS, "--batch-size", "2", "--rounds", "1,2")
ASK = ("--max-new-tokens", "8", "--batch-size", "2")


@dataclass(frozen=True)
class Scenario:
    """A command with an output, how it is called again, and what must be the same in the end."""

    words: tuple[str, ...]
    kills: int
    resume: tuple[str, ...]
    result: Callable[[Path], Any]


def trained(output: Path) -> dict[str, Any]:
    """All links by what they are, all logs but for times, checkpoints, and pairs on disk."""
    spec = read_spec(output)
    links = {role: agent.inner_link for role, agent in spec.agents.items()} | spec.outer_links
    found: dict[str, Any] = {str(key): contents(output / path) for key, path in links.items() if path is not None}
    logs = contents(output / "training")
    for name in [name for name in logs if name.endswith("log.jsonl")]:
        found[name] = [json.loads(line) | {"seconds": 0} for line in logs.pop(name).splitlines()]
    return found | logs


def lines(output: Path) -> list[dict[str, Any]]:
    """Lines but for what depends on the machine."""
    return [json.loads(line) | {"seconds": 0, "peak_memory": 0} for line in output.read_text().splitlines()]


SCENARIOS = {
    "train inner, with its pairs on disk": Scenario(
        ("train", "inner", "system", *TRAIN, "--output"), 15, ("--resume",), trained
    ),
    "train warmup": Scenario(
        ("train", "warmup", "system", *TRAIN, "--cache", "off", "--output"), 10, ("--resume",), trained
    ),
    "train outer": Scenario(("train", "outer", "system", *TRAIN, "--output"), 15, ("--resume",), trained),
    "train all": Scenario(("train", "all", "system", *TRAIN, "--output"), 20, ("--resume",), trained),
    "run": Scenario(("run", "system", "--questions", "rows.jsonl", *ASK, "--output"), 10, (), lines),
    "eval": Scenario(
        ("eval", "system", "--data", "rows.jsonl", *ASK, "--mode", "latent,text", "--output"), 10, (), lines
    ),
}
SAVES = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_lean(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_command_goes_on_and_ends_the_same(made, tmp_path, name, record_property):
    scenario, chance = SCENARIOS[name], random.Random(f"{SEED} {name}")
    process = Started(made, command, (*scenario.words, str(tmp_path / "whole")))
    begun = time.monotonic()
    whole = process.wait()
    seconds = time.monotonic() - begun
    assert whole.status == 0, whole.err
    expected = scenario.result(tmp_path / "whole")
    kills = chains = 0
    while kills < amount(scenario.kills):
        output, moments = tmp_path / f"cut{chains}", []
        while True:
            moment = chance.uniform(0, seconds) if kills < amount(scenario.kills) else None
            ended = one(made, scenario, output, moment)
            if ended.status != -signal.SIGKILL:
                break
            kills += 1
            moments.append(moment)
        told = f"seed {SEED}, killed after {moments} s: {ended.err}"
        assert ended.status == 0, told
        assert scenario.result(output) == expected, told
        left = [path for path in tmp_path.rglob(".*") if path.name != ".lock" and not path.name.endswith(".lock")]
        assert not left, told
        chains += 1
    record_property("torture", (f"kills of recmas {name}", kills, f"0 lost, {chains} times to the same bits"))


def one(made: Path, scenario: Scenario, output: Path, moment: float | None) -> Ended:
    """One call, killed after so many seconds unless it ends before."""
    process = Started(made, command, (*scenario.words, str(output), *(scenario.resume if output.exists() else ())))
    if moment is not None:
        deadline = time.monotonic() + moment
        while process.running and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.01))
        process.kill()
    return process.wait()


def test_a_killed_save_leaves_the_old_system_or_the_new_one(tmp_path, record_property):
    chance = random.Random(f"{SEED} saves")
    known = [parts(lean_system(seed)) for seed in (1, 2)]
    lean_system(1).save_pretrained(tmp_path / SYSTEM)
    whole = len(contents(tmp_path / SYSTEM))
    for _ in range(amount(SAVES)):
        moment = chance.uniform(0, 0.6)
        process = Started(tmp_path, saves, 1000)
        time.sleep(moment)
        process.kill()
        assert process.wait().status == -signal.SIGKILL
        assert parts(RecursiveMAS.from_pretrained(tmp_path / SYSTEM)) in known, f"seed {SEED}, killed after {moment} s"
    lean_system(1).save_pretrained(tmp_path / SYSTEM)
    assert len(contents(tmp_path / SYSTEM)) == whole
    assert [path.name for path in tmp_path.iterdir()] == [SYSTEM]
    record_property("torture", ("kills inside save_pretrained", amount(SAVES), "0 lost, 0 mixed, nothing left behind"))


def parts(mas: RecursiveMAS) -> list[float]:
    """Numbers that distinguish two systems in each of their parts."""
    modules = [*mas.inner_links.values(), *mas.outer_links.values(), mas.agents["solver"].model]
    return [sum(weight.double().sum().item() for _, weight in named_weights(module)) for module in modules]
