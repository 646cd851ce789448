"""`accelerate`: which layers of a model change, what stays right meanwhile, and the way back."""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recmas_kernels import FrozenLinear, accelerate, named_weights
from recmas_kernels.backends import cpu, native
from recmas_kernels.backends.cpu import module
from recmas_kernels.testing import LOW_PRECISION, make_rows
from tests.kernels.cpu_settings import AVAILABLE, instruction_set
from tests.kernels.frozen import budget, error, make_linear

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


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
    up, weights = model.up, [model.up.weight]  # a local variable may be somebody whom gc.freeze hides
    with accelerate(model) as done:
        assert set(done.packed) == {"up", "down"}
        assert done.left.keys() == {"learns", "hooked", "wrapped", "wide", "head"}
        assert done.left["head"] == "it shares its weight with table; few rows read it in place"
        assert model.head.weight is model.table.weight
        assert done.left["learns"] == "it learns"
        assert done.left["hooked"] == "it has hooks"
        assert "float64" in done.left["wide"]
        assert "head is left as it is: it shares its weight with table;" in str(done)
        assert weights[0].untyped_storage().nbytes() == weights[0].itemsize  # no weight exists twice
        assert type(model.up) is FrozenLinear
        assert model.up is up
        torch.testing.assert_close(model(x), before)
        assert list(model.state_dict()) == names
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert {key for key, _ in named_weights(model)} == {*names} - {"head.weight"}  # once per tied weight
        assert torch.equal(copy.deepcopy(model)(x), before)
    assert model.up is up
    assert type(up) is nn.Linear
    assert up.weight is weights[0]
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
        x = x[:1].detach().double()  # of which no kernel reads any
        assert torch.equal(model.double()[1](x), F.linear(x, model[1].weight, model[1].bias))
    assert type(model[1]) is nn.Linear


def test_a_layer_in_two_places_stays_one():
    linear = make_linear(8, 8)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    with accelerate(model):
        assert model[0] is model[2]
        assert type(model[0]) is FrozenLinear
    assert model[0] is model[2] is linear


def test_a_model_accelerated_twice_is_plain_after_the_second_close():
    model = nn.Sequential(make_linear(8, 8), FrozenLinear.from_linear(make_linear(8, 8)))
    x = make_rows(2, 8)
    expected = model(x)
    first, second = accelerate(model), accelerate(model)
    assert set(first.packed) == set(second.packed) == {"0", "1"}
    assert first.packed_bytes == second.packed_bytes > 0
    assert sum(weight.numel() for weight in model.parameters()) == 2 * 72
    first.close()
    first.close()
    assert model[0].packed() is not None
    torch.testing.assert_close(model(x), expected)
    second.close()
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is FrozenLinear  # it was one before
    assert model[1].packed() is not None
    torch.testing.assert_close(model(x), expected)


def test_a_weight_that_a_module_outside_holds_is_left_alone():
    model, outside = nn.Sequential(make_linear(8, 8), make_linear(8, 8)), nn.Linear(8, 8)
    outside.weight = model[0].weight
    x = make_rows(2, 8)
    expected = outside(x)
    with accelerate(model) as done:
        assert set(done.packed) == {"1"}
        assert done.left["0"].startswith("a module outside of the model holds its weight, too")
        assert torch.equal(outside(x), expected)


@pytest.mark.parametrize("holder", [nn.ParameterList, lambda held: types.SimpleNamespace(held=held)])
def test_a_weight_that_somebody_may_hold_whom_the_collector_does_not_see_is_left_alone(holder):
    model = nn.Sequential(make_linear(8, 8), make_linear(8, 8))
    held = holder([model[0].weight])
    gc.freeze()  # of a process that forks workers, say
    with accelerate(model) as done:
        assert set(done.packed) == {"1"}
        assert set(done.left) == {"0"}
        assert not any(value.isnan().any() for value in (held if isinstance(held, nn.Module) else held.held))


def test_a_shared_weight_that_is_replaced_parametrized_or_learns():
    def made() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 50)).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model[0].reset_parameters()
            model[1].reset_parameters()
        model[1].weight = model[0].weight
        return model

    def learns(model: nn.Sequential) -> None:
        model[1].bias.requires_grad_(True)

    def replaced(model: nn.Sequential) -> None:
        model[1].weight = nn.Parameter(make_rows(50, 24))

    def parametrized(model: nn.Sequential) -> None:
        nn.utils.parametrizations.weight_norm(model[1])

    x = make_rows(2, 24)
    for change in (learns, replaced, parametrized):
        plain, shared = made(), made()
        done = accelerate(shared)
        assert list(done.shared) == ["1"]
        for model in (plain, shared):
            change(model)
        torch.testing.assert_close(shared[1](x), plain[1](x))
        assert shared[1](x).requires_grad is plain[1](x).requires_grad
        done.close()
        torch.testing.assert_close(shared[1](x), plain[1](x))


def test_no_linear_layer_and_no_module():
    accelerate(nn.Sequential(nn.Tanh())).close()
    with pytest.raises(TypeError, match="model is a list, expected a"):
        accelerate([])


def test_without_kernels_a_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """Built without them, or on a processor that they do not know."""

    def load(label: str) -> None:
        raise ImportError("not built")

    model = nn.Sequential(make_linear(), nn.RMSNorm(53))
    x = make_rows(2, 37)
    expected = model(x)
    with monkeypatch.context() as changed, found_anew():
        changed.setattr(native, "load", load)
        done = accelerate(model)
        assert (list(done.left.values()), done.packed, done.norms) == ([cpu.unavailable()], {}, {})
        assert torch.equal(model(x), expected)


@contextmanager
def found_anew() -> Iterator[None]:
    """Within, and from the end on, whether there are kernels is found out once more."""
    for remembered in (module.kernels, cpu.unavailable):
        remembered.cache_clear()
    try:
        yield
    finally:
        for remembered in (module.kernels, cpu.unavailable):
            remembered.cache_clear()
