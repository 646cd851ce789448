"""Which peers the cells of links have, and that they compute the link they are compared on."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from benchmarks.harness.machine import Device
from benchmarks.harness.names import EAGER_FLOAT32, PRODUCTS, ZENTORCH
from benchmarks.harness.shapes import INNER, SMALL_INNER
from benchmarks.peers import link as peers
from benchmarks.peers.link import PEERS, link_peer, zentorch_serves
from benchmarks.suites.cpu.link_grid import link_cases
from recmas_kernels.testing import eager_twin, make_link, make_rows, relative_error


@pytest.mark.parametrize("full", [False, True])
def test_float32_stands_beside_every_cell_of_another_dtype(full: bool) -> None:
    for case in link_cases(full):
        assert (EAGER_FLOAT32 in case.peers) is (case.dtype is not torch.float32), case.id
        assert case.peers[0] == "eager", "the peer whose bound decides about compiled ones is looked at first"
        assert set(case.peers) <= set(PEERS)
        assert len(set(case.peers)) == len(case.peers)


def test_every_cell_has_a_name_of_its_own() -> None:
    names = [case.id for case in link_cases(full=True)]
    assert len(set(names)) == len(names)


def _machine(monkeypatch: pytest.MonkeyPatch, installed: bool, vendor: str | None) -> None:
    found = importlib.util.find_spec("json") if installed else None

    def find_spec(name: str, package: str | None = None) -> Any:
        return found if name == ZENTORCH else importlib.util.spec_from_loader(name, None)

    monkeypatch.setattr(peers.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(Device, "vendor", vendor)


@pytest.mark.parametrize(
    ("installed", "vendor", "serves"),
    [
        (True, "AuthenticAMD", True),
        (False, "AuthenticAMD", False),
        (True, "GenuineIntel", False),
        (True, None, False),
    ],
)
def test_zentorch_is_a_peer_on_amd_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool, vendor: str | None, serves: bool
) -> None:
    _machine(monkeypatch, installed, vendor)
    assert zentorch_serves() is serves
    compared = [case for case in link_cases(full=True) if ZENTORCH in case.peers]
    assert bool(compared) is serves
    assert all(case.config == INNER and not case.training for case in compared)


@pytest.mark.parametrize("name", ["eager", EAGER_FLOAT32, "addmm"])
def test_peers_compute_the_link(name: str) -> None:
    link, x = make_link(SMALL_INNER, torch.bfloat16), make_rows(5, 64, dtype=torch.bfloat16)
    peer = link_peer(name, link, x)
    truth = eager_twin(link, torch.float64)(x.double())
    assert peer.dtype is (torch.float32 if name == EAGER_FLOAT32 else torch.bfloat16)
    assert relative_error(peer.forward(x.to(peer.dtype)), truth) < (1e-5 if name == EAGER_FLOAT32 else 5e-2)


def test_an_unknown_peer_is_named() -> None:
    link = make_link(SMALL_INNER)
    with pytest.raises(ValueError, match=f"peer is 'eagre', expected one of eager, .*{PRODUCTS}"):
        link_peer("eagre", link, make_rows(1, 64))


@pytest.mark.skipif(not zentorch_serves(), reason="zentorch is not installed, or the processor is not AMD's")
def test_zentorch_computes_the_link_and_leaves_inductors_settings() -> None:
    link, x = make_link(SMALL_INNER), make_rows(5, 64)
    before = torch._inductor.config.freezing, torch._inductor.config.joint_custom_post_pass
    peer = link_peer(ZENTORCH, link, x)
    assert (torch._inductor.config.freezing, torch._inductor.config.joint_custom_post_pass) == before
    with torch.no_grad():
        assert relative_error(peer.forward(x), eager_twin(link, torch.float64)(x.double())) < 1e-5
