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
from recmas.engine.model_state import ModelState, ModelStates
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


def load_by_swaps(agent: Agent) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load(agent)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swap(agent: Agent) -> None:
    other = nn.Parameter(3 * layer(agent).weight.detach(), requires_grad=False)
    torch.utils.swap_tensors(layer(agent).weight, other)


def point_elsewhere(agent: Agent) -> None:
    values = nn.utils.parameters_to_vector(agent.model.parameters())
    nn.utils.vector_to_parameters(1.5 * values, agent.model.parameters())


def cast(agent: Agent) -> None:
    for part in agent.decoder.layers:
        part.bfloat16().float()


def replace(agent: Agent) -> None:
    layer(agent).weight = nn.Parameter(3 * layer(agent).weight.detach())


def write_a_buffer(agent: Agent) -> None:
    agent.decoder.rotary_emb.inv_freq.mul_(0.5)


def hook(agent: Agent) -> None:
    layer(agent).register_forward_hook(lambda module, given, found: 3 * found)


def steer(agent: Agent) -> None:
    """A hook that adds a vector, none at first."""
    layer(agent).steering = [torch.zeros(layer(agent).weight.shape[0])]
    (vector,) = layer(agent).steering
    layer(agent).register_forward_hook(lambda module, given, found: found + vector)


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
    "loaded by swaps": (load_by_swaps, lambda agent: None),
    "swapped": (swap, lambda agent: None),
    "put elsewhere": (point_elsewhere, lambda agent: None),
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
    added = torch.nn.modules.module.register_module_forward_hook(lambda module, given, found: None)
    assert not state.holds()
    added.remove()
    assert state.holds()
    agent.decoder.config._attn_implementation = "eager"
    assert not state.holds()


@pytest.mark.parametrize("place", [list, tuple, lambda values: {"a": {"b": values}}], ids=["list", "tuple", "mapping"])
def test_a_state_sees_what_attributes_and_settings_hold_at_any_depth(place: Callable[[list[Any]], Any]):
    agent, inner, tensor = tiny_agent("llama"), [[1.0]], torch.ones(2)
    layer(agent).held, agent.decoder.config.held = place([tensor]), place([inner])
    changes = (lambda: tensor.add_(1), lambda: inner.append([2.0]), lambda: inner.__setitem__(0, [1.0]))
    for change in changes:
        state = ModelState(agent.decoder)
        assert state.holds()
        change()
        assert not state.holds()


def test_a_state_sees_a_cast_that_was_undone():
    """Weights are rounded, count no write, and lie where memory was free: where they were before, for all we know."""
    agent = tiny_agent("llama")
    for _ in range(3):
        state = ModelState(agent.decoder)
        cast(agent)
        assert not state.holds()


def test_what_a_state_alone_held_goes_when_it_is_compared():
    agent, states = tiny_agent("llama"), ModelStates()
    before, weight = states.of(agent.decoder), weakref.ref(layer(agent).weight)
    assert states.of(agent.decoder) is before
    del before
    replace(agent)
    states.of(agent.decoder)
    gc.collect()
    assert weight() is None


def test_a_run_that_has_ended_holds_no_weights():
    """They may be moved to free a device, or an agent be replaced."""
    agent = tiny_agent("llama", "planner")
    agents = {"planner": agent, "critic": tiny_agent("llama", "critic", 40, 2), "solver": tiny_agent("qwen2", "solver")}
    system = RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2, seed=0)
    system.answer(QUESTIONS, rounds=2)
    list(system.stream(QUESTIONS[0]))
    weight = weakref.ref(layer(agent).weight)
    replace(agent)
    gc.collect()
    assert weight() is None


def test_a_state_without_tensors_heeds_and_holds_none():
    agent = tiny_agent("llama")
    state, weight = ModelState(agent.decoder, tensors=False), weakref.ref(layer(agent).weight)
    write(agent)
    replace(agent)
    gc.collect()
    assert weight() is None
    assert state.holds()
    layer(agent).held = 1
    assert not state.holds()


def test_hooks_that_only_tell_hidden_states_are_no_matter():
    agent = tiny_agent("llama")
    agent.decoder(input_ids=torch.ones(1, 3, dtype=torch.int64), output_hidden_states=True)
    assert any(part._forward_hooks for part in agent.decoder.modules())
    assert ModelState(agent.decoder).holds()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_no_state_of_a_model_with_hooks_holds(register: str):
    agent = tiny_agent("llama")
    of_all = getattr(nn.modules.module, register.replace("register", "register_module"))
    for add in (getattr(layer(agent), register), of_all):
        handle = add(lambda *_: None)
        state = ModelState(agent.decoder)
        assert not state.holds()
        assert state.unforeseen == "a part of the model has hooks"
        handle.remove()
        assert not state.holds()
        assert ModelState(agent.decoder).holds()


@pytest.mark.parametrize("batches", [False, True], ids=["between rounds", "between batches"])
def test_a_vector_that_a_hook_adds_may_be_written(batches: bool):
    def turn(agent: Agent) -> None:
        layer(agent).steering[0].add_(1.0)

    plain, reused = (answers(turn, steer, reuse, packed=False, batches=batches) for reuse in (False, True))
    for one, other in zip(plain, reused, strict=True):
        for before, after in zip(one.handoffs, other.handoffs, strict=True):
            assert relative_error(after.latents, before.latents) < 1e-5
    planner = [how for stage, how in reused.reading.items() if "planner" in stage]
    assert all(how.computed == how.positions for how in planner)
    assert planner[-1].reason == "a part of the model has hooks"


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
    assert (reading.computed, reading.reason) == (reading.positions, "the model is no longer as it was")
    assert changed.reading["round 3, critic"].reason == ""
