"""Packed weights: only inside a scope, at whose end nothing is left of them; the same bits inside and outside."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import threading

import pytest
import torch

from recmas_kernels import FusedRecursiveLink, latent_handoff, packed, recursive_link, use_backend
from recmas_kernels.backends import cpu, packing
from recmas_kernels.testing import configs, make_link, make_rows
from tests.kernels.cpu_settings import AVAILABLE, instruction_set

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
WIDTH = 96  # 9216 elements: large enough to be packed
CONFIG = FusedRecursiveLink.inner(WIDTH).config


@pytest.fixture(autouse=True)
def nothing_stays_packed():
    with use_backend("cpu"):
        yield
    assert not packing._entries


def call(link: FusedRecursiveLink) -> torch.Tensor:
    with torch.no_grad():
        return link(make_rows(4, WIDTH, dtype=next(link.parameters()).dtype))


def check_current(link: FusedRecursiveLink) -> None:
    """Calls give what the weights of this moment give."""
    with use_backend("reference"):
        expected = call(link)
    tolerance = 64 * torch.finfo(expected.dtype).eps
    for _ in range(3):
        torch.testing.assert_close(call(link), expected, rtol=tolerance, atol=tolerance)


def train_step(link: FusedRecursiveLink, optimizer: torch.optim.Optimizer) -> None:
    link(make_rows(4, WIDTH)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_nothing_is_packed_outside_of_a_scope():
    link = make_link(CONFIG)
    for _ in range(3):
        call(link)
        link(make_rows(4, WIDTH))
    assert packing.packed_bytes() == 0


def test_a_scope_packs_at_the_first_use_and_forgets_at_its_end():
    link = make_link(CONFIG)
    with packed(link):
        assert packing.packed_bytes() == 0
        call(link)
        size = packing.packed_bytes()
        assert size >= 2 * WIDTH * WIDTH * 4
        call(link)
        assert packing.packed_bytes() == size
    assert packing.packed_bytes() == 0


def test_an_error_ends_the_scope_too():
    link = make_link(CONFIG)
    with pytest.raises(ValueError, match="x has shape"), packed(link):
        link(make_rows(4, WIDTH + 1))
    assert not packing._entries


def test_scopes_nest():
    link, other = make_link(CONFIG), make_link(CONFIG, seed=5)
    with packed(link):
        with packed([link, other]):
            call(link), call(other)
            both = packing.packed_bytes()
        assert packing.packed_bytes() == both / 2
        call(link)
        assert packing.packed_bytes() == both / 2


def test_scopes_of_several_threads():
    link, barrier, results = make_link(CONFIG), threading.Barrier(4), []
    expected = call(link)

    def work():
        for _ in range(5):
            with packed(link):
                barrier.wait()
                results.append(torch.equal(call(link), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def test_what_can_be_packed():
    link = make_link(CONFIG)
    model = torch.nn.ModuleDict({"link": link})
    w1, w2 = make_rows(WIDTH, WIDTH), make_rows(WIDTH, WIDTH, seed=2)
    for links in (link, model, [link], (link for _ in range(1)), model.values()):
        with packed(links):
            call(link)
            assert packing.packed_bytes() > 0
    with packed(w1, w2):
        recursive_link(make_rows(4, WIDTH), w1, w2)
        assert packing.packed_bytes() > 0
    for wrong, name in (("link", "str"), (3, "int"), ([None], "NoneType")):
        with pytest.raises(TypeError, match=rf"packed\(\) was given a {name}, expected modules"), packed(wrong):
            pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["inner", "outer"])
def test_a_scope_changes_no_bit(kind, dtype):
    """In inference from three rows on, and in training; on both sides of the number of rows that are streamed."""
    values = configs()[kind].to_dict()
    for size in ("in_features", "hidden_features", "out_features"):
        values[size] *= 3
    link = make_link(type(CONFIG)(**values), dtype)
    for tokens in (3, 4, 16, 17, 33):
        x = make_rows(tokens, link.config.in_features, dtype=dtype)
        with torch.no_grad():
            expected = link(x)
        trained = link(x)
        with packed(link):
            with torch.no_grad():
                assert torch.equal(link(x), expected)
            assert packing.packed_bytes() > 0
            assert torch.equal(link(x), trained)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_one_and_two_rows_read_weights_in_place_outside_of_a_scope(isa):
    """As in training, whose sums are in another order than those of panels; with AMX inside of one, too."""
    link = make_link(CONFIG)
    for tokens, as_trained in ((1, True), (2, True), (3, False)):
        x = make_rows(tokens, WIDTH)
        with instruction_set(isa):
            with torch.no_grad():
                expected = link(x)
                with packed(link):
                    assert torch.equal(link(x), expected) is (not as_trained or isa == "amx")
                    torch.testing.assert_close(link(x), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(link(x), expected) is as_trained


def test_panels_of_16_bit_weights_take_half_the_room():
    link = make_link(CONFIG, torch.bfloat16)
    with packed(link):
        call(link)
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
    link = make_link(CONFIG)
    optimizer = OPTIMIZERS[name](list(link.parameters()))
    for _ in range(2):
        with packed(link):
            call(link)
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


def partial_write(link):
    link.proj1.weight.data[3:5] = 100.0


def handoff_into_a_weight(link):
    with torch.no_grad():
        rows, slots = make_rows(2, WIDTH, seed=7), torch.tensor([5, 0])
        latent_handoff(rows, torch.nn.Identity(), link.proj1.weight, slot_rows=slots, inplace=True)


def _write_shared(weight):
    weight[1] = 50.0


def another_process(link):
    if not link.proj2.weight.is_shared():
        link.share_memory()
    process = multiprocessing.get_context("spawn").Process(target=_write_shared, args=(link.proj2.weight.detach(),))
    process.start()
    process.join()
    assert process.exitcode == 0


SEEN = [swap_data, load_other_state, replace_parameter, round_trip, in_place_without_grad, handoff_into_a_weight]
UNSEEN = [ema_through_data, write_through_numpy, partial_write, another_process]


@pytest.mark.parametrize("write", [*SEEN, *UNSEEN], ids=lambda f: f.__name__)
def test_writes_outside_of_a_scope(write):
    link = make_link(CONFIG)
    with packed(link):
        before = call(link)
    write(link)
    check_current(link)
    assert write is round_trip or not torch.equal(call(link), before)
    with packed(link):
        check_current(link)


@pytest.mark.parametrize("write", SEEN, ids=lambda f: f.__name__)
def test_writes_that_show_inside_of_a_scope(write):
    link = make_link(CONFIG)
    with packed(link):
        call(link)
        write(link)
        check_current(link)


@pytest.mark.parametrize("write", [in_place_without_grad, *UNSEEN], ids=lambda f: f.__name__)
def test_full_checks_find_every_write_inside_of_a_scope(write, monkeypatch):
    monkeypatch.setenv("RECMAS_CHECK", "1")
    link = make_link(CONFIG)
    if write is another_process:
        link.share_memory()
    with packed(link):
        call(link)
        write(link)
        with pytest.raises(RuntimeError, match=r"^proj\d.weight was written inside packed\(\)"):
            call(link)
    check_current(link)


def test_full_checks_may_begin_inside_of_a_scope(monkeypatch):
    link = make_link(CONFIG)
    with packed(link):
        call(link)
        partial_write(link)
        monkeypatch.setenv("RECMAS_CHECK", "1")
        check_current(link)
        link.proj1.weight.data[:1] += 1
        with pytest.raises(RuntimeError, match="written inside packed"):
            call(link)


def test_another_dtype():
    link = make_link(CONFIG)
    with packed(link):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            link.to(dtype)
            check_current(link)


def test_autocast_packs_in_the_compute_dtype():
    link = make_link(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(link)
        with packed(link):
            assert torch.equal(call(link), expected)
    with packed(link), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(link), expected)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda link: pickle.loads(pickle.dumps(link))], ids=["deepcopy", "pickle"]
)
def test_copies_have_weights_of_their_own(duplicate):
    link = make_link(CONFIG)
    with packed(link):
        call(link)
        other = duplicate(link)
        partial_write(other)
        check_current(other)
        check_current(link)
        assert not torch.equal(call(other), call(link))


def test_saving_holds_no_packed_weights():
    link = make_link(CONFIG)
    with packed(link):
        call(link)
        buffer = io.BytesIO()
        torch.save(link.state_dict(), buffer)
    assert buffer.tell() < 3 * WIDTH * WIDTH * 4


def weights_alive() -> int:
    gc.collect()
    return sum(type(value) is torch.nn.Parameter and value.numel() == WIDTH * WIDTH for value in gc.get_objects())


def test_nothing_is_pinned_after_a_scope():
    before = weights_alive()
    link = make_link(CONFIG)
    with packed(link):
        call(link)
    assert weights_alive() == before + 2
    del link
    assert weights_alive() == before


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("scope", [False, True])
def test_tensors_can_be_swapped(scope):
    link, other = make_link(CONFIG), make_link(CONFIG, seed=5)
    with packed(link if scope else []):
        call(link)
        link.load_state_dict(other.state_dict())
        check_current(link)
        link.to(torch.float64).to(torch.float32)
        check_current(link)
    torch.utils.swap_tensors(link.proj1.weight, torch.nn.Parameter(torch.zeros(WIDTH, WIDTH)))
    check_current(link)


def test_small_weights_are_not_packed():
    link = make_link(FusedRecursiveLink.inner(8).config)
    with packed(link), torch.no_grad():
        link(make_rows(4, 8))
        assert packing.packed_bytes() == 0


def test_inference_tensors():
    with torch.inference_mode():
        link = make_link(CONFIG)
    with packed(link):
        check_current(link)
        assert packing.packed_bytes() > 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_callables_use_the_weights_of_the_moment():
    link = make_link(CONFIG)
    compiled = torch.compile(link, fullgraph=True, backend="eager")
    with torch.no_grad():
        with packed(link):
            assert torch.equal(compiled(make_rows(4, WIDTH)), call(link))
            assert packing.packed_bytes() > 0
        partial_write(link)
        assert torch.equal(compiled(make_rows(4, WIDTH)), call(link))
    check_current(link)
