"""Memory told before loading: against what models, caches and files really hold."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from recmas import MIXTURE, SEQUENTIAL, RecursiveMAS
from recmas.engine.constant_prefixes import ConstantPrefixes
from recmas.engine.fixed_shapes import bucket
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.sizing.checkpoint_bytes import checkpoint_bytes
from recmas.sizing.free_memory import free_bytes
from recmas.sizing.kept_bytes import kept_bytes
from recmas.sizing.model_bytes import model_bytes
from recmas.sizing.report import memory_table, size
from recmas.sizing.row_bytes import Length, row_bytes
from recmas.system.prompt_assembly import assemble
from recmas_kernels.backends import cpu
from tests.runtime.commands import main
from tests.runtime.tiny import tiny_agent, tiny_model

CPU = torch.device("cpu")


def held(cache):
    """Bytes of all tensors in a transformers cache."""
    tensors = []
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            tensors += [state for state in states.values() if state is not None]
        tensors += (
            [states for states in (layer.keys, layer.values) if states is not None] if hasattr(layer, "keys") else []
        )
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_the_cache_of_a_row_is_what_the_model_s_own_cache_holds(agent):
    """Of every family; the windows of these are wider than the prompt, so that sliding layers hold all of it."""
    shape = model_bytes(agent.model.config, 4)
    with torch.no_grad():
        caches = [
            agent.decoder(inputs_embeds=agent.embed(torch.full((2, length), 20)), use_cache=True).past_key_values
            for length in (2, 4)
        ]
    for length, cache in zip((2, 4), caches, strict=True):
        assert held(cache) == 2 * (length * shape.cache_per_token + shape.state)


def test_latent_attention_takes_no_more_than_its_expanded_form():
    config = CONFIG_MAPPING["deepseek_v3"](
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=2,
        n_group=1,
        topk_group=1,
        pad_token_id=0,
    )
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_config(config)(torch.ones(1, 3, dtype=torch.long)).past_key_values
    assert 0 < held(cache) <= 3 * model_bytes(config, 4).cache_per_token


def test_the_width_of_the_feed_forward_part_has_many_names():
    gpt2 = CONFIG_MAPPING["gpt2"](n_embd=32, n_head=4, n_layer=2)
    assert gpt2.n_inner is None  # four times the width
    expected = model_bytes(gpt2, 4).activations_per_token
    gpt2.n_inner = 128
    assert model_bytes(gpt2, 4).activations_per_token == expected
    gpt2.n_inner = 256
    assert model_bytes(gpt2, 4).activations_per_token == expected + 3 * 128 * 4
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    narrow, wide = (
        model_bytes(CONFIG_MAPPING["gemma3n_text"](intermediate_size=sizes, **layers), 4)
        for sizes in ([9000, 9000], [9000, 10000])
    )
    assert wide.activations_per_token == narrow.activations_per_token + 3 * 1000 * 4


def system(tmp_path, **options):
    agents = {
        "planner": tiny_agent("qwen3", "planner", 32, 1),
        "critic": tiny_agent("gemma3_text", "critic", 40, 2),
        "solver": tiny_agent("qwen2", "solver", 24, 3),
    }
    mas = RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2, seed=0, **options)
    mas.save_pretrained(tmp_path / "s")
    return mas


def total(modules):
    return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())


def test_weights_and_links_are_those_of_the_loaded_system(tmp_path):
    system(tmp_path)
    for dtype in ("auto", "bfloat16"):
        table = memory_table(tmp_path / "s", dtype=dtype, accelerate=False)
        asked = None if dtype == "auto" else torch.bfloat16
        loaded = RecursiveMAS.from_pretrained(tmp_path / "s", dtype=asked, accelerate=False)
        for agent in table.agents:
            model = loaded.agents[agent.role].model
            assert agent.parameters == sum(weight.numel() for weight in model.parameters())
            assert agent.weights == total([model])
            assert agent.dtype == str(loaded.agents[agent.role].dtype).removeprefix("torch.")
            into = [link for edge, link in loaded.outer_links.items() if edge[1] == agent.role]
            assert agent.links == total([loaded.inner_links[agent.role], *into])
        (device,) = table.devices
        assert device.weights == sum(agent.weights for agent in table.agents)
        assert device.links == total([*loaded.inner_links.values(), *loaded.outer_links.values()])
        assert device.peak == device.weights + device.links + device.batch + device.kept


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_packed_weights_take_no_more_than_the_table_says(tmp_path):
    system(tmp_path)
    plain, table = (memory_table(tmp_path / "s", accelerate=accelerate) for accelerate in (False, True))
    loaded = RecursiveMAS.from_pretrained(tmp_path / "s")
    for line, agent in zip(table.agents, loaded.agents.values(), strict=True):
        layers = {id(part._parameters["weight"]): part for part in agent.accelerated.packed.values()}
        rest = sum(weight.nbytes for weight in agent.model.parameters() if id(weight) not in layers)
        panels = sum(part.packed().data.nbytes for part in layers.values())
        assert layers
        assert rest + panels <= line.weights
    offloaded = memory_table(tmp_path / "s", offload=True)
    assert [line.weights for line in offloaded.agents] == [line.weights for line in plain.agents]


def test_rows_grow_with_what_is_asked_for(tmp_path):
    system(tmp_path)
    base = {agent.role: agent.row for agent in memory_table(tmp_path / "s").agents}
    for more in ({"prompt_tokens": 1024}, {"latent_steps": 64}, {"max_new_tokens": 512}, {"mode": "text"}):
        rows = {agent.role: agent.row for agent in memory_table(tmp_path / "s", **more).agents}
        assert all(rows[role] >= base[role] for role in rows)
        assert any(rows[role] > base[role] for role in rows), more
    one, two = (memory_table(tmp_path / "s", batch_size=size).devices[0].batch for size in (1, 2))
    assert 0 < one == two / 2
    assert memory_table(tmp_path / "s", rounds=1).devices[0].batch < memory_table(tmp_path / "s").devices[0].batch


def test_what_outlives_a_batch_is_counted_once_for_each_template(tmp_path):
    mas = system(tmp_path)
    shapes = {role: model_bytes(agent.model.config, 4) for role, agent in mas.agents.items()}
    (long,), (short,) = (memory_table(tmp_path / "s", prompt_tokens=count).devices for count in (200, 63))
    templates = {role: len({setting.prompt.at(round) for round in (1, 2)}) for role, setting in mas.settings.items()}
    assert set(templates.values()) == {1, 2}
    assert long.kept == sum(templates[role] * shape.snapshot(200) for role, shape in shapes.items())
    assert short.kept == 0
    assert memory_table(tmp_path / "s", prompt_tokens=200, rounds=1).devices[0].kept < long.kept
    assert memory_table(tmp_path / "s", prompt_tokens=200, offload=True).devices[0].kept == 0


def test_a_prefix_takes_no_more_than_the_estimate(agent):
    constants, ids = ConstantPrefixes(), list(range(10, 110))
    prompt = assemble(agent.embed, [[[*ids, 7]]], {}, {}, pad_id=agent.pad_id, device="cpu")
    with torch.no_grad():
        agent.decode(prompt, 1, prefill=PrefixReuse(constants=constants).prefill("a", None, ids))
    (snapshot,) = constants._kept.values()
    held = [part for layer in snapshot.layers for part in (layer if isinstance(layer, tuple) else vars(layer).values())]
    taken = sum(part.nbytes for part in held if isinstance(part, torch.Tensor))
    assert 0 < taken <= kept_bytes({"a": model_bytes(agent.model.config, 4)}, {"a": CPU}, {"a": [100, 63]})[CPU]


def test_a_model_that_roles_share_is_counted_once(tmp_path):
    one = tiny_agent("llama", "one")
    mas = RecursiveMAS.create({**dict.fromkeys(MIXTURE.roles, one)}, MIXTURE, latent_steps=2, seed=0)
    mas.save_pretrained(tmp_path / "s")
    table = memory_table(tmp_path / "s", accelerate=False)
    assert [agent.shares for agent in table.agents] == [None, "math", "math", "math"]
    assert table.devices[0].weights == total([one.model])


def test_devices_have_lines_of_their_own(tmp_path):
    system(tmp_path)
    agents = {agent.role: agent for agent in memory_table(tmp_path / "s", accelerate=False).agents}
    table = memory_table(tmp_path / "s", device={"planner": "meta", "critic": "meta"}, accelerate=False)
    meta, cpu = table.devices
    assert (meta.device, cpu.device) == ("meta", "cpu")
    assert meta.weights == agents["planner"].weights + agents["critic"].weights
    assert cpu.weights == agents["solver"].weights
    assert (meta.free, meta.fits, cpu.fits) == (None, None, True)


def test_a_hub_id_is_looked_up_in_the_cache_of_this_machine(tmp_path, monkeypatch):
    mas = system(tmp_path)
    content = json.loads((tmp_path / "s" / "system.json").read_text())
    content["agents"]["critic"]["model"] = "someone/critic"
    (tmp_path / "s" / "system.json").write_text(json.dumps(content))
    cached = tmp_path / "hub"
    shutil.copytree(tmp_path / "s" / "agents" / "critic", cached)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, name: str(cached / name))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda _: pytest.fail("the network was asked"))
    critic = memory_table(tmp_path / "s", allow_hub=True, accelerate=False).agents[1]
    assert (critic.model, critic.weights) == ("someone/critic", total([mas.agents["critic"].model]))


def test_a_hub_id_that_is_not_in_the_cache_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    mas = system(tmp_path)
    content = json.loads((tmp_path / "s" / "system.json").read_text())
    content["agents"]["critic"]["model"] = "someone/critic"
    (tmp_path / "s" / "system.json").write_text(json.dumps(content))
    model, load = mas.agents["critic"].model, AutoConfig.from_pretrained

    def config(source, **options):
        return model.config if source == "someone/critic" else load(source, **options)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, name: None)
    monkeypatch.setattr(AutoConfig, "from_pretrained", config)
    told = SimpleNamespace(parameter_count={"F32": total([model]) // 4})
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", {"someone/critic": told}.__getitem__)
    critic = memory_table(tmp_path / "s", allow_hub=True).agents[1]
    assert (critic.model, critic.weights) == ("someone/critic", total([model]))


def test_buffers_of_captured_rollouts_count_on_cuda_alone(agent):
    shape = model_bytes(agent.model.config, 4)
    for batch, prompt in ((1, 1), (3, 107), (9, 65), (17, 300)):
        cpu, cuda = (
            row_bytes({"solver": shape}, {"solver": device}, {"solver": Length(prompt, 8)}, 1)[device]
            for device in (CPU, torch.device("cuda:0"))
        )
        rows, columns = bucket(batch, prompt + 7)
        assert batch * (cuda - cpu) >= rows * (columns * shape.cache_per_token + shape.state)


def put(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_free_memory_is_what_kernel_and_control_groups_leave(tmp_path):
    assert free_bytes(CPU, tmp_path) is None
    assert free_bytes(torch.device("meta")) is None
    put(tmp_path, "proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 80 kB\n")
    assert free_bytes(CPU, tmp_path) == 80 * 1024
    put(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    put(tmp_path, "sys/fs/cgroup/a/b/memory.max", "max\n")
    put(tmp_path, "sys/fs/cgroup/a/b/memory.current", "5\n")
    assert free_bytes(CPU, tmp_path) == 80 * 1024
    put(tmp_path, "sys/fs/cgroup/a/memory.max", "1000\n")
    put(tmp_path, "sys/fs/cgroup/a/memory.current", "700\n")
    put(tmp_path, "sys/fs/cgroup/a/memory.stat", "anon 600\ninactive_file 50\n")
    assert free_bytes(CPU, tmp_path) == 350
    put(tmp_path, "proc/self/cgroup", "4:memory,x:/\n0::/nowhere\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "500\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "600\n")
    assert free_bytes(CPU, tmp_path) == 0


def test_free_memory_of_this_machine():
    assert 2**20 < free_bytes(CPU) < 2**50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_free_memory_of_the_gpu_counts_what_the_allocator_keeps():
    device = torch.device("cuda:0")
    torch.cuda.empty_cache()
    before = free_bytes(device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert abs(before - 2**28 - free_bytes(device)) <= 2**24
    del held
    assert abs(before - free_bytes(device)) <= 2**24


def test_sharded_checkpoints_and_broken_files(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert checkpoint_bytes(tmp_path / "m").stored == total([model])
    shard = next((tmp_path / "m").glob("*.safetensors"))
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(ValueError, match=f"is truncated or no safetensors file: {size - 1} of {size} bytes are there$"):
        checkpoint_bytes(tmp_path / "m")
    next((tmp_path / "m").glob("*.safetensors")).write_bytes(b"\x05")
    with pytest.raises(ValueError, match="^[^\n]*is truncated or no safetensors file: [^\n]*$"):
        checkpoint_bytes(tmp_path / "m")
    with pytest.raises(ValueError, match="model.safetensors: no such file; only safetensors files are read"):
        checkpoint_bytes(tmp_path)


def test_quantised_weights_stay_as_they_are_stored(tmp_path):
    stored = {
        "packed": torch.zeros(8, 4, dtype=torch.int32),
        "scales": torch.zeros(8, 2, dtype=torch.float16),
        "norm": torch.zeros(6),
    }
    save_file(stored, tmp_path / "model.safetensors")
    weights = checkpoint_bytes(tmp_path)
    assert (weights.parameters, weights.stored) == (32 + 16 + 6, 128 + 32 + 24)
    assert {dtype: weights.bytes_in(dtype) for dtype in ("auto", "bfloat16", "float32")} == {
        "auto": 128 + 32 + 24,
        "bfloat16": 128 + 2 * 22,
        "float32": 128 + 4 * 22,
    }


def test_beginnings_count_where_roles_may_share_a_model(agent):
    shape, length = model_bytes(agent.model.config, 4), Length(50, 8)
    shapes, lengths = dict.fromkeys("ab", shape), dict.fromkeys("ab", length)
    alone = row_bytes({"a": shape}, {"a": CPU}, {"a": length}, 1)[CPU]
    assert row_bytes(shapes, dict.fromkeys("ab", CPU), lengths, 1)[CPU] == alone + 2 * shape.snapshot(50)


def test_info_on_the_command_line(tmp_path, monkeypatch, capsys):
    system(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recmas.agents.agent.Agent.from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["info", "s", "--batch-size", "4", "--latent-steps", "planner=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "agent",
        "model",
        "device",
        "parameters",
        "dtype",
        "weights",
        "links",
        "cache/token",
        "row",
        "kept",
    ]
    assert [line.split()[0] for line in lines[1:4]] == list(SEQUENTIAL.roles)
    assert lines[4] == "rows: 512 prompt tokens and the messages, 2 round(s), 4 at once"
    assert lines[5].startswith("cpu: weights ")
    assert lines[5].endswith(": fits")
    assert lines[6:] == ["planner, critic, solver: nothing is off"]
    assert main(["info", "s", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["agents"][0]["role"], shown["devices"][0]["fits"]) == ("planner", True)
    shutil.rmtree(tmp_path / "s" / "links" / "planner")
    for arguments, message in (
        (["s"], "s/links/planner/model.safetensors: no such file"),
        (["nowhere"], "nowhere is not a system"),
        (["s", "--device", "poet=cpu"], "device: unknown role 'poet'"),
    ):
        assert main(["info", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err


def test_sizes_are_told_in_the_unit_that_reads_best():
    assert [size(count) for count in (0, 1023, 1024, 3 << 29)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]
