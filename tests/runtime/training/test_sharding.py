"""Agents dealt out among processes: gradients and links of whole ones, and one line for what cannot be dealt out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from recmas import RecursiveMAS
from recmas.training import AllConfig, OuterConfig, shard_agents, sharding, train_all, train_inner, train_outer
from recmas.training.processes import Processes
from recmas.training.step_log import read_log
from tests.runtime.lean import contents, lean_rows, lean_system, write_lean
from tests.runtime.tiny import tiny_agent
from tests.runtime.training.joined import joined
from tests.runtime.training.test_processes import SETTINGS, options

EQUAL = 1e-4  # of the largest entry: batches are read whole, not split by length, and sums have another order


@pytest.fixture
def two(monkeypatch):
    """As in the first of two processes."""
    joined = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"))
    monkeypatch.setattr(sharding, "processes", lambda: Processes(joined))


def test_gradients_are_those_of_whole_agents_and_each_process_holds_its_share(tmp_path):
    with joined(tmp_path, module="tests.runtime.training.sharded") as run:
        first, second = (process.wait() for process in run)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    total, *held = (int(word) for word in first.out.split() if word.isdigit())
    assert len(held) == 2  # both came to their end
    assert total <= sum(held) <= 1.2 * total


def test_two_processes_of_sharded_agents_make_the_links_of_one(tmp_path):
    folder = write_lean(tmp_path)
    before = contents(folder / "system")
    words = ["train", "all", "system", "--data", "rows.jsonl", "--validation", "rows.jsonl", "--output", "out"]
    with joined(folder, *words, "--shard-agents", *options(**SETTINGS, validate_every=2)) as run:
        first, second = (process.wait() for process in run)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert (first.out + second.out).count("trained system in out") == 1
    assert contents(folder / "system") == before
    mas = RecursiveMAS.from_pretrained(folder / "system", accelerate=False)
    config = AllConfig(**SETTINGS, validate_every=2)
    expected = train_all(mas, lean_rows(), config, validation=lean_rows(), progress=False)
    trained = RecursiveMAS.from_pretrained(folder / "out", accelerate=False)
    for role, agent in mas.agents.items():
        for ours, theirs in zip(trained.agents[role].model.parameters(), agent.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in ((trained.inner_links, mas.inner_links), (trained.outer_links, mas.outer_links)):
        for key, link in theirs.items():
            for a, b in zip(ours[key].parameters(), link.parameters(), strict=True):
                assert (a - b).abs().max() <= EQUAL * b.abs().max(), key
    for ours, theirs in zip(read_log(folder / "out/training/outer").records, expected["outer"].records, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=EQUAL)
        assert ours.validation == (theirs.validation and pytest.approx(theirs.validation, rel=EQUAL))


def test_what_cannot_be_dealt_out_is_one_line(two, monkeypatch):
    mas = lean_system()
    agent = mas.agents["critic"] = tiny_agent("llama", "other", 16)
    monkeypatch.setattr(sharding, "missing", lambda decoder, feature: "no proof" if decoder is agent.decoder else "")
    with pytest.raises(ValueError, match="agent 'critic' cannot be sharded: rows of different lengths run apart"):
        shard_agents(mas)
    layers = agent.decoder.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(ValueError, match="agent 'critic' cannot be sharded: its layers share parameters"):
        shard_agents(mas)
    monkeypatch.setattr(sharding, "layers_of", lambda decoder: [])
    with pytest.raises(ValueError, match="agent 'planner' cannot be sharded: LlamaModel has no layers"):
        shard_agents(mas)


def test_sharding_needs_several_processes_on_the_agents_devices(two, monkeypatch):
    mas = lean_system()
    elsewhere = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cuda", 0))
    monkeypatch.setattr(sharding, "processes", lambda: Processes(elsewhere))
    with pytest.raises(ValueError, match="agent 'planner' is on cpu, but the processes join cuda devices"):
        shard_agents(mas)
    monkeypatch.setattr(sharding, "processes", Processes)
    with pytest.raises(ValueError, match="shard_agents: this is the only process"):
        shard_agents(mas)


def test_what_one_process_alone_would_run_is_refused(monkeypatch, tmp_path):
    mas = lean_system()
    monkeypatch.setattr(sharding, "_SHARDED", {agent.model for agent in mas.agents.values()})
    with pytest.raises(ValueError, match="cache: one process makes pairs"):
        train_inner(mas, lean_rows(), cache=tmp_path / "pairs", progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="micro_batch: batches of a callable may differ in size"):
        train_outer(mas, lambda index: lean_rows(), OuterConfig(micro_batch=1), progress=False)
