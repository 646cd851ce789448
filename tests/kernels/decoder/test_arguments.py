"""Layers in one call of the kernels: bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from recmas_kernels import accelerate
from recmas_kernels.backends import cpu
from recmas_kernels.backends.cpu import decoder
from tests.kernels.decoder.models import Model, counted_as_known, step

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
known = counted_as_known

BAD: dict[str, Callable[[list[Any]], Any]] = {  # of the arguments of one layer
    "no tuple": list,
    "too few": lambda layer: tuple(layer[:-1]),
    "none": lambda layer: (),
    "no number": lambda layer: ("4", *layer[1:]),
    "no heads": lambda layer: (0, *layer[1:]),
    "more heads": lambda layer: (6, *layer[1:]),
    "huge": lambda layer: (1 << 62, *layer[1:]),
    "odd heads": lambda layer: (*layer[:2], 15, *layer[3:]),
    "no feed": lambda layer: (*layer[:3], 0, *layer[4:]),
    "another activation": lambda layer: (*layer[:4], 3, *layer[5:]),
    "no gain": lambda layer: (*layer[:6], None, *layer[7:]),
    "no panels": lambda layer: (*layer[:9], None, *layer[10:]),
    "short panels": lambda layer: (*layer[:9], layer[9][:-1], *layer[10:]),
    "another dtype of panels": lambda layer: (*layer[:10], 7, *layer[11:]),
    "given nothing": lambda layer: (*layer[:24], 1, *layer[25:]),
    "given less than nothing": lambda layer: (*layer[:24], -1, *layer[25:]),
    "no keys": lambda layer: (*layer[:25], None, *layer[26:]),
    "no positions": lambda layer: (*layer[:25], layer[25][:, :, :0], layer[26][:, :, :0], *layer[27:]),
    "other positions": lambda layer: (*layer[:25], layer[25][:, :, 1:], *layer[26:]),
    "other rows": lambda layer: (*layer[:25], layer[25][:1], *layer[26:]),
}

BAD_GIVEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "angles": lambda cos, sin: (cos[..., :8].contiguous(), sin, None),
    "a mask of others": lambda cos, sin: (cos, sin, torch.ones(2, 1, 1, 3).bool()),
    "no angles": lambda cos, sin: (None, sin, None),
    "two of three": lambda cos, sin: (cos, sin),
    "no tuple given": lambda cos, sin: [cos, sin, None],
}

BAD_NORM = {"another gain": (torch.ones(47), 0.0, 1e-6), "no eps": (torch.ones(48), 0.0, None)}
BAD_POSITIONS = {"none": 0, "more than there is room for": 7, "a fraction": 0.5}


@pytest.mark.parametrize(
    "bad",
    [
        *BAD,
        *BAD_GIVEN,
        *BAD_NORM,
        *BAD_POSITIONS,
        "no layer",
        "no tuple of layers",
        "not read",
        "queries",
        "y",
        "many rows",
    ],
)
@torch.no_grad()
def test_bad_arguments_are_one_error_and_nothing_is_written(bad: str):
    model, seen = Model(), []

    class Seen(decoder.DecoderLayers):
        def __init__(self, x: Tensor, layers: Any) -> None:
            seen.append(tuple(layers))
            super().__init__(x, seen[-1])

        def __call__(self, *given: Any) -> bool:
            seen.append(given)
            return True

    with accelerate(model), mock.patch.object(decoder, "DecoderLayers", Seen):
        step(model)
    layers, (x, y, given) = seen[:2]
    native, isa = decoder.kernels(), decoder.isa_in_use()
    queries, before = torch.empty(2 * 64), layers[0][25].clone()
    y.fill_(5)
    if bad in BAD:
        layers = (layers[0], BAD[bad](list(layers[1])), *layers[2:])
    if bad in BAD_GIVEN:
        given = BAD_GIVEN[bad](*given[:2])
    if bad == "no layer":
        layers = ()
    if bad == "many rows":
        x, y = x[:1].expand(17, 1, -1).contiguous(), torch.full((17, 1, 48), 5.0)
    queries = queries[:-1] if bad == "queries" else queries
    last = BAD_NORM.get(bad, decoder.NO_NORM)
    y = y[..., :-1] if bad == "y" else y

    def run() -> None:
        read = native.read_decoder_layers(isa, 2, 48, list(layers) if bad == "no tuple of layers" else layers)
        read = object() if bad == "not read" else read
        native.decoder_layers(isa, 2, x, y, queries, given, BAD_POSITIONS.get(bad, -1), *last, read)

    with pytest.raises((TypeError, ValueError, RuntimeError)):
        run()
    assert torch.equal(layers[0][25] if layers else before, before)
    assert bool((y == 5).all())
