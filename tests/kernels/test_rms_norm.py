"""RMSNorms recognised inside models: which are, and what happens to one that is changed while it is served."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recmas_kernels import accelerate
from recmas_kernels.backends import cpu
from recmas_kernels.testing import LOW_PRECISION, make_rows
from tests.kernels.cpu_settings import AVAILABLE, instruction_set
from tests.kernels.frozen import error
from tests.kernels.rms_norms import Norm

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


class Mean(Norm):
    """Looks like an RMSNorm and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=-1, keepdim=True))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_norms_are_known_by_what_they_compute(isa: str, dtype: torch.dtype):
    offset = float((AVAILABLE.index(isa) + LOW_PRECISION.index(dtype)) % 2)
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
                found, expected = (torch.autograd.grad(y.sum(), x)[0] for y in (model(x), Norm.forward(model[0], x)))
                x.requires_grad_(False)
                assert torch.equal(found, expected)
            assert "forward" not in model[0].__dict__


class Gated(Norm):
    """As Mamba2 has it."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class Masked(Norm):
    """The rule of one feature is another."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y[..., :-1], torch.zeros_like(y[..., -1:])], dim=-1)


class Noisy(Norm):
    """Drops features while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Wide(Norm):
    """Its result is float32, whatever the rows are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@pytest.mark.parametrize("value", [None, 0.0, 1.0, -1.0])
@pytest.mark.parametrize("kind", [Mean, Gated, Masked])
def test_other_rules_are_not_recognised_whatever_the_weights(kind: type[Norm], value: float | None):
    norm = kind(24).eval()
    if value is not None:
        norm.weight.fill_(value)
    model = nn.Sequential(norm, nn.LayerNorm(24, bias=False), Norm(24).requires_grad_(True)).eval()
    model[1].requires_grad_(False)
    x, expected = make_rows(3, 24), norm(make_rows(3, 24))
    with accelerate(model) as done:
        assert not done.norms
        assert torch.equal(norm(x), expected)
        if kind is Gated:
            assert torch.equal(norm(x, x), kind.forward(norm, x, x))


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_offset_is_found_whatever_the_weights(value: float, offset: float):
    norm = Norm(24, offset)
    norm.weight.fill_(value)
    with accelerate(nn.Sequential(norm)) as done:
        assert done.norms
        norm.weight.copy_(make_rows(24, seed=7))
        x = make_rows(3, 24)
        torch.testing.assert_close(norm(x), Norm.forward(norm, x))


def _eps(norm: Norm) -> None:
    norm.eps = 0.5


def _offset(norm: Norm) -> None:
    norm.offset = 0.5


def _train(norm: Norm) -> None:
    norm.train()


def _cast(norm: Norm) -> None:
    norm.bfloat16()


def _weight(norm: Norm) -> None:
    norm.weight = nn.Parameter(make_rows(24, seed=8), requires_grad=False)


def _learn(norm: Norm) -> None:
    norm.requires_grad_(True)


def _parameters(norm: Norm) -> None:
    norm._parameters = {"weight": nn.Parameter(make_rows(24, seed=8), requires_grad=False)}


def _another(norm: Norm) -> None:
    norm.register_parameter("another", nn.Parameter(make_rows(24, seed=8), requires_grad=False))


@pytest.mark.parametrize("change", [_eps, _offset, _train, _cast, _weight, _learn, _parameters, _another])
@pytest.mark.parametrize("kind", [Norm, Noisy, Wide])
def test_a_norm_changed_while_it_is_served(kind: type[Norm], change: Callable[[Norm], None]):
    plain, norm = kind(24).eval(), kind(24).eval()
    with accelerate(nn.Sequential(norm)) as done:
        assert done.norms
        norm(make_rows(1, 24))
        found = []
        for each in (plain, norm):
            change(each)
            torch.manual_seed(0)
            found.append(each(make_rows(3, 24, dtype=each.weight.dtype)))
        torch.testing.assert_close(*found)
        assert found[0].requires_grad is found[1].requires_grad


def test_a_norm_changed_and_changed_back_is_served_again(monkeypatch: pytest.MonkeyPatch):
    norm, x, calls = Norm(24).eval(), make_rows(3, 24), []
    served = cpu.rms_norm
    monkeypatch.setattr(cpu, "rms_norm", lambda *given: calls.append(given) or served(*given))
    with accelerate(nn.Sequential(norm)):
        norm(x)
        _another(norm)
        norm(x)
        assert len(calls) == 1
        del norm.another
        norm(x)
        assert len(calls) == 2


class Divided(Norm):
    def unit(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) * self.weight


def test_a_method_patched_while_a_norm_is_served_is_what_runs(monkeypatch: pytest.MonkeyPatch):
    norm, x = Divided(24), make_rows(3, 24)
    with accelerate(nn.Sequential(norm)) as done:
        assert done.norms
        before = norm(x)
        monkeypatch.setattr(Divided, "unit", lambda self, x: x)
        assert torch.equal(norm(x), x * norm.weight)
        assert not torch.equal(norm(x), before)


def test_a_forward_that_somebody_set_stays():
    model = nn.Sequential(Norm(24), Norm(24))
    done = accelerate(model)
    served = model[0].forward
    model[0].forward = lambda x: served(x) * 2
    x = make_rows(3, 24)
    expected = Norm.forward(model[0], x) * 2
    torch.testing.assert_close(model[0](x), expected)
    del model[1].forward
    done.close()
    torch.testing.assert_close(model[0](x), expected)
    assert "forward" not in model[1].__dict__


def test_copies_and_pickles_read_their_own_weight_and_can_be_served_again():
    norm = Norm(24)
    x = make_rows(3, 24)
    done = accelerate(nn.Sequential(norm))
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        copied.weight.mul_(2)
        assert torch.equal(copied(x), Norm.forward(copied, x))
        with accelerate(nn.Sequential(copied)) as again:
            assert again.norms
            torch.testing.assert_close(copied(x), Norm.forward(copied, x))
    twice = accelerate(nn.Sequential(norm))
    assert twice.norms
    done.close()
    assert "forward" in norm.__dict__
    twice.close()
    assert "forward" not in norm.__dict__


def test_the_default_device_may_be_another():
    norm = Norm(24)
    with torch.device("meta"), accelerate(nn.Sequential(norm)) as done:
        assert list(done.norms) == ["0"]


def test_looking_at_norms_draws_no_random_number():
    state = torch.get_rng_state()
    accelerate(nn.Sequential(Noisy(24).train())).close()
    assert torch.equal(torch.get_rng_state(), state)
