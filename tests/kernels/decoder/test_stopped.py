"""Decoders whose layers run in one call: what a step that does not end as expected leaves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from recmas_kernels import accelerate
from recmas_kernels.backends import cpu
from recmas_kernels.backends.cpu import decoder
from recmas_kernels.decoder import model as decoder_model
from recmas_kernels.decoder.model import ModelKernel
from tests.kernels.decoder.layers import Layer, Sizes
from tests.kernels.decoder.models import LAYERS, Cache, Model, counted_as_known, step

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
known = counted_as_known


@torch.no_grad()
def test_an_order_that_nobody_saw_is_an_error_and_no_result():
    model = Model()
    with accelerate(model):
        step(model)
        with (
            mock.patch.object(Model, "between", side_effect=KeyError("stop")),
            pytest.raises(KeyError, match="stop"),
        ):
            step(model)
        step(model)
        kernel = model.__dict__["forward"]
        kernel._known.layers = [*kernel._known.layers, Layer()]  # as if the last one were never reached
        unseen = mock.patch.object(decoder_model, "begins_with", return_value=True)
        with unseen, pytest.raises(RuntimeError, match="another order"):
            step(model)


@torch.no_grad()
def test_what_was_put_off_is_run_where_a_step_ends_early():
    """As plain layers leave it: those before the error have written their position."""
    plain, model = Model(), Model()
    held = []
    with accelerate(model):
        step(model)
        for each in (plain, model):
            cache = Cache(2, Sizes())
            cache.held[..., 5:, :] = torch.nan
            real = type(each.layers[2]).__call__

            def stops(layer: nn.Module, *given: Any, each: Model = each, real: Any = real, **more: Any) -> Any:
                if layer is each.layers[2]:
                    raise KeyboardInterrupt
                return real(layer, *given, **more)

            kernel = each.__dict__.get("forward")
            known = kernel and kernel._known
            opened = mock.patch.object(ModelKernel, "_unchanged", return_value=known) if kernel else nullcontext()
            with mock.patch.object(Layer, "__call__", stops), opened, pytest.raises(KeyboardInterrupt):
                each(inputs_embeds=torch.ones(2, 1, 48), past_key_values=cache)
            held.append(cache)
    assert held[0].lengths == held[1].lengths == [6, 6, 5, 5]
    torch.testing.assert_close(held[1].held, held[0].held, equal_nan=True)


@pytest.mark.parametrize("where", ["room", "kernels"])
@torch.no_grad()
def test_a_cache_that_has_grown_does_not_grow_once_more_when_its_step_is_interrupted(where: str):
    class Full(Cache):
        def make_room(self, indices: Sequence[int], *given: Any) -> Any:
            rooms = super().make_room(indices[: 2 if where == "room" else None], *given)
            if where == "room":
                raise KeyboardInterrupt
            return rooms

    model, cache = Model(), Full(2, Sizes())
    with accelerate(model):
        step(model)
        with (
            mock.patch.object(decoder.DecoderLayers, "__call__", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            model(inputs_embeds=torch.ones(2, 1, 48), past_key_values=cache)
    assert cache.lengths == ([6, 6, 5, 5] if where == "room" else [6] * LAYERS)


@torch.no_grad()
def test_rows_that_nobody_waited_for_are_an_error():
    model = Model()
    with accelerate(model):
        step(model)
        real = type(model).between
        with (
            mock.patch.object(Model, "between", lambda model, x: real(model, x).clone()),
            pytest.raises(RuntimeError, match="another order"),
        ):
            step(model)
        step(model)
