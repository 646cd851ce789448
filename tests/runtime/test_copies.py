"""A copy stands for its original until one of both is written, or it is forgotten."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from recmas.copies import copied, forget, original, stand_for
from tests.runtime.fake_devices import FakeDevices

DEVICE = torch.device("meta:0")


def write(tensor):
    tensor.mul_(2)


def move(tensor):
    tensor.data = tensor.clone()


@pytest.mark.parametrize("make", [nn.Parameter, torch.clone], ids=["parameter", "buffer"])
@pytest.mark.parametrize(
    ("written", "change"), [(0, write), (0, move), (1, write)], ids=["original", "original moved", "copy"]
)
@torch.no_grad()
def test_a_copy_is_its_original_until_one_is_written(make, written, change):
    with FakeDevices():
        tensor = make(torch.ones(3))
        twin = copied(tensor, DEVICE)
        assert isinstance(twin, nn.Parameter) == isinstance(tensor, nn.Parameter)
        assert (twin.device, twin.requires_grad) == (DEVICE, False)
        assert original(twin) is twin
        stand_for([(twin, tensor)])
        assert original(twin) is tensor
        assert original(tensor) is tensor
        change((tensor, twin)[written])
        assert original(twin) is twin
        stand_for([(twin, tensor)])
        assert original(twin) is tensor
        forget([twin])
        assert original(twin) is twin


def test_what_is_saved_or_copied_meanwhile_is_the_copy_alone():
    tensor = torch.ones(10_000)
    twin = copied(tensor, torch.device("cpu")).clone()
    stand_for([(twin, tensor)])
    try:
        file = io.BytesIO()
        torch.save({"a": twin, "b": nn.Parameter(twin)}, file)
        other = copy.deepcopy(twin)
        assert original(other) is other
    finally:
        forget([twin])
    assert len(file.getvalue()) < 1.5 * 4 * tensor.numel()
