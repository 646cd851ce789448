"""Steps without the decoder's class: the bits of calls of it, whatever is changed between two of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama

from recmas.engine.continuation import Continuation
from recmas.engine.growing_cache import ROOM, GrowingCache, GrowingLayer
from recmas_kernels import accelerate, use_backend
from recmas_kernels.backends import cpu
from recmas_kernels.backends.cpu import decoder
from recmas_kernels.decoder import steps as decoder_steps
from recmas_kernels.decoder.model import ModelKernel
from tests.runtime.tiny import prompts, tiny_agent, tiny_link, tiny_model

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
PROMPT, WIDTH = 7, 32


@contextmanager
def calls() -> Iterator[list[int]]:
    """The positions of each call of a decoder."""
    found: list[int] = []
    real = ModelKernel.__call__

    def counted(kernel: ModelKernel, *args: Any, **given: Any) -> Any:
        found.append(given["inputs_embeds"].shape[1])
        return real(kernel, *args, **given)

    with mock.patch.object(ModelKernel, "__call__", counted):
        yield found


class Batch:
    """Rows that a decoder has read, by calls alone or not.

    Args:
        family: of the decoder.
        rows: how many.
        padded: every second row begins with padding.
        dtype: of weights and rows.
        called: every step is a call of the decoder.
        room: steps to come.
    """

    def __init__(
        self,
        family: str = "llama",
        rows: int = 2,
        padded: bool = False,
        dtype: torch.dtype = torch.float32,
        called: bool = False,
        room: int = 12,
    ) -> None:
        self.decoder: Any = tiny_model(family).eval().requires_grad_(False).to(dtype).model
        self.done = accelerate(self.decoder)
        made = torch.Generator().manual_seed(1)
        mask = torch.ones(rows, PROMPT, dtype=torch.int64)
        if padded:
            mask[1::2, :3] = 0
            mask[3::4, 3] = 0
        self.past = Continuation(self.decoder, mask, room)
        self.cache: Any = self.past.cache
        self.other: Tensor | None = None
        self._how = mock.patch.object(GrowingCache, "lend", return_value=None) if called else nullcontext()
        self.hidden = self.past.feed(0.3 * torch.randn(rows, PROMPT, WIDTH, generator=made).to(dtype))
        self.states = [self.hidden]

    def step(self, count: int = 1) -> None:
        with self._how:
            for _ in range(count):
                self.hidden = self.past.feed(self.hidden[:, None])
                self.states.append(self.hidden)

    def held(self) -> list[Tensor]:
        """All that was computed and is kept."""
        return [*self.states, *(states for layer in self.cache.layers for states in (layer.keys, layer.values))]


def assert_same(found: Batch, expected: Batch) -> None:
    for mine, other in zip(found.held(), expected.held(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
@torch.no_grad()
def test_the_bits_are_those_of_calls(family: str, dtype: torch.dtype, rows: int, padded: bool):
    expected, found = (Batch(family, rows, padded, dtype, called) for called in (True, False))
    expected.step(6)
    with calls() as seen:
        found.step(6)
    windows = family in ("mistral", "gemma3_text")
    assert len(seen) == (6 if windows else 1)
    assert_same(found, expected)


@torch.no_grad()
def test_runs_follow_each_other_beyond_buffers_and_tables_and_the_room():
    expected, found = (Batch(padded=True, called=called, room=PROMPT + ROOM + 20) for called in (True, False))
    with calls() as seen:
        found.step(2 * ROOM)
    assert 1 < len(seen) < 10
    expected.step(2 * ROOM)
    assert_same(found, expected)


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": PROMPT + 6},
}


@pytest.mark.parametrize("rule", ROPES)
@torch.no_grad()
def test_turns_that_go_by_the_length_so_far_are_not_foreseen(rule: str, monkeypatch: pytest.MonkeyPatch):
    """They change between positions whose turns would be computed at once, and after the first of these."""
    monkeypatch.setattr(decoder_steps, "_AHEAD", 4)
    expected, found = (Batch(called=called, room=20) for called in (True, False))
    for batch in (expected, found):
        config = batch.decoder.config
        config.max_position_embeddings = PROMPT + 6
        config.rope_parameters = {"rope_type": rule, "rope_theta": 10000.0, **ROPES[rule]}
        batch.decoder.rotary_emb = type(batch.decoder.rotary_emb)(config)
        before = batch.decoder.rotary_emb.inv_freq.clone()
        with calls() as seen:
            batch.step(10)
        assert len(seen) == 10
        assert not torch.allclose(batch.decoder.rotary_emb.inv_freq, before)
    assert_same(found, expected)


def _double(module: nn.Module, given: Any, result: Any) -> Any:
    return 2 * result


def _weight(name: str) -> Callable[[Batch], Any]:
    def change(batch: Batch) -> None:
        place, _, attribute = name.rpartition(".")
        part = batch.decoder.get_submodule(place)
        setattr(part, attribute, nn.Parameter(1.5 * getattr(part, attribute), requires_grad=False))

    return change


def _write(name: str) -> Callable[[Batch], Any]:
    return lambda batch: getattr(batch.decoder.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]).mul_(2)


def _data(batch: Batch) -> None:
    gain = batch.decoder.layers[1].input_layernorm.weight
    gain.data = 3 * gain.data


def _stand_in(change: Callable[[Tensor, Tensor], Any]) -> Callable[[Batch], Any]:
    """What stands for a packed weight gets values, and its layer is not told."""

    def run(batch: Batch) -> None:
        held = batch.decoder.layers[1].mlp.up_proj._parameters["weight"]
        values = torch.randn(held.shape, generator=torch.Generator().manual_seed(2), dtype=held.dtype)
        batch.other = nn.Parameter(values, requires_grad=False)  # kept, as what is swapped lives on in it
        change(held, batch.other)

    return run


def _turns(batch: Batch) -> None:
    class Rotary(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            cos, sin = super().forward(x, position_ids)
            return 2 * cos, sin

    batch.decoder.rotary_emb.__class__ = Rotary


def _norm(batch: Batch) -> None:
    class Norm(type(batch.decoder.norm)):  # type: ignore[misc]
        def forward(self, x):
            return 2 * super().forward(x)

    batch.decoder.norm.__class__ = Norm


def _assign(batch: Batch) -> None:
    for layer in batch.cache.layers:
        layer.keys, layer.values = 2 * layer.keys, 3 * layer.values


def _part_of(batch: Batch) -> None:
    batch.cache.layers[1].values = 2 * batch.cache.layers[1].values


def _layer_replaced(batch: Batch) -> None:
    keys, values = batch.cache.layers[1].keys, batch.cache.layers[1].values
    batch.cache.layers[1] = GrowingLayer()
    batch.cache.layers[1].hold(2 * keys, 2 * values, 1)


CHANGES: dict[str, Callable[[Batch], Any]] = {
    "hook": lambda batch: batch.decoder.layers[1].register_forward_hook(_double),
    "hook of a part": lambda batch: batch.decoder.layers[1].mlp.down_proj.register_forward_hook(_double),
    "hook of the norm": lambda batch: batch.decoder.norm.register_forward_hook(_double),
    "hook before the decoder": lambda batch: batch.decoder.register_forward_pre_hook(
        lambda module, args, given: (args, {**given, "inputs_embeds": 2 * given["inputs_embeds"]}), with_kwargs=True
    ),
    "hook of the turns": lambda batch: batch.decoder.rotary_emb.register_forward_hook(
        lambda module, args, turned: (2 * turned[0], turned[1])
    ),
    "forward of the decoder": lambda batch: setattr(
        batch.decoder, "forward", lambda **given: type(batch.decoder).forward(batch.decoder, **given)
    ),
    "attribute": lambda batch: setattr(batch.decoder.layers[2].self_attn, "scaling", 0.01),
    "fewer layers": lambda batch: setattr(batch.decoder.config, "num_hidden_layers", 2),
    "order": lambda batch: batch.decoder.layers._modules.update({"0": batch.decoder.layers._modules.pop("0")}),
    "gain": _weight("layers.1.input_layernorm.weight"),
    "gain in place": _write("layers.1.input_layernorm.weight"),
    "data of a gain": _data,
    "weight": _weight("layers.1.mlp.up_proj.weight"),
    "data of a weight": _stand_in(lambda held, other: setattr(held, "data", other)),
    "memory of a weight": _stand_in(lambda held, other: held.set_(other)),
    "swapped weight": _stand_in(torch.utils.swap_tensors),
    "norm": _weight("norm.weight"),
    "norm in place": _write("norm.weight"),
    "data of the norm": lambda batch: setattr(batch.decoder.norm.weight, "data", 2 * batch.decoder.norm.weight),
    "strided data of the norm": lambda batch: setattr(
        batch.decoder.norm.weight, "data", torch.stack([batch.decoder.norm.weight * 3] * 2, 1)[:, 0]
    ),
    "eps of the norm": lambda batch: setattr(batch.decoder.norm, "variance_epsilon", 4.0),
    "forward of the norm": lambda batch: setattr(batch.decoder.norm, "forward", lambda x: 2 * x),
    "class of the norm": _norm,
    "hook before the norm": lambda batch: batch.decoder.norm.register_forward_pre_hook(lambda _, rows: 2 + rows[0]),
    "another norm": lambda batch: setattr(batch.decoder, "norm", nn.Identity()),
    "frequencies": lambda batch: setattr(batch.decoder.rotary_emb, "inv_freq", 2 * batch.decoder.rotary_emb.inv_freq),
    "frequencies in place": _write("rotary_emb.inv_freq"),
    "frequencies unseen": lambda batch: batch.decoder.rotary_emb.inv_freq.data.mul_(1.5),
    "scale of turns": lambda batch: setattr(batch.decoder.rotary_emb, "attention_scaling", 2.0),
    "class of turns": _turns,
    "cache assigned": _assign,
    "part of the cache": _part_of,
    "layer of the cache": _layer_replaced,
    "cache in place": lambda batch: [layer.keys.mul_(2) for layer in batch.cache.layers],
    "reordered": lambda batch: batch.cache.reorder_cache(torch.tensor([1, 0])),
    "unpacked": lambda batch: batch.done.close(),
}
SAME = {"forward of the decoder", "order", "unpacked"}  # bits or the order alone may change


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_between_two_steps_is_followed(change: str):
    expected, found, unchanged = (Batch(called=called) for called in (True, False, True))
    for batch in (expected, found, unchanged):
        batch.step(3)
        if batch is not unchanged:
            CHANGES[change](batch)
        batch.step(3)
    assert_same(found, expected)
    if change not in SAME:
        assert not torch.allclose(found.hidden, unchanged.hidden)


@pytest.mark.parametrize("place", ["mask", "turn", "cache", "layer", "kinds"])
@torch.no_grad()
def test_functions_that_somebody_put_in_place_are_called(place: str):
    """From the first step after that on."""
    batch, told = Batch(), []
    batch.step(3)
    layer = batch.cache.layers[1]
    owner, name = {
        "mask": (modeling_llama, "create_causal_mask"),
        "turn": (modeling_llama.LlamaRotaryEmbedding, "forward"),
        "cache": (batch.cache, "update"),
        "layer": (layer, "update"),
        "kinds": (Cache, "update"),
    }[place]
    real = getattr(owner, name)

    def put(*args: Any, **given: Any) -> Any:
        told.append(name)
        return real(*args, **given)

    with mock.patch.object(owner, name, put):
        batch.step(3)
    assert len(told) == (9 if place in ("cache", "kinds") else 3)
    batch.step()
    expected = Batch(called=True)
    expected.step(7)
    assert_same(batch, expected)


@pytest.mark.parametrize("how", ["backend", "check", "autocast"])
@torch.no_grad()
def test_settings_of_a_step_are_heeded(how: str, monkeypatch: pytest.MonkeyPatch):
    expected, found = (Batch(called=called) for called in (True, False))
    for batch in (expected, found):
        batch.step(3)
        if how == "check":
            monkeypatch.setenv("RECMAS_CHECK", "1")
        chosen = {
            "backend": lambda: use_backend("reference"),
            "check": lambda: mock.MagicMock(),
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        }[how]()
        with calls() as seen, chosen:
            batch.step(2)
        monkeypatch.delenv("RECMAS_CHECK", raising=False)
        assert len(seen) == 2
        batch.step(2)
    assert_same(found, expected)


@torch.no_grad()
def test_several_positions_between_single_ones_and_more_than_there_is_room_for():
    expected, found = (Batch(padded=True, called=called, room=5) for called in (True, False))
    for batch in (expected, found):
        batch.step(3)
        batch.states.append(batch.past.feed(torch.stack(batch.states[-3:], dim=1)))
        batch.step(8)
        assert batch.past.length == PROMPT + 14
        assert batch.cache.get_seq_length() == PROMPT + 14
    assert_same(found, expected)


@torch.no_grad()
def test_a_step_that_raises_leaves_what_a_call_leaves():
    lengths = []
    for called in (True, False):
        batch = Batch(called=called)
        batch.step(3)
        stop = mock.patch.object(decoder.DecoderLayers, "__call__", side_effect=KeyboardInterrupt)
        with stop, pytest.raises(KeyboardInterrupt):
            batch.step()
        lengths.append([layer.get_seq_length() for layer in batch.cache.layers])
        batch.past.length = PROMPT + 3
        batch.cache.crop(-1)
        batch.step(2)
        lengths.append(batch.hidden)
    assert lengths[0] == lengths[2] == [PROMPT + 4] * 3
    assert torch.equal(lengths[1], lengths[3])


@torch.no_grad()
def test_what_a_cache_holds_can_be_asked_for_at_any_time():
    batch = Batch()
    for steps in range(1, 5):
        batch.step()
        assert batch.cache.get_seq_length() == PROMPT + steps
        assert {states.shape for states in batch.held()[1 + steps :]} == {(2, 2, PROMPT + steps, 8)}


@torch.no_grad()
def test_a_batch_is_let_go_at_once():
    batch = Batch()
    batch.step(4)
    held = [weakref.ref(part) for part in (batch.cache, batch.cache.layers[0], batch.decoder)]
    gc.disable()
    try:
        del batch
        assert [part() for part in held] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_an_agent_calls_its_decoder_for_the_prompt_and_the_first_step(family: str):
    agent = tiny_agent(family)
    done = accelerate(agent.model)
    prompt, link = prompts(agent, (9, 4, 1))[0], tiny_link(agent)

    def reply(row: int, token: int, room: int) -> list[int]:
        return [token] * (row % 2) if room > 3 else []

    def work() -> tuple[Tensor, list[list[int]], list[Any]]:
        written = agent.write(prompt, 8, temperature=1.0, reply=reply)
        return agent.think(prompt, 6, link).states, agent.decode(prompt, 8), list(written)

    with calls() as seen:
        states, tokens, written = work()
    assert seen[:4] == [9, 1, 9, 1]
    with mock.patch.object(GrowingCache, "lend", return_value=None), calls() as every:
        expected = work()
    assert torch.equal(states, expected[0])
    assert (tokens, written) == expected[1:]
    assert len(every) > 2 * len(seen)
    done.close()
