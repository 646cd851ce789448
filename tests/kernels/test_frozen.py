"""Frozen linear layers: results, gradients, modes of torch, the way back to plain weights, and bad input."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels import FrozenLinear, accelerate, explain, use_backend
from recmas_kernels.accelerate import named_weights
from recmas_kernels.backends import cpu
from recmas_kernels.frozen import frozen_linear, pack
from recmas_kernels.testing import LOW_PRECISION, make_rows
from tests.kernels.cpu_settings import AVAILABLE, guarded_allocations, instruction_set, threads

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
SIZES = [(37, 53), (96, 17), (64, 200), (1, 1)]


def make_linear(in_features: int = 37, out_features: int = 53, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Frozen, of values that need all bits of the dtype."""
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max())


def budget(dtype: torch.dtype, terms: int) -> float:
    """One rounding of the result, and float32 sums of so many terms of random sign."""
    return torch.finfo(dtype).eps + 16 * (terms + 16) ** 0.5 * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_and_gradients_match_float64(isa: str, dtype: torch.dtype, sizes: tuple[int, int]):
    linear = make_linear(*sizes, dtype=dtype)
    exact_weight, exact_bias = linear.weight.double(), linear.bias.double()
    with instruction_set(isa), guarded_allocations():
        frozen = FrozenLinear.from_linear(linear)
        for tokens in (1, 2, 5, 9, 130):
            x = make_rows(tokens, sizes[0], dtype=dtype).requires_grad_()
            y = frozen(x)
            dy = make_rows(tokens, sizes[1], dtype=dtype, seed=2)
            (dx,) = torch.autograd.grad(y, x, dy)
            exact = F.linear(x.detach().double(), exact_weight, exact_bias)
            assert y.dtype is dtype
            assert error(y.detach(), exact) <= budget(dtype, sizes[0])
            assert error(dx, dy.double() @ exact_weight) <= budget(dtype, sizes[1])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_float32_weight_of_16_bit_values_is_kept_in_16_bits(stored: torch.dtype):
    linear = make_linear(96, 50)
    linear.weight.data = linear.weight.data.to(stored).float()
    panels = pack(linear.weight)
    assert panels.stored is stored
    assert torch.equal(panels.weight(), linear.weight)
    x = make_rows(3, 96)
    assert error(frozen_linear(x, panels), F.linear(x.double(), linear.weight.double())) <= budget(torch.float32, 96)
    linear.weight.data[3, 5] = 1 + 2**-20
    assert pack(linear.weight).stored is torch.float32


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_every_bit_comes_back(dtype: torch.dtype):
    bits = torch.arange(2**16, dtype=torch.int32).view(256, 256)
    values = bits.to(torch.int16).view(dtype) if dtype.itemsize == 2 else (bits * 65536 + 7).view(dtype)
    weight = torch.where(values.isnan(), 1.0, values).contiguous()
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(pack(weight).weight().view(kind), weight.view(kind))


def test_threads_change_no_bit():
    frozen = FrozenLinear.from_linear(make_linear(512, 300))
    for tokens in (1, 4, 40):
        x = make_rows(tokens, 512).requires_grad_()
        found = []
        for count in (1, 3):
            with threads(count):
                y = frozen(x)
                found.append((y, *torch.autograd.grad(y.sum(), x)))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rows_of_any_shape_and_stride():
    linear = make_linear()
    frozen = FrozenLinear.from_linear(linear)
    rows = make_rows(2, 3, 2 * 37)
    for x in (rows[0, 0, :37], rows[:, :, :37], rows[0, :, :37], rows[..., ::2], rows[:0, :, :37], rows[:1, 1:2, 37:]):
        y = frozen(x)
        torch.testing.assert_close(y, linear(x))
        assert y.shape == linear(x).shape
        assert y.is_contiguous()


def test_transforms_and_second_derivatives():
    linear = make_linear()
    frozen = FrozenLinear.from_linear(linear)
    x = make_rows(4, 37)
    torch.testing.assert_close(torch.func.vmap(frozen)(x), linear(x))
    torch.testing.assert_close(torch.func.jacrev(frozen)(x[0]), linear.weight)
    tangent = make_rows(4, 37, seed=3)
    torch.testing.assert_close(torch.func.jvp(frozen, (x,), (tangent,))[1], tangent @ linear.weight.T)
    x.requires_grad_()
    (first,) = torch.autograd.grad(frozen(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), x)[0])


def test_ops_pass_opcheck():
    panels = pack(make_linear().weight)
    x = make_rows(3, 37).requires_grad_()
    torch.library.opcheck(torch.ops.recmas.frozen_linear.default, (x, panels.data, None, 53, torch.float32))
    dy = make_rows(3, 53).requires_grad_()
    torch.library.opcheck(torch.ops.recmas.frozen_linear_bwd.default, (dy, panels.data, 37, torch.float32))


def test_compiled_and_exported(fresh_compiler: None):
    linear = make_linear()
    model = nn.Sequential(FrozenLinear.from_linear(linear), nn.Tanh())
    x = make_rows(3, 37).requires_grad_()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x).tanh())
    dy = make_rows(3, 53)
    torch.testing.assert_close(*(torch.autograd.grad(run(x), x, dy)[0] for run in (compiled, model)))
    exported = torch.export.export(model, (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), linear(x).tanh())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_autocast_gives_autocasts_dtype(stored: torch.dtype):
    linear = make_linear()
    linear.weight.data = linear.weight.data.to(stored).float()
    frozen = FrozenLinear.from_linear(linear)
    x = make_rows(5, 37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = frozen(x), linear(x)
    assert y.dtype is expected.dtype is torch.bfloat16
    assert error(y, linear.double()(x.double())) <= 4 * torch.finfo(torch.bfloat16).eps


def test_plain_torch_on_request():
    linear = make_linear()
    frozen = FrozenLinear.from_linear(linear)
    x = make_rows(3, 37)
    with use_backend("reference"):
        assert torch.equal(frozen(x), linear(x))


def test_state_moves_casts_copies_and_pickles():
    linear = make_linear()
    frozen = FrozenLinear.from_linear(linear)
    assert torch.equal(frozen.state_dict()["weight"], linear.weight)
    assert torch.equal(frozen.weight, linear.weight)
    frozen.load_state_dict(make_linear().double().float().state_dict())
    assert frozen.panels is not None
    other = nn.Linear(37, 53)
    frozen.load_state_dict(other.state_dict())
    assert torch.equal(frozen.state_dict()["weight"], other.weight)
    x = make_rows(2, 37)
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), _saved(frozen)):
        assert copied.panels is None
        torch.testing.assert_close(copied(x), other(x))
        assert frozen.panels is not None
    half = frozen.to(torch.bfloat16)
    assert half.panels is not None
    assert half.panels.dtype is half.weight.dtype is torch.bfloat16
    assert frozen.double().panels is None
    assert frozen.to("meta").weight.device.type == "meta"


def _saved(frozen: FrozenLinear) -> FrozenLinear:
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_what_does_not_fit_is_one_line():
    frozen = FrozenLinear.from_linear(make_linear())
    for x, kind, message in [
        (make_rows(2, 36), ValueError, r"x has shape \(2, 36\), expected \[\.\.\., 37\]"),
        (make_rows(2, 37, dtype=torch.bfloat16), ValueError, "x has dtype torch.bfloat16 and the frozen weight has"),
        (torch.zeros(2, 37, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
        ([1.0], TypeError, "x is a list"),
        (torch.tensor(1.0), ValueError, "x has no dimension"),
        (torch.zeros(2, 37, device="meta"), ValueError, "x is on meta"),
    ]:
        with pytest.raises(kind, match=message):
            frozen(x)
    with pytest.raises(ValueError, match="it learns"):
        FrozenLinear.from_linear(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"it is a .*Bilinear"):
        FrozenLinear.from_linear(nn.Bilinear(3, 3, 3))
    with pytest.raises(ValueError, match="the kernels have no float64"):
        pack(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="panels has another shape"):
        torch.ops.recmas.frozen_linear(make_rows(1, 37), frozen.panels.data[:-1], None, 53, torch.float32)


def test_a_write_into_a_packed_weight_is_found(monkeypatch: pytest.MonkeyPatch):
    frozen = FrozenLinear.from_linear(make_linear())
    monkeypatch.setenv("RECMAS_CHECK", "1")
    weight = frozen.weight
    frozen(make_rows(1, 37))
    weight.data.add_(1)
    with pytest.raises(RuntimeError, match="weight was written while it is packed"):
        frozen(make_rows(1, 37))


class Block(nn.Module):
    """Every kind of linear layer that stays, beside two that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.up = nn.Linear(24, 48, bias=False)
        self.down = nn.Linear(48, 24)
        self.learns = nn.Linear(24, 24)
        self.hooked = nn.Linear(24, 24)
        self.wrapped = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
        self.wide = nn.Linear(24, 24, dtype=torch.float64)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.table.weight
        self.requires_grad_(False)
        self.learns.requires_grad_(True)
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.silu(self.up(x)))
        return self.head(self.wrapped(self.hooked(self.learns(x))))


def test_accelerate_packs_what_it_can_and_says_why_not():
    torch.manual_seed(0)
    model = Block()
    x = make_rows(5, 24)
    before, state, names = model(x), {k: v.clone() for k, v in model.state_dict().items()}, list(model.state_dict())
    up, weight = model.up, model.up.weight
    with accelerate(model) as done:
        assert set(done.packed) == {"up", "down"}
        assert done.left.keys() == {"learns", "hooked", "wrapped", "wide", "head"}
        assert done.left["head"] == "it shares its weight with table; few rows read it in place"
        assert model.head.weight is model.table.weight
        assert done.left["learns"] == "it learns"
        assert done.left["hooked"] == "it has hooks"
        assert "float64" in done.left["wide"]
        assert "head is left as it is: it shares its weight with table;" in str(done)
        assert weight.numel() == 0  # no weight exists twice
        assert type(model.up) is FrozenLinear
        assert model.up is up
        torch.testing.assert_close(model(x), before)
        assert list(model.state_dict()) == names
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert {key for key, _ in named_weights(model)} == {*names} - {"head.weight"}  # once per tied weight
        assert torch.equal(copy.deepcopy(model)(x), before)
    assert model.up is up
    assert type(up) is nn.Linear
    assert up.weight is weight
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_was_loaded_or_cast_meanwhile_stays_after_close():
    model, other = nn.Sequential(make_linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    with accelerate(model):
        model.load_state_dict(other.state_dict())
        model.to(torch.bfloat16)
    assert torch.equal(model[0].weight, other[0].weight.bfloat16())
    assert torch.equal(model[0].bias, other[0].bias.bfloat16())


def test_gradients_reach_what_learns_before_a_packed_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), make_linear(16, 16), nn.Tanh(), make_linear(16, 3))
    x = make_rows(7, 16)
    plain = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    with accelerate(model) as done:
        assert set(done.packed) == {"2", "4"}
        packed = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    torch.testing.assert_close(packed, plain)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("features", [24, 37, 64])
def test_a_shared_weight_is_read_in_place_by_few_rows(isa: str, dtype: torch.dtype, features: int):
    model = nn.Sequential(nn.Embedding(50, features), nn.Linear(features, 50)).to(dtype).requires_grad_(False)
    model[1].weight = model[0].weight
    with instruction_set(isa), accelerate(model) as done:
        assert list(done.shared) == ["1"]
        for tokens in (1, 3, 16, 17):
            x = make_rows(tokens, 1, features, dtype=dtype)
            exact = F.linear(x.double(), model[1].weight.double(), model[1].bias.double())
            assert error(model[1](x), exact) <= budget(dtype, features)
            model[0].weight[3, 1] = tokens  # nothing is kept of it
        x.requires_grad_()
        (dx,) = torch.autograd.grad(model[1](x).sum(), x)
        torch.testing.assert_close(dx[0, 0], model[1].weight.sum(dim=0))
        assert torch.equal(copy.deepcopy(model)[1](x.detach()), model[1](x.detach()))
    assert type(model[1]) is nn.Linear


def test_a_layer_in_two_places_stays_one():
    linear = make_linear(8, 8)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    with accelerate(model):
        assert model[0] is model[2]
        assert type(model[0]) is FrozenLinear
    assert model[0] is model[2] is linear


def test_explain_says_who_serves():
    frozen = FrozenLinear.from_linear(make_linear())
    assert "cpu: serves this call" in explain(frozen, make_rows(2, 37))
    frozen.unpack()
    assert "plain torch" in explain(frozen, make_rows(2, 37))


class Norm(nn.Module):
    """As most models have it; ``offset`` 1 is Gemma's."""

    def __init__(self, features: int, offset: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(make_rows(features, seed=5), requires_grad=False)
        self.offset, self.eps = offset, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return ((self.offset + self.weight.float()) * unit).to(x.dtype)


class Mean(Norm):
    """Looks like an RMSNorm and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=-1, keepdim=True))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_known_by_what_they_compute(isa: str, dtype: torch.dtype, offset: float):
    with instruction_set(isa):
        for features in (1, 24, 64, 200):
            model = nn.Sequential(Norm(features, offset)).to(dtype)
            x = make_rows(3, 2, features, dtype=dtype)
            weight, wide = model[0].weight.double(), x.double()
            exact = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6) * (offset + weight)
            with accelerate(model) as done:
                assert list(done.norms) == ["0"]
                assert error(model(x), exact) <= 4 * torch.finfo(dtype).eps
                assert (
                    error(model(x[:, :1].transpose(0, 1)), exact[:, :1].transpose(0, 1)) <= 4 * torch.finfo(dtype).eps
                )
                copied = copy.deepcopy(model)
                copied[0].weight.mul_(2)
                assert not torch.equal(copied(x), model(x))  # a copy reads its own weight
                x.requires_grad_()
                (dx,) = torch.autograd.grad(model(x).sum(), x)
                x.requires_grad_(False)
                assert dx.shape == x.shape
            assert "forward" not in model[0].__dict__


def test_other_modules_keep_their_forward():
    model = nn.Sequential(Mean(24), nn.LayerNorm(24, bias=False), Norm(24).requires_grad_(True)).eval()
    model[1].requires_grad_(False)
    assert not accelerate(model).norms
