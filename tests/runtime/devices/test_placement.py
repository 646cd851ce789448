"""Agents on devices of their own: where links live, what crosses, and models that roles share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recmas import MIXTURE, SEQUENTIAL, Agent, Pattern, RecursiveMAS
from recmas.config.system_json import read_spec
from recmas.devices.placement import place
from tests.runtime.fake_devices import FakeDevices
from tests.runtime.tiny import tiny_agent, tiny_tokenizer

QUESTIONS = ["fox", "what is the answer to everything?", "the lazy dog"]
PLACES = {"planner": "meta:0", "critic": "meta:1"}  # the solver stays on the CPU


def agents():
    return {
        "planner": tiny_agent("qwen3", "planner", 32, 1),
        "critic": tiny_agent("gemma3_text", "critic", 40, 2),
        "solver": tiny_agent("qwen3_5_text", "solver", 24, 3),
    }


def same(answers, expected):
    """The tokens, and every handoff to rounding: attention may take another way for tensors of a fake device."""
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert len(answer.handoffs) == len(other.handoffs) > 0
        for handoff, wanted in zip(answer.handoffs, other.handoffs, strict=True):
            assert (handoff.latents - wanted.latents).abs().max() <= 1e-5 * wanted.latents.abs().max()


@pytest.mark.parametrize("combine", ["slots", "weighted"])
def test_agents_on_three_devices_answer_as_on_one_and_latents_cross_once(combine):
    pattern = Pattern((("planner", "critic"), ("solver",)), combine=combine)
    mas = RecursiveMAS.create(agents(), pattern, rounds=2, latent_steps=3, seed=0)
    options = {"max_new_tokens": 4, "temperature": 0.8, "trace": True}
    expected = mas.answer(QUESTIONS, **options)
    with FakeDevices() as devices:
        mas.to(PLACES)
        assert {role: str(device) for role, device in mas.devices.items()} == {**PLACES, "solver": "cpu"}
        for role, link in mas.inner_links.items():
            assert {weight.device for weight in link.parameters()} == {mas.devices[role]}
        for (_, receiver), link in mas.outer_links.items():
            assert {weight.device for weight in link.parameters()} == {mas.devices[receiver]}
        devices.crossed.clear()
        answers = mas.answer(QUESTIONS, **options)
    same(answers, expected)
    latents = [move for move in devices.crossed if move[0][:2] == (len(QUESTIONS), 3)]
    forth = [((3, 3, 32), "meta:0", "cpu"), ((3, 3, 40), "meta:1", "cpu")]
    back = [((3, 3, 24), "cpu", "meta:0"), ((3, 3, 24), "cpu", "meta:1")]
    assert sorted(latents) == sorted([*forth, *forth, *back])


def test_tensors_of_two_fake_devices_refuse_each_other():
    """Else the tests here would prove nothing."""
    with FakeDevices():
        here, there = torch.ones(2, device="meta:0"), torch.ones(2, device="meta:1")
        assert (here + there.to("meta:0")).tolist() == [2.0, 2.0]
        with pytest.raises(RuntimeError, match="tensors on meta:0, meta:1"):
            here + there
        with pytest.raises(RuntimeError, match="tensors on cpu, meta:0"):
            here + torch.ones(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_agents_on_the_gpu_and_the_cpu_answer_as_on_one():
    mas = RecursiveMAS.create(agents(), SEQUENTIAL, rounds=2, latent_steps=3, seed=0)
    expected = mas.answer(QUESTIONS, max_new_tokens=4, trace=True)
    answers = mas.to({"critic": "cuda:0"}).answer(QUESTIONS, max_new_tokens=4, trace=True)
    for answer, other in zip(answers, expected, strict=True):
        for handoff, wanted in zip(answer.handoffs, other.handoffs, strict=True):
            assert (handoff.latents - wanted.latents).abs().max() <= 1e-4 * wanted.latents.abs().max()


def test_a_placement_is_one_device_or_one_by_role():
    roles = SEQUENTIAL.roles
    assert place("cpu", roles) == dict.fromkeys(roles, torch.device("cpu"))
    assert place({"critic": "meta"}, roles) == {
        "planner": torch.device("cpu"),
        "critic": torch.device("meta"),
        "solver": torch.device("cpu"),
    }
    here = dict.fromkeys(roles, torch.device("meta"))
    assert place({"critic": "cpu"}, roles, here) == {**here, "critic": torch.device("cpu")}
    with pytest.raises(ValueError, match="^device: unknown role 'poet'; the pattern has planner, critic, solver$"):
        place({"poet": "cpu"}, roles)
    with pytest.raises(ValueError, match="^device: 'tpu' cannot be used here: [^\n]+$"):
        place({"critic": "tpu"}, roles)
    with pytest.raises(ValueError, match="^device: \"\\['cpu'\\]\" cannot be used here: [^\n]+$"):
        place(["cpu"], roles)


def test_a_bad_placement_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    mas = RecursiveMAS.create(agents(), SEQUENTIAL, rounds=1, latent_steps=1, seed=0)
    mas.save_pretrained(tmp_path)
    monkeypatch.setattr(Agent, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for device, message in ({"poet": "cpu"}, "unknown role 'poet'"), ("tpu", "'tpu' cannot be used here"):
        with pytest.raises(ValueError, match=f"^device: {message}"):
            RecursiveMAS.from_pretrained(tmp_path, device=device)
        with pytest.raises(ValueError, match=f"^device: {message}"):
            RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, "x"), SEQUENTIAL, device=device)
        with pytest.raises(ValueError, match=f"^device: {message}"):
            mas.to(device)


@pytest.fixture
def loads(monkeypatch):
    """Source, dtype and device of every model that is loaded; nothing goes to the devices."""
    load, seen = Agent.from_pretrained.__func__, []

    def count(cls, source, dtype, device, *rest, **named):
        seen.append((source, dtype, str(device)))
        return load(cls, source, dtype, "cpu", *rest, **named)

    monkeypatch.setattr(Agent, "from_pretrained", classmethod(count))
    return seen


def test_roles_that_name_one_model_load_it_once_and_save_it_once(tmp_path, loads):
    tiny_agent("llama", "one").save_pretrained(tmp_path / "model")
    (tmp_path / "alias").symlink_to("model")
    models = {"math": tmp_path / "model", "code": str(tmp_path / "alias"), "science": tmp_path / "model" / "."}
    tiny_agent("qwen2", "other").save_pretrained(tmp_path / "other")
    mas = RecursiveMAS.create({**models, "summarizer": tmp_path / "other"}, MIXTURE, latent_steps=2, seed=0)
    assert len(loads) == 2
    assert mas.agents["math"].model is mas.agents["code"].model is mas.agents["science"].model
    assert mas.agents["math"].name == "math, code, science"
    mas.settings["code"].system = "You write code."
    mas.save_pretrained(tmp_path / "s")
    assert sorted(path.name for path in (tmp_path / "s" / "agents").iterdir()) == ["math", "summarizer"]
    spec = read_spec(tmp_path / "s")
    assert [spec.agents[role].model for role in MIXTURE.roles] == ["agents/math"] * 3 + ["agents/summarizer"]
    assert [spec.agents[role].system for role in ("math", "code")] == [None, "You write code."]
    loads.clear()
    again = RecursiveMAS.from_pretrained(tmp_path / "s")
    assert len(loads) == 2
    assert again.spec() == replace(spec, sha256={})


def test_one_model_on_two_devices_or_in_two_dtypes_is_loaded_twice(tmp_path, loads):
    tiny_agent("llama", "one").save_pretrained(tmp_path / "model")
    one = dict.fromkeys(SEQUENTIAL.roles, tmp_path / "model")
    mas = RecursiveMAS.create(one, SEQUENTIAL, latent_steps=1, device={"critic": "meta"}, seed=0)
    assert [device for _, _, device in loads] == ["cpu", "meta"]
    assert mas.agents["planner"] is mas.agents["solver"] is not mas.agents["critic"]
    mas.save_pretrained(tmp_path / "s")
    content = (tmp_path / "s" / "system.json").read_text()
    (tmp_path / "s" / "system.json").write_text(content.replace('"dtype": "auto"', '"dtype": "bfloat16"', 1))
    loads.clear()
    RecursiveMAS.from_pretrained(tmp_path / "s")
    assert [dtype for _, dtype, _ in loads] == ["bfloat16", "auto", "auto"]


def test_one_model_under_two_tokenizers_keeps_both(tmp_path):
    one = tiny_agent("llama", "one")
    plain = Agent(one.model, tiny_tokenizer(None), name="plain")
    mas = RecursiveMAS.create(
        {"planner": one, "critic": plain, "solver": one}, SEQUENTIAL, rounds=1, latent_steps=1, seed=0
    )
    mas.save_pretrained(tmp_path / "s")
    again = RecursiveMAS.from_pretrained(tmp_path / "s")
    assert again.agents["planner"] is again.agents["solver"]
    assert again.agents["planner"].tokenizer.chat_template is not None
    assert again.agents["critic"].tokenizer.chat_template is None


def test_roles_that_share_a_model_cannot_part():
    one = tiny_agent("llama", "one")
    mas = RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, one), SEQUENTIAL, rounds=1, latent_steps=1, seed=0)
    with pytest.raises(ValueError, match="^device: 'planner' and 'solver' share one model, which cannot be on both"):
        mas.to({"planner": "meta", "critic": "meta"})
    assert mas.devices["planner"] == torch.device("cpu")
