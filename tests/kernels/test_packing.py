"""Packed weights: a copy is used while the weight is what it was, and never after, whatever changed it."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch

from recmas_kernels import FusedRecursiveLink, clear_packed, use_backend
from recmas_kernels.backends import cpu, packing
from recmas_kernels.testing import make_link, make_rows

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
WIDTH = 96  # 9216 elements: large enough to be packed
CONFIG = FusedRecursiveLink.inner(WIDTH).config


@pytest.fixture(autouse=True)
def no_packed_weights():
    clear_packed()
    with use_backend("cpu"):
        yield
    clear_packed()


def packed_link(dtype: torch.dtype = torch.float32) -> FusedRecursiveLink:
    """A link whose weights are packed."""
    link = make_link(CONFIG, dtype)
    call(link), call(link)
    assert packing.packed_bytes() > 0
    return link


def call(link: FusedRecursiveLink) -> torch.Tensor:
    with torch.no_grad():
        return link(make_rows(4, WIDTH, dtype=next(link.parameters()).dtype))


def check_current(link: FusedRecursiveLink) -> None:
    """Three calls (streamed, packing, packed) give what the weights of this moment give."""
    with use_backend("reference"):
        expected = call(link)
    tolerance = 64 * torch.finfo(expected.dtype).eps
    for _ in range(3):
        torch.testing.assert_close(call(link), expected, rtol=tolerance, atol=tolerance)


def train_step(link: FusedRecursiveLink, optimizer: torch.optim.Optimizer) -> None:
    link(make_rows(4, WIDTH)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_packs_on_the_second_sighting():
    link = make_link(CONFIG)
    call(link)
    assert packing.packed_bytes() == 0
    call(link)
    size = packing.packed_bytes()
    assert size >= 2 * WIDTH * WIDTH * 4
    call(link)
    assert packing.packed_bytes() == size


def test_panels_of_16_bit_weights_take_half_the_room():
    packed_link(torch.bfloat16)
    assert packing.packed_bytes() < 1.2 * 2 * WIDTH * WIDTH * 2


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps(name):
    link = packed_link()
    optimizer = OPTIMIZERS[name](list(link.parameters()))
    for _ in range(2):
        train_step(link, optimizer)
        check_current(link)


def ema_through_data(link):
    for parameter in link.parameters():
        parameter.data.mul_(0.9).add_(torch.ones_like(parameter), alpha=0.1)


def write_through_numpy(link):
    link.proj1.weight.detach().numpy()[:] *= 0.5


def swap_data(link):
    link.proj2.weight.data = link.proj2.weight.data * 2


def load_other_state(link):
    link.load_state_dict(make_link(CONFIG, seed=5).state_dict())


def replace_parameter(link):
    link.proj1.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / 10)


def round_trip(link):
    link.to(torch.float64).to(torch.float32)


def in_place_without_grad(link):
    with torch.no_grad():
        link.proj1.weight.mul_(1.5)


MUTATIONS = [
    ema_through_data,
    write_through_numpy,
    swap_data,
    load_other_state,
    replace_parameter,
    round_trip,
    in_place_without_grad,
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_mutations(mutate):
    link = packed_link()
    before = call(link)
    mutate(link)
    check_current(link)
    if mutate is not round_trip:
        assert not torch.equal(call(link), before)


def test_another_dtype():
    link = packed_link()
    link.to(torch.bfloat16)
    check_current(link)
    link.to(torch.float32)
    check_current(link)


def test_autocast_packs_in_the_compute_dtype():
    link = packed_link()
    with torch.autocast("cpu", torch.bfloat16):
        first = [call(link) for _ in range(3)]
        with use_backend("reference"):
            expected = call(link)
    torch.testing.assert_close(first[2], expected, rtol=0.05, atol=0.05)
    assert torch.equal(first[0], first[2])
    check_current(link)


def test_freezing_and_unfreezing():
    link = packed_link()
    for requires_grad in (False, True):
        link.requires_grad_(requires_grad)
        check_current(link)
        assert packing.packed_bytes() > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda link: pickle.loads(pickle.dumps(link))], ids=["deepcopy", "pickle"])
def test_copies_have_weights_of_their_own(duplicate):
    link = packed_link()
    other = duplicate(link)
    in_place_without_grad(other)
    check_current(other)
    check_current(link)
    assert not torch.equal(call(other), call(link))


def test_saving_holds_no_packed_weights():
    link = packed_link()
    buffer = io.BytesIO()
    torch.save(link.state_dict(), buffer)
    assert buffer.tell() < 3 * WIDTH * WIDTH * 4


def test_a_weight_that_dies_takes_its_copy_along():
    link = packed_link()
    del link
    gc.collect()
    assert packing.packed_bytes() == 0
    assert not packing._entries


def test_an_address_that_is_reused_is_no_sighting():
    for seed in range(20):
        link = make_link(CONFIG, seed=seed)
        check_current(link)
        del link


def test_forget_and_clear():
    link = packed_link()
    whole = packing.packed_bytes()
    packing.forget([link.proj1.weight])
    assert 0 < packing.packed_bytes() < whole
    clear_packed()
    assert packing.packed_bytes() == 0
    check_current(link)


def test_apply_forgets():
    link = packed_link()
    link.to(torch.float64)
    assert packing.packed_bytes() == 0


def test_not_packed_tensors_that_are_no_parameters_and_inference_tensors():
    link = make_link(CONFIG)
    with torch.inference_mode():
        frozen = FusedRecursiveLink(CONFIG)
    for _ in range(3):
        torch.func.functional_call(link, dict(link.state_dict()), (make_rows(4, WIDTH),))
        call(frozen)
    assert packing.packed_bytes() == 0


def test_small_weights_are_not_packed():
    link = make_link(FusedRecursiveLink.inner(8).config)
    with torch.no_grad():
        for _ in range(3):
            link(make_rows(4, 8))
    assert packing.packed_bytes() == 0


def test_no_packing_while_weights_learn():
    link = make_link(CONFIG)
    for _ in range(3):
        link(make_rows(4, WIDTH))
    assert packing.packed_bytes() == 0


def test_the_full_comparison_sees_what_samples_miss(monkeypatch):
    link = packed_link()
    weight = link.proj1.weight.detach().view(-1)
    for checked in ("1", "0", "1"):  # it may be asked for at any time
        monkeypatch.setenv("RECMAS_CHECK", checked)
        if checked == "1":
            call(link), call(link)
            weight.numpy()[3] += 100.0  # between two samples, and no version is bumped
        check_current(link)
    assert packing.packed_bytes() > 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_callables_use_the_weights_of_the_moment():
    link = make_link(CONFIG)
    compiled = torch.compile(link, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            compiled(make_rows(4, WIDTH))
        in_place_without_grad(link)
        torch.testing.assert_close(compiled(make_rows(4, WIDTH)), call(link))
    check_current(link)
