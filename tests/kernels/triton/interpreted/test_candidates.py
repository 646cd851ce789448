"""Links of the candidates' products against float64, at sizes no tile divides; what the copy engine refuses."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.candidates import persistent, tiles
from benchmarks.gpu.candidates.epilogue import PLAIN
from benchmarks.gpu.candidates.link import installed
from benchmarks.gpu.candidates.product import Product
from recmas_kernels import LinkConfig, recursive_link
from recmas_kernels.backends.triton import plan
from recmas_kernels.testing import check_link, configs, make_link, make_rows, name_of, run

# Every size is a multiple of eight and of nothing more: tiles are 32 x 64 x 16.
CONFIGS = {
    "inner": LinkConfig("inner", 72, 104, 72, "identity"),
    "outer": LinkConfig("outer", 104, 72, 136, "linear"),
    "no-residual-tanh": LinkConfig("inner", 40, 72, 40, "none", activation="gelu_tanh"),
    "equation-4": LinkConfig("outer", 40, 72, 104, "linear", norm=False),
}


POINTERS = tiles.MatmulConfig(32, 64, 16, 4, 2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *_, **__: POINTERS)
    with installed():
        yield


@pytest.fixture
def launched(monkeypatch) -> list[Product]:
    """Every product that may goes through the persistent kernel, on two programs that walk over several tiles each."""
    found: list[Product] = []
    launch = persistent.launch

    def record(product, config):
        assert persistent.refusal(product) is None
        found.append(product)
        return launch(product, config)

    described_tile = POINTERS._replace(persistent=True)
    monkeypatch.setattr(tiles, "choose", lambda *_, described, **__: described_tile if described else POINTERS)
    monkeypatch.setattr(tiles, "no_copy_engine", lambda *_: None)  # float32 as well
    monkeypatch.setattr(tiles, "multiprocessors", lambda _: 2)
    monkeypatch.setattr(persistent, "launch", record)
    return found


@pytest.mark.parametrize(
    ("kind", "dtype", "tokens"),
    [
        *((kind, torch.float16, 37) for kind in configs()),
        ("inner", torch.float32, 1),
        ("outer-equation-4", torch.float32, 1),
    ],
    ids=str,
)
def test_by_pointers(kind, dtype, tokens):
    config = configs()[kind]
    x = make_rows(tokens, config.in_features, dtype=dtype)
    check_link(make_link(config, dtype), x, make_rows(tokens, config.out_features, dtype=dtype, seed=2))


@pytest.mark.parametrize(
    ("kind", "dtype", "tokens"),
    [*((kind, torch.float16, 37) for kind in CONFIGS), ("inner", torch.float32, 1), ("equation-4", torch.float32, 1)],
    ids=str,
)
def test_by_tensor_descriptors(launched, kind, dtype, tokens):
    config = CONFIGS[kind]
    x = make_rows(tokens, config.in_features, dtype=dtype)
    check_link(make_link(config, dtype), x, make_rows(tokens, config.out_features, dtype=dtype, seed=2))
    turned = [product.turned for product in launched]
    assert turned[:4] == [True, True, False, False]


@pytest.mark.parametrize("kind", ["no-residual-tanh", "equation-4"])
def test_same_bits_as_the_product_by_pointers(launched, monkeypatch, kind):
    """Same tiles, same depths in the same order, same epilogue: only the way to memory differs."""
    config = CONFIGS[kind]
    link, x, dy = make_link(config), make_rows(37, config.in_features), make_rows(37, config.out_features, seed=2)
    described = run(link, x, dy)
    assert launched
    monkeypatch.setattr(tiles, "choose", lambda *_, **__: POINTERS)
    plain = run(link, x, dy)
    assert torch.equal(described.y, plain.y)
    for name, grad in plain.grads.items():
        assert torch.equal(described.grads[name], grad), name


def test_rows_that_lie_apart_are_described(launched):
    wide = make_rows(37, 64)
    w1, w2 = make_rows(24, 32, seed=2), make_rows(32, 24, seed=3)
    apart = recursive_link(wide[:, 32:], w1, w2)
    assert launched[0].left.stride(0) == 64
    assert torch.equal(apart, recursive_link(wide[:, 32:].contiguous(), w1, w2))


def product(**change: torch.Tensor) -> Product:
    half = {"dtype": torch.float16}
    work = Product(PLAIN.value, torch.empty(6, 24, **half), torch.empty(32, 24, **half).t(), torch.empty(6, 32, **half))
    return work._replace(**change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"left": torch.empty(6, 32, dtype=torch.float16)[:, 8:]}, None),
        ({"left": torch.empty(6, 23, dtype=torch.float16)}, "left has rows 46 bytes apart"),
        ({"left": torch.empty(6, 32, dtype=torch.float16)[:, 4:28]}, "left does not begin at a multiple of 16 bytes"),
        ({"addend": torch.empty(1, 32, dtype=torch.float16).expand(6, 32)}, "addend has rows 0 bytes apart"),
        ({"right": torch.empty(24, 31, dtype=torch.float16)}, "right has rows 62 bytes apart"),
        ({"left": torch.empty(6, 24)}, "float32"),
    ],
    ids=str,
)
def test_what_the_copy_engine_refuses(change, reason):
    found = persistent.refusal(product(**change))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("capability", "shared_memory", "dtype", "reason"),
    [
        ((9, 0), 232448, torch.bfloat16, None),
        ((8, 0), 166912, torch.bfloat16, "sm_80 has no tensor descriptors"),
        ((12, 0), 101376, torch.bfloat16, "99 KB of shared memory"),
        ((9, 0), 232448, torch.float32, "float32"),
    ],
    ids=str,
)
def test_devices_without_a_copy_engine(monkeypatch, capability, shared_memory, dtype, reason):
    monkeypatch.setattr(tiles, "_capability", lambda _: capability)
    monkeypatch.setattr(plan, "_shared_memory", lambda _: shared_memory)
    found = tiles.no_copy_engine(torch.device("cpu"), dtype)
    assert found is None if reason is None else reason in found


def test_wide_tiles_where_they_fill_the_device():
    wide, narrow = (128, 256), (128, 128)

    def first(results, dtype=torch.bfloat16, **options):
        return tiles.matmul_configs(results, dtype, torch.device("cpu"), **options)[0][:2]

    assert first([(16384, 1536)]) == wide
    assert first([(1536, 1536)]) == narrow
    assert first([(16384, 1536)], wide=False) == narrow
    assert first([(1536, 2048), (1536, 1536), (1536, 2048)]) == wide  # 264 tiles: two full waves of 132
    assert first([(16384, 1536)], torch.float32) == (64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_uneven_rows_fall_to_the_product_by_pointers(launched, dtype):
    config = LinkConfig("outer", 41, 23, 37, "linear")
    check_link(make_link(config, dtype), make_rows(9, 41, dtype=dtype), make_rows(9, 37, dtype=dtype, seed=2))
    assert launched == []
