"""What was read before a model changed is not used after it: numbers are those of runs that read every prompt anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import nn

from recmas import SEQUENTIAL, Agent, RecursiveMAS
from recmas.answering.answers import Answers
from recmas.config.system_json import PromptSpec
from recmas.engine.model_state import ModelState
from recmas_kernels import FrozenLinear
from recmas_kernels.backends import cpu
from tests.runtime.engine.plain_rollout import relative_error
from tests.runtime.fake_devices import FakeDevices
from tests.runtime.tiny import prompts as prompts_of
from tests.runtime.tiny import tiny_agent, tiny_model, tiny_tokenizer

Change = Callable[[Agent], object]
SAID = "question: what is the answer to everything? notes and plan and critique and solution " * 4
QUESTIONS = ["fox", "the lazy dog jumps"]
PACKED = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def layer(agent: Agent) -> Any:
    return agent.decoder.layers[1].self_attn.v_proj


def write(agent: Agent) -> None:
    with torch.no_grad():
        layer(agent).weight.mul_(3)


def load(agent: Agent) -> None:
    agent.model.load_state_dict({name: 1.5 * value for name, value in agent.model.state_dict().items()})


def replace(agent: Agent) -> None:
    layer(agent).weight = nn.Parameter(3 * layer(agent).weight.detach())


def write_a_buffer(agent: Agent) -> None:
    agent.decoder.rotary_emb.inv_freq.mul_(0.5)


def hook(agent: Agent) -> None:
    layer(agent).register_forward_hook(lambda module, given, found: 3 * found)


def adapt(agent: Agent) -> None:
    """A LoRA adapter that changes nothing until it is switched on."""
    config = peft.LoraConfig(target_modules=["v_proj"], r=2, lora_alpha=8, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, agent.model)
    switch(agent, False)


def switch(agent: Agent, on: bool) -> None:
    for part in agent.model.modules():
        if isinstance(part, peft.tuners.lora.LoraLayer):
            part.enable_adapters(on)


def scale(agent: Agent) -> None:
    for part in agent.model.modules():
        if isinstance(part, peft.tuners.lora.LoraLayer):
            part.set_scale("default", 9.0)


def write_packed(agent: Agent) -> None:
    linear = layer(agent)
    assert isinstance(linear, FrozenLinear)
    linear.unpack()
    write(agent)
    linear.pack()


def answers(change: Change | None, prepare: Change, reuse: bool, *, packed: bool, batches: bool = False) -> Answers:
    """Of a run in which the planner is changed: between two rounds, or between two batches."""
    planner = Agent(tiny_model("llama", 32, 1), tiny_tokenizer(), name="planner", accelerate=packed)
    agents = {"planner": planner, "critic": tiny_agent("llama", "critic", 32, 2), "solver": tiny_agent("llama")}
    prompts = {"planner": PromptSpec(SAID + "{{question}}", SAID + "{{question}} {{from:solver}}")}
    rounds = 1 if batches else 2
    mas = RecursiveMAS.create(agents, SEQUENTIAL, rounds=rounds, latent_steps=2, prompts=prompts, seed=0)
    prepare(planner)
    left = [] if change is None else [change]

    def changed(*_: object) -> None:
        if left:
            left.pop()(planner)

    def heard(visit: Any, message: Any) -> Any:
        changed()
        return message

    when = {"on_answers": changed, "batch_size": 1} if batches else {"on_message": heard}
    return mas.answer(QUESTIONS, max_new_tokens=3, trace=True, prefix_reuse=reuse, **when)


CHANGES: dict[str, tuple[Change, Change]] = {
    "written in place": (write, lambda agent: None),
    "loaded": (load, lambda agent: None),
    "replaced": (replace, lambda agent: None),
    "a buffer written": (write_a_buffer, lambda agent: None),
    "a hook": (hook, lambda agent: None),
    "an adapter switched on": (partial(switch, on=True), adapt),
    "an adapter of another scale": (scale, lambda agent: [adapt(agent), switch(agent, True)]),
}


@pytest.mark.parametrize("batches", [False, True], ids=["between rounds", "between batches"])
@pytest.mark.parametrize(
    ("change", "prepare", "packed"),
    [
        *(pytest.param(*kind, False, id=name) for name, kind in CHANGES.items()),
        pytest.param(write_packed, lambda agent: None, True, id="written and packed again", marks=PACKED),
        pytest.param(load, lambda agent: None, True, id="packed and loaded", marks=PACKED),
    ],
)
def test_a_callback_may_change_an_agent(change: Change, prepare: Change, packed: bool, batches: bool):
    plain, reused = (answers(change, prepare, reuse, packed=packed, batches=batches) for reuse in (False, True))
    unchanged = answers(None, prepare, True, packed=packed, batches=batches)
    where = 0 if batches else -2  # the planner's first message after the change
    for row, (one, other) in enumerate(zip(plain, reused, strict=True)):
        for before, after in zip(one.handoffs, other.handoffs, strict=True):
            assert relative_error(after.latents, before.latents) < 1e-5
        assert one.tokens == other.tokens
        if row == 1 or not batches:
            assert relative_error(unchanged[row].handoffs[where].latents, one.handoffs[where].latents) > 1e-3


@pytest.mark.parametrize(("change", "prepare"), CHANGES.values(), ids=list(CHANGES))
def test_a_state_holds_until_something_changes(change: Change, prepare: Change):
    agent = tiny_agent("llama")
    prepare(agent)
    state = ModelState(agent.decoder)
    assert state.holds()
    agent.decode(prompts_of(agent, (5, 3))[0], 3)
    assert state.holds()
    change(agent)
    assert not state.holds()


def test_a_state_sees_hooks_of_all_modules_and_settings():
    agent = tiny_agent("llama")
    state = ModelState(agent.decoder)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, given, found: None)
    assert not state.holds()
    hook.remove()
    assert state.holds()
    agent.decoder.config._attn_implementation = "eager"
    assert not state.holds()


def test_a_state_holds_no_weight_that_the_model_has_no_more():
    agent = tiny_agent("llama")
    state, weight = ModelState(agent.decoder), weakref.ref(layer(agent).weight)
    replace(agent)
    gc.collect()
    assert weight() is None
    assert not state.holds()


def test_offloaded_weights_are_the_same_at_every_visit():
    """Each visit has copies of its own; a round reuses what the one before has read, until a weight is written."""
    agents = {role: tiny_agent("llama", role, 32, seed) for seed, role in enumerate(SEQUENTIAL.roles)}
    mas = RecursiveMAS.create(agents, SEQUENTIAL, rounds=3, latent_steps=2, seed=0)
    expected = mas.answer(QUESTIONS, max_new_tokens=3)

    def heard(visit: Any, message: Any) -> Any:
        if (visit.role, visit.round) == ("critic", 2):
            write(agents["planner"])  # at home: the critic is on the device
        return message

    with FakeDevices():
        offloaded = RecursiveMAS(mas.agents, mas.inner_links, mas.outer_links, mas.pattern, offload="meta:0")
        offloaded.defaults, offloaded.settings = mas.defaults, mas.settings
        found = offloaded.answer(QUESTIONS, max_new_tokens=3)
        changed = offloaded.answer(QUESTIONS, max_new_tokens=3, on_message=heard)
    assert found.reading == expected.reading
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    reading = changed.reading["round 3, planner"]
    assert (reading.computed, reading.reason) == (reading.positions, "the model has changed since")
    assert changed.reading["round 3, critic"].reason == ""
