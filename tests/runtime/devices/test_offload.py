"""Weights that visit their device: who is there when, that nothing stays, and that answers are the same."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from recmas import SEQUENTIAL, Agent, Pattern, RecursiveMAS
from recmas.answering import batching
from recmas.devices.offload import Offloader
from recmas.evaluation.baselines import looped_model, single_agent
from recmas.evaluation.sweeps import sweep
from recmas.sizing.report import memory_table
from recmas.training import InnerConfig, train_inner
from tests.runtime.commands import main
from tests.runtime.devices.test_placement import same
from tests.runtime.fake_devices import FakeDevices
from tests.runtime.tiny import tiny_agent

QUESTIONS = ["fox", "what is the answer to everything?", "the lazy dog"]
OPTIONS = {"max_new_tokens": 4, "temperature": 0.8, "trace": True}


def agents():
    return {
        "planner": tiny_agent("qwen2", "planner", 32, 1),  # tied embeddings
        "critic": tiny_agent("gemma3_text", "critic", 40, 2),
        "solver": tiny_agent("qwen3_5_text", "solver", 24, 3),
    }


def visiting(mas, devices):
    """The same agents and links, resting in host memory."""
    return RecursiveMAS(
        mas.agents,
        mas.inner_links,
        mas.outer_links,
        mas.pattern,
        settings=mas.settings,
        defaults=mas.defaults,
        edge_scores=mas.edge_scores,
        offload=devices,
    )


@pytest.fixture(scope="module")
def mas():
    return RecursiveMAS.create(agents(), SEQUENTIAL, rounds=2, latent_steps=3, seed=0)


def tensors(modules):
    return [kept for module in modules for kept in [*module.parameters(), *module.buffers()]]


def away(mas, device="meta:0"):
    """Roles whose model is on the device."""
    return {
        role for role, agent in mas.agents.items() if all(str(kept.device) == device for kept in tensors([agent.model]))
    }


@pytest.fixture
def seen(monkeypatch):
    """Called with a system at every piece of work of an agent."""
    watchers, think, write = [], Agent.think, Agent.write

    def thinking(self, *rest, **named):
        for watch in watchers:
            watch(self)
        return think(self, *rest, **named)

    def writing(self, *rest, **named):
        for watch in watchers:
            watch(self)
        return write(self, *rest, **named)

    monkeypatch.setattr(Agent, "think", thinking)
    monkeypatch.setattr(Agent, "write", writing)
    return watchers


def test_one_agent_at_a_time_is_on_the_device_and_nothing_of_it_stays(mas, seen):
    expected = mas.answer(QUESTIONS, **OPTIONS)
    home = {kept: kept.clone() for agent in mas.agents.values() for kept in agent.model.parameters()}
    there, copies = [], []

    def watch(agent):
        there.append(away(offloaded))
        copies.extend(weakref.ref(kept) for kept in agent.model.parameters())
        links = [*mas.inner_links.items(), *((edge[1], link) for edge, link in mas.outer_links.items())]
        for role, link in links:
            on = {str(kept.device) for kept in link.parameters()}
            assert on == {"meta:0" if role == agent.name else "cpu"}

    seen.append(watch)
    with FakeDevices():
        offloaded = visiting(mas, "meta:0")
        assert {str(device) for device in offloaded.devices.values()} == {"meta:0"}
        assert away(offloaded) == set()
        answers = offloaded.answer(QUESTIONS, **OPTIONS)
    same(answers, expected)
    assert there == [{role} for role in SEQUENTIAL.roles] * 2
    assert away(mas) == set()
    for kept in (kept for agent in mas.agents.values() for kept in agent.model.parameters()):
        assert torch.equal(kept, home[kept])  # the very same parameters, too
    gc.collect()
    assert [kept for kept in copies if kept() is not None] == []
    assert mas.agents["planner"].model.lm_head.weight is mas.agents["planner"].model.get_input_embeddings().weight


@pytest.mark.parametrize("combine", ["slots", "weighted"])
def test_two_devices_hold_an_agent_each(combine, seen):
    pattern = Pattern((("planner", "critic"), ("solver",)), combine=combine)
    mas = RecursiveMAS.create(agents(), pattern, rounds=2, latent_steps=3, seed=0)
    expected = mas.answer(QUESTIONS, **OPTIONS)
    there = []
    seen.append(lambda agent: there.append((away(mas, "meta:0"), away(mas, "meta:1"))))
    with FakeDevices():
        devices = {"planner": "meta:0", "critic": "meta:0", "solver": "meta:1"}
        same(visiting(mas, devices).answer(QUESTIONS, **OPTIONS), expected)
    first = [({"planner"}, set()), ({"critic"}, set()), ({"critic"}, {"solver"})]
    assert there == [*first, ({"planner"}, {"solver"}), ({"critic"}, {"solver"}), ({"critic"}, {"solver"})]


class Written(torch.nn.Module):
    """Writes to its buffer at every call, as `write` does."""

    def __init__(self, write):
        super().__init__()
        self.register_buffer("kept", torch.zeros(2))
        self.write = write

    def forward(self):
        self.write(self)


WRITES = {
    "not at all": lambda module: None,
    "counted": lambda module: module.kept.add_(1),
    "through .data": lambda module: module.kept.data.add_(1),
    "replaced": lambda module: setattr(module, "kept", module.kept + 1),
    "of another dtype": lambda module: setattr(module, "kept", (module.kept + 1).double()),
    "none": lambda module: setattr(module, "kept", None),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_a_model_writes_to_its_buffers_comes_home(write, mode):
    module, alone = Written(write), Written(write)
    home = module.kept
    offloader = Offloader({"a": torch.device("meta:0")}, {"a": [module]})
    with FakeDevices():
        for _ in range(2):
            with mode():
                offloader.load("a")
                module()
                offloader.unload()
                alone()
            if alone.kept is None:
                assert module.kept is None
                return
            assert module.kept.device.type == "cpu"
            assert module.kept.dtype is alone.kept.dtype
            assert torch.equal(module.kept, alone.kept)
    assert (module.kept is home) == torch.equal(home, module.kept.float())
    if not module.kept.is_inference():  # replaced ones may be
        module.kept.add_(1)


def test_roles_that_share_a_model_keep_it_there_between_them(seen):
    one = tiny_agent("llama", "one")
    mas = RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, one), SEQUENTIAL, rounds=1, latent_steps=2, seed=0)
    expected = mas.answer(QUESTIONS, **OPTIONS)
    copies = []
    seen.append(lambda agent: copies.append(id(agent.model.get_input_embeddings().weight)))
    with FakeDevices() as devices:
        same(visiting(mas, "meta:0").answer(QUESTIONS, **OPTIONS), expected)
    assert len(set(copies)) == 1
    table = tuple(one.model.get_input_embeddings().weight.shape)
    assert devices.crossed.count((table, "cpu", "meta:0")) == 2  # embeddings and head, once each


def test_roles_that_share_a_model_may_take_it_to_two_devices():
    """What the model read on one device is of no use on the other."""
    one = tiny_agent("llama", "one")
    mas = RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, one), SEQUENTIAL, rounds=2, latent_steps=2, seed=0)
    expected = mas.answer(QUESTIONS, **OPTIONS)
    with FakeDevices():
        devices = {"planner": "meta:0", "critic": "meta:1", "solver": "meta:1"}
        answers = visiting(mas, devices).answer(QUESTIONS, **OPTIONS)
    same(answers, expected)
    assert sum(how.positions - how.computed for how in answers.reading.values()) > 0


def test_a_system_may_be_asked_while_an_answer_is_written(mas):
    alone, other = (mas.answer([question], max_new_tokens=5)[0].text for question in QUESTIONS[:2])
    with FakeDevices():
        offloaded, pieces = visiting(mas, "meta:0"), []
        for piece in offloaded.stream(QUESTIONS[0], max_new_tokens=5):
            pieces.append(piece)
            assert offloaded.answer([QUESTIONS[1]], max_new_tokens=5)[0].text == other
        assert away(mas) == set()
    assert "".join(pieces) == alone
    assert len(pieces) > 2


def test_agents_go_home_after_an_exception(mas, monkeypatch):
    def fail(visit, message):
        if visit.role == "critic":
            raise KeyboardInterrupt
        return message

    with FakeDevices():
        offloaded = visiting(mas, "meta:0")
        with pytest.raises(KeyboardInterrupt):
            offloaded.answer(QUESTIONS, on_message=fail, **OPTIONS)
        assert away(mas) == set()
        pieces = offloaded.stream("fox", max_new_tokens=4)
        next(pieces)
        assert away(mas) == {"solver"}
        pieces.close()
        assert away(mas) == set()


def test_a_module_that_finds_no_room_is_left_as_it_was(mas, monkeypatch):
    model, calls, to = mas.agents["planner"].model, [], torch.Tensor.to
    before = [id(kept) for kept in tensors([model])]

    def full(self, *rest, **named):
        calls.append(self)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(self, *rest, **named)

    offloader = Offloader({"planner": torch.device("meta")}, {"planner": [model]})
    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        offloader.load("planner")
    assert [id(kept) for kept in tensors([model])] == before


def test_baselines_of_an_offloaded_system_visit_too(mas, seen):
    there = []
    for make in (single_agent, looped_model):
        expected = make(mas).answer(QUESTIONS, **OPTIONS)
        with FakeDevices():
            offloaded = make(visiting(mas, "meta:0"))
            seen.append(lambda agent: there.append(away(mas)))
            answers = offloaded.answer(QUESTIONS, **OPTIONS)
            seen.clear()
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert there == [{"solver"}] * 3
    rows = [{"question": question, "answer": "fox"} for question in QUESTIONS]
    with FakeDevices():
        done = sweep(visiting(mas, "meta:0"), rows, modes=["latent", "single"], max_new_tokens=2, progress=False)
    assert len(done.records) == 6


def test_batches_leave_room_for_the_agent_to_come(mas, monkeypatch):
    with FakeDevices():
        offloaded = visiting(mas, "meta:0")
        weights = {role: sum(map(len_bytes, parts)) for role, parts in offloaded.offloader._modules.items()}
        offloader, device = offloaded.offloader, torch.device("meta:0")
        assert offloader.bytes_to_load(device) == max(weights.values())
        offloader.load("critic")
        assert offloader.bytes_to_load(device) == max(weights.values()) - weights["critic"]
        offloader.unload()
        assert offloader.bytes_to_load(torch.device("cpu")) == 0
        monkeypatch.setattr(batching, "free_bytes", lambda device: 0)
        assert len(offloaded.answer(QUESTIONS, batch_size="auto", max_new_tokens=1)) == 3


def len_bytes(module):
    return sum(kept.numel() * kept.element_size() for kept in tensors([module]))


def test_the_table_counts_the_largest_agent(mas, tmp_path):
    mas.save_pretrained(tmp_path / "s")
    together = memory_table(tmp_path / "s", device="meta").devices
    apart = memory_table(tmp_path / "s", device="meta", offload=True).devices
    assert [device.device for device in apart] == ["meta", "cpu"]
    assert apart[1].weights == together[0].weights
    agents = memory_table(tmp_path / "s", device="meta").agents
    assert apart[0].weights + apart[0].links == max(agent.weights + agent.links for agent in agents)
    assert apart[0].batch == together[0].batch


def test_offloaded_systems_move_and_are_saved(mas, tmp_path):
    with FakeDevices():
        offloaded = visiting(mas, "cpu").to("meta:1")
        assert {str(device) for device in offloaded.devices.values()} == {"meta:1"}
        assert away(mas, "cpu") == set(SEQUENTIAL.roles)
    offloaded.to({"critic": "cpu"})
    offloaded.save_pretrained(tmp_path / "s")
    again = RecursiveMAS.from_pretrained(tmp_path / "s", device="cpu", offload=True)
    assert again.offloader is not None
    expected = mas.answer(QUESTIONS, **OPTIONS)
    same(again.answer(QUESTIONS, **OPTIONS), expected)
    rows = [{"question": "fox", "targets": dict.fromkeys(SEQUENTIAL.roles, "dog")}]
    with pytest.raises(ValueError, match="^offload: a system whose weights .* for visits only cannot be trained"):
        train_inner(again, rows, InnerConfig(steps=1, batch_size=1), progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_holds_one_agent_at_a_time(mas, tmp_path, seen):
    mas.save_pretrained(tmp_path / "s")
    expected = mas.answer(QUESTIONS, **OPTIONS)
    offloaded = RecursiveMAS.from_pretrained(tmp_path / "s", device="cuda:0", offload=True)
    assert all(kept.is_pinned() for kept in offloaded.agents["planner"].model.parameters())
    there = []
    seen.append(lambda agent: there.append(away(offloaded, "cuda:0")))
    answers = offloaded.answer(QUESTIONS, **OPTIONS)
    assert there == [{role} for role in SEQUENTIAL.roles] * 2
    for answer, other in zip(answers, expected, strict=True):
        for handoff, wanted in zip(answer.handoffs, other.handoffs, strict=True):
            assert (handoff.latents - wanted.latents).abs().max() <= 1e-4 * wanted.latents.abs().max()


def test_offload_on_the_command_line(mas, tmp_path, monkeypatch, capsys):
    mas.save_pretrained(tmp_path / "s")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "fox", "answer": "x"}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "s", "--question", "fox", "--offload", "--max-new-tokens", "2"]) == 0
    assert main(["eval", "s", "--data", "rows.jsonl", "--offload", "--max-new-tokens", "2"]) == 0
    assert main(["inspect", "s", "--question", "fox", "--offload"]) == 0
    capsys.readouterr()
    assert main(["info", "s", "--offload", "--device", "solver=meta"]) == 0
    assert "\nmeta: weights " in capsys.readouterr().out
