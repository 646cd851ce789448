"""The small calls that are profiled on a device, of both of Triton's variants."""

from __future__ import annotations

from unittest import mock

import torch

from benchmarks.harness.gpu import small_shapes
from recmas_kernels.backends.triton import link, small_hidden


def test_every_op_runs_in_each_way(monkeypatch, capsys):
    monkeypatch.setattr(small_shapes, "DTYPES", (torch.float32,))
    monkeypatch.setattr(small_shapes, "TOKENS", (3,))
    monkeypatch.setattr(small_shapes, "CONFIGS", {"inner": small_shapes.CONFIGS["inner"]})
    small = mock.Mock(wraps=small_hidden.forward)
    monkeypatch.setattr(link.small_hidden, "forward", small)
    assert small_shapes.main(["--device", "cpu", "--backends", "triton"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"triton ({way}) {op}: 1 calls" for way in ("library", "small") for op in small_shapes.OPS]
    assert small.call_count > 0
