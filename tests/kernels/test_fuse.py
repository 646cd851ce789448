"""``fuse`` swaps eager links for fused ones: shared parameters, equal results, clear refusals."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recmas_kernels import FusedRecursiveLink, RecursiveLink, fuse
from recmas_kernels.testing import check_budget, make_rows


class ForeignInner(nn.Module):
    """A link as other code writes one: the released form, known by its adapter_type and parameter names."""

    def __init__(self, features: int, adapter_type: str | None = "ln_res_adapter", gain: float = 1.0) -> None:
        super().__init__()
        self.proj1, self.proj2 = nn.Linear(features, features), nn.Linear(features, features)
        self.pre_ln, self.post_ln = nn.LayerNorm(features), nn.LayerNorm(features)
        self.activation = nn.GELU()
        self.gain = gain
        if adapter_type is not None:
            self.adapter_type = adapter_type

    def forward(self, x):
        return self.post_ln(x + self.gain * self.proj2(self.activation(self.proj1(self.pre_ln(x)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.foreign = ForeignInner(8)
        self.ours = RecursiveLink.outer(8, 5)
        self.links = nn.ModuleDict({"shared": self.ours, "inner": RecursiveLink.inner(8)})

    def forward(self, x):
        return self.ours(self.links["inner"](self.foreign(self.body(x))))


def test_only_modules_are_fused():
    with pytest.raises(TypeError, match=r"module is a list, expected a torch.nn.Module"):
        fuse([RecursiveLink.inner(8)])


def test_links_are_replaced_and_share_their_parameters():
    torch.manual_seed(0)
    model = Model()
    x = make_rows(64, 8)
    eager, names = model(x).detach(), list(model.state_dict())
    truth = copy.deepcopy(model).double()(x.double())
    parameters = dict(model.named_parameters())
    assert fuse(model) is model
    assert isinstance(model.foreign, FusedRecursiveLink)
    assert isinstance(model.ours, FusedRecursiveLink)
    assert model.links["shared"] is model.ours
    assert list(model.state_dict()) == names
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    check_budget("y", model(x), eager, truth, torch.float32)


def test_both_names_of_a_link_are_replaced():
    model = nn.Module()
    model.first = ForeignInner(8)
    model.second = model.first
    fuse(model)
    assert isinstance(model.second, FusedRecursiveLink)
    assert model.second is model.first


def test_the_order_of_the_parameters_stays():
    class NormsFirst(ForeignInner):
        def __init__(self) -> None:
            super().__init__(8)
            for name in ("proj1", "proj2"):
                self._modules[name] = self._modules.pop(name)

    link = NormsFirst()
    names = [name for name, _ in link.named_parameters()]
    assert names[0] == "pre_ln.weight"
    assert [name for name, _ in fuse(link).named_parameters()] == names


def test_a_link_at_the_root_is_replaced_too():
    for link in (RecursiveLink.inner(8), ForeignInner(8)):
        fused = fuse(link.eval())
        assert isinstance(fused, FusedRecursiveLink)
        assert not fused.training
        assert fuse(fused) is fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    link = ForeignInner(24).to(dtype)
    assert isinstance(fuse(link), FusedRecursiveLink)


def test_what_is_no_link_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    children = list(model)
    assert list(fuse(model)) == children


def test_an_ambiguous_link_is_an_error():
    with pytest.raises(ValueError, match="no adapter_type, which names its residual"):
        fuse(nn.Sequential(ForeignInner(8, adapter_type=None)))


def test_an_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="0: unknown adapter_type 'gated'"):
        fuse(nn.Sequential(ForeignInner(8, adapter_type="gated")))
    with pytest.raises(ValueError, match="'outer_ln_adapter' needs ln_source and ln_target"):
        fuse(ForeignInner(8, adapter_type="outer_ln_adapter"))


def test_a_link_that_computes_something_else_is_an_error():
    with pytest.raises(ValueError, match="0 does not compute what its type and parameters say"):
        fuse(nn.Sequential(ForeignInner(8, gain=0.5)))


@pytest.mark.parametrize("make", [lambda: ForeignInner(8), lambda: RecursiveLink.inner(8)])
def test_the_epsilon_of_the_norms_counts(make):
    torch.manual_seed(0)
    link, x = make(), 0.1 * make_rows(64, 8)
    link.pre_ln.eps = link.post_ln.eps = 0.1
    fused = fuse(link)
    assert fused.config.eps == 0.1
    check_budget("y", fused(x), link(x), copy.deepcopy(link).double()(x.double()), torch.float32)
    assert FusedRecursiveLink.from_upstream(ForeignInner(8)).config.eps == 1e-5
    link.pre_ln.eps = 0.2
    with pytest.raises(ValueError, match="different eps: 0.1 and 0.2"):
        fuse(link)


def test_another_activation_is_found_out():
    link = ForeignInner(64)
    link.activation = nn.GELU(approximate="tanh")
    with torch.no_grad():
        link.proj2.weight.mul_(10)
    with pytest.raises(ValueError, match="does not compute"):
        fuse(link)


class Wrapped(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def test_wrapped_and_hooked_links_are_left_alone_and_reported():
    wrapped, hooked, extended = ForeignInner(8), ForeignInner(8), ForeignInner(8)
    wrapped.proj1 = Wrapped(8, 8)
    hooked.proj2.register_forward_hook(lambda module, args, out: out + 1)
    extended.lora = nn.Linear(8, 8)
    for link, reason in ((wrapped, "proj1 is a .*Wrapped"), (hooked, "proj2 has hooks"), (extended, "lora")):
        with pytest.warns(UserWarning, match=reason):
            assert fuse(link) is link


class Subclass(RecursiveLink):
    def forward(self, x):
        return 2 * super().forward(x)


class Gated(ForeignInner):
    def __init__(self) -> None:
        super().__init__(8)
        self.gate = nn.Parameter(torch.zeros(()))


class Dropped(ForeignInner):
    """Drops values in training, by a module or by a function."""

    def __init__(self, module: bool) -> None:
        super().__init__(8)
        self.dropout = nn.Dropout(0.5 if module else 0.0)
        self.rate = 0.0 if module else 0.5

    def forward(self, x):
        return super().forward(self.dropout(F.dropout(x, self.rate, self.training)))


def with_buffer():
    link = RecursiveLink.inner(8)
    link.register_buffer("scale", torch.ones(8))
    return link


def with_hook(register):
    link = RecursiveLink.inner(8)
    getattr(link, register)(lambda *args: None)
    return link


def with_forward():
    link = RecursiveLink.inner(8)
    link.forward = lambda x: 0 * x
    return link


CARRYING = [
    (lambda: Subclass.inner(8), "it is a .*Subclass"),
    (Gated, "it has a parameter gate of its own"),
    (with_buffer, "it has a buffer scale of its own"),
    (lambda: Dropped(module=True), "dropout drops values in training"),
    (lambda: with_hook("register_forward_pre_hook"), "it has hooks"),
    (lambda: with_hook("register_state_dict_post_hook"), "it has hooks"),
    (lambda: with_hook("register_load_state_dict_post_hook"), "it has hooks"),
    (with_forward, "it has a forward of its own"),
]


@pytest.mark.parametrize(("make", "reason"), CARRYING, ids=[reason for _, reason in CARRYING])
@pytest.mark.parametrize("training", [False, True])
def test_a_link_that_carries_more_is_left_alone(make, reason, training):
    link = make().train(training)
    model = nn.Sequential(link)
    with pytest.warns(UserWarning, match=f"fuse: 0 is left as it is: {reason}"):
        assert fuse(model)[0] is link


def test_dropout_in_a_function_is_found_in_either_mode():
    for training in (False, True):
        link = Dropped(module=False).train(training)
        with pytest.raises(ValueError, match="does not compute"):
            fuse(link)
        assert all(part.training == training for part in link.modules())


def test_plain_attributes_move_along():
    link = RecursiveLink.inner(8)
    link.role = "planner"
    assert fuse(link).role == "planner"
    link.compile(backend="eager")
    assert fuse(link)._compiled_call_impl is None  # else it would call the link that it replaces


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device):
    link = RecursiveLink.inner(8)
    with torch.device(device):
        fused = fuse(link)
    assert isinstance(fused, FusedRecursiveLink)
    assert fused.proj1.weight is link.proj1.weight


def test_nothing_is_reported_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(Model())
