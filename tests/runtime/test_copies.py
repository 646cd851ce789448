"""A copy stands for its original until one of both is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recmas.copies import copied, original
from tests.runtime.fake_devices import FakeDevices

DEVICE = torch.device("meta:0")


@pytest.mark.parametrize("make", [nn.Parameter, torch.clone], ids=["parameter", "buffer"])
@pytest.mark.parametrize("written", [0, 1], ids=["original", "copy"])
@torch.no_grad()
def test_a_copy_is_its_original_until_one_is_written(make, written):
    with FakeDevices():
        tensor = make(torch.ones(3))
        copy = copied(tensor, DEVICE)
        assert type(copy) is type(copied(tensor, DEVICE))
        assert (copy.device, copy.requires_grad) == (DEVICE, False)
        assert original(copy) is tensor
        assert original(tensor) is tensor
        (tensor, copy)[written].mul_(2)
        assert original(copy) is copy
        assert original(copied(tensor, DEVICE)) is tensor
