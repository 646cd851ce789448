"""Cached pairs: the curve of the run without, whatever interrupts it, and nothing that belongs to another run."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import normalizers

from recmas.agents.agent import Agent
from recmas.config.system_json import PromptSpec
from recmas.training import InnerConfig, PairCache, WarmupConfig, pair_cache, train_inner, train_warmup
from tests.runtime.killing import another_writer
from tests.runtime.training.by_hand import PROMPTS, ROUNDING, ROWS, build, changed, weights

INNER = InnerConfig(steps=12, batch_size=3, accumulation=2, learning_rate=1e-2, warmup_steps=2, rounds=(1, 2, 3))
WARMUP = WarmupConfig(steps=12, batch_size=3, learning_rate=1e-2, warmup_steps=2, rounds=(1, 2, 3))
MANY = [
    {
        "question": f"{number} bako",
        "sheet": "dilo red " * (number % 3 + 1),
        "targets": {"planner": "1 red " * (number % 4 + 1), "critic": ["1 cat", "dog", "2"], "solver": "1 dilo"},
    }
    for number in range(7)
]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many rows each agent has read."""
    read: Counter[str] = Counter()
    hidden = Agent.hidden

    def counted(self, prompt, targets, target_mask, begun=None):
        read[self.name] += len(targets)
        return hidden(self, prompt, targets, target_mask, begun)

    monkeypatch.setattr(Agent, "hidden", counted)
    return read


def curve(results) -> list[list[float]]:
    return [[record.loss for record in result.records] for result in results.values()]


@pytest.mark.parametrize("rows", [MANY, lambda index: [MANY[(3 * index + place) % 7] for place in range(3)]])
@pytest.mark.parametrize("max_tokens", [None, 2])
def test_the_curve_is_that_of_the_run_without_a_cache(tmp_path, rows, max_tokens):
    """Rounding alone differs, since other texts share a forward; Adam makes more of it with every step."""
    plain, cached = build(), build()
    curves = []
    for system, cache in ((plain, None), (cached, tmp_path)):
        inner = InnerConfig(**{**vars(INNER), "max_tokens": max_tokens})
        results = train_inner(system, rows, inner, cache=cache, progress=False)
        warmup = WarmupConfig(**{**vars(WARMUP), "max_tokens": max_tokens})
        results |= train_warmup(system, rows, warmup, cache=cache, progress=False)
        curves.append(torch.tensor(curve(results), dtype=torch.float64))
    torch.testing.assert_close(curves[1][:, 0], curves[0][:, 0], rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-3)
    assert curves[0][:, -1].mean() < 0.8 * curves[0][:, 0].mean()


def test_every_text_runs_once(tmp_path, forwards):
    system = build()
    train_inner(system, MANY, INNER, cache=tmp_path, progress=False)
    once = dict(forwards)
    # Whatever reads and says the same is one text: the planner's rounds 2 and 3, the critic's rows of the same plan.
    assert once == {"planner": 7 * 2, "critic": 4 * 3, "solver": 5 * 3}
    train_warmup(system, MANY, WARMUP, cache=tmp_path, progress=False)  # the same texts: nothing is run
    assert dict(forwards) == once
    train_inner(system, [*MANY, ROWS[0]], INNER, cache=tmp_path, progress=False)  # of one row more, it alone is
    assert all(1 <= count - once[role] <= 3 for role, count in forwards.items())


def test_a_cache_in_half_the_bytes(tmp_path):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        cache = PairCache(tmp_path / dtype, dtype)
        (result,) = train_inner(build(), MANY, INNER, roles=["planner"], cache=cache, progress=False).values()
        assert result.loss < result.records[0].loss
        (shard,) = (tmp_path / dtype / "planner").glob("*.safetensors")
        tensors = load_file(shard)
        assert tensors["hidden"].dtype == getattr(torch, dtype)
        sizes[dtype] = tensors["hidden"].nbytes
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    with pytest.raises(ValueError, match="'int8' is not one of auto, float32, bfloat16"):
        PairCache(tmp_path, "int8")


def test_an_interrupted_cache_is_completed_to_the_same_bits(tmp_path, monkeypatch, forwards):
    monkeypatch.setattr(pair_cache, "SHARD_BYTES", 400)  # several shards
    monkeypatch.setattr(pair_cache, "POSITIONS", 40)  # several forwards
    train_inner(build(), MANY, INNER, roles=["planner"], cache=tmp_path / "whole", progress=False)
    shards = sorted((tmp_path / "whole" / "planner").glob("*.safetensors"))
    assert len(shards) >= 4
    whole, read = [path.read_bytes() for path in shards], forwards["planner"]
    for kept in range(len(shards)):
        folder = tmp_path / f"{kept}" / "planner"
        folder.mkdir(parents=True)
        for path in [shards[0].with_name("pairs.json"), *shards[:kept]]:
            shutil.copy(path, folder)
        (folder / f".{shards[kept].name}.ab12cd34").write_bytes(whole[kept][:50])  # killed while it wrote
        forwards.clear()
        train_inner(build(), MANY, INNER, roles=["planner"], cache=tmp_path / f"{kept}", progress=False)
        assert [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))] == whole
        assert forwards["planner"] < read or kept == 0
        assert not list(folder.glob(".*.safetensors.*"))


def test_a_cached_run_resumes_bit_for_bit(tmp_path):
    config = InnerConfig(**{**vars(INNER), "checkpoint_every": 2})
    systems = []
    for name, stop in (("whole", None), ("parts", 5), ("parts", None)):
        systems.append(build())
        train_inner(
            systems[-1],
            MANY,
            config,
            output=tmp_path / name,
            cache=tmp_path / f"{name} pairs",
            progress=False,
            resume=True,
            on_step=None if stop is None else (lambda record, stop=stop: record.step == stop),
        )
    assert changed(weights(systems[0]), weights(systems[2])) == set()
    logs = [(tmp_path / name / "inner-planner" / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]


def test_a_cache_of_another_run_is_refused(tmp_path):
    train_inner(build(), MANY, INNER, roles=["critic"], cache=tmp_path, progress=False)

    def refused(system, what):
        with pytest.raises(ValueError, match=f"critic: holds pairs of another {what} .* choose another folder") as info:
            train_inner(system, MANY, INNER, roles=["critic"], cache=tmp_path, progress=False)
        assert "\n" not in str(info.value)

    system = build()
    with torch.no_grad():
        system.agents["critic"].model.lm_head.weight[3, 3] += 1e-3
    refused(system, "model")
    system = build()
    system.agents["critic"].model.config.rms_norm_eps *= 2
    refused(system, "model")
    system = build()
    system.agents["critic"].tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    refused(system, "tokenizer")
    refused(build(prompts=PROMPTS | {"critic": PromptSpec("<bos> <in> {{from:planner}} <in>")}), "prompts")
    cache = PairCache(tmp_path, "bfloat16")
    with pytest.raises(ValueError, match="another dtype"):
        train_inner(build(), MANY, INNER, roles=["critic"], cache=cache, progress=False)


def test_a_disk_too_small_is_named_before_anything_is_written(tmp_path, monkeypatch):
    """The pairs of the planner alone would fit, those of all agents do not."""
    monkeypatch.setattr(pair_cache, "SHARD_BYTES", 1)  # a text takes a kilobyte, and little more
    free = 30 * 1024
    monkeypatch.setattr(pair_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, free))
    cache, started = tmp_path / "pairs", []
    with pytest.raises(ValueError, match=r"pairs: 0.1 MB of pairs for 41 texts do not fit, 0.0 MB are free; choose"):
        train_inner(build(), MANY, INNER, cache=cache, progress=False, on_start=lambda: started.append(True))
    assert not started
    assert not cache.exists()
    train_inner(build(), MANY, INNER, roles=["planner"], cache=cache, progress=False)
    assert list((cache / "planner").glob("*.safetensors"))


@pytest.mark.parametrize("broken", ["another model", "shard", "identity", "a file above", "a link", "a FIFO"])
def test_the_cache_is_checked_before_anything_is_written(tmp_path, broken):
    """Of all agents: only the last one's is broken."""
    cache, system = tmp_path / "pairs", build()
    train_inner(system, MANY, INNER, roles=["solver"], cache=cache, progress=False)
    if broken == "another model":
        with torch.no_grad():
            system.agents["solver"].model.lm_head.weight[3, 3] += 1e-3
    elif broken == "shard":
        (cache / "solver" / "00000.safetensors").write_bytes(b"1")
    elif broken == "identity":
        (cache / "solver" / "pairs.json").write_text("{")
    elif broken == "a file above":
        cache = cache / "solver" / "pairs.json" / "deeper"
    elif broken == "a link":
        (cache / "solver" / "00000.safetensors").rename(tmp_path / "elsewhere")
        (cache / "solver" / "00000.safetensors").symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(cache / "solver" / "00001.safetensors")
    started = []
    with pytest.raises(ValueError, match="pairs"):
        train_inner(
            system,
            MANY,
            INNER,
            output=tmp_path / "run",
            cache=cache,
            progress=False,
            on_start=lambda: started.append(True),
        )
    assert not started
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "pairs" / "planner").exists()


def test_a_second_process_that_fills_the_cache_is_refused(tmp_path):
    train_inner(build(), MANY, INNER, roles=["critic"], cache=tmp_path, progress=False)
    with another_writer(tmp_path / "critic"), pytest.raises(ValueError, match="critic: another process is writing"):
        train_inner(build(), MANY, INNER, roles=["critic"], cache=tmp_path, progress=False)


def test_the_size_is_announced_and_right(tmp_path, capsys):
    train_inner(build(), MANY, INNER, roles=["critic"], cache=tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "to write" in line]
    assert line.startswith(f"{tmp_path / 'critic'}: 0.0 MB of pairs for 12 texts to write; ")


def test_a_broken_shard_is_named(tmp_path):
    train_inner(build(), MANY, INNER, roles=["critic"], cache=tmp_path, progress=False)
    (shard,) = (tmp_path / "critic").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"00000.safetensors: cannot be read .* delete it and its pairs are made again"
    ):
        train_inner(build(), MANY, INNER, roles=["critic"], cache=tmp_path, progress=False)
    shard.unlink()
    train_inner(build(), MANY, INNER, roles=["critic"], cache=tmp_path, progress=False)
    (tmp_path / "critic" / "pairs.json").write_text("[1")
    with pytest.raises(ValueError, match=r"pairs.json: does not describe a cache of pairs"):
        train_inner(build(), MANY, INNER, roles=["critic"], cache=tmp_path, progress=False)
