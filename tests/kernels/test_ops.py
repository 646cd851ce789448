"""What torch asks of a custom op: schema, fake and tracing, by ``opcheck``; and what a call goes through."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

from recmas_kernels import LinkConfig, ops, recursive_link
from recmas_kernels.testing import make_link, make_rows

LINK_FWD, LINK_FWD_TRAIN, LINK_BWD = (
    getattr(torch.ops.recmas, op).default for op in ("link_fwd", "link_fwd_train", "link_bwd")
)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
CONFIGS = {
    "inner": LinkConfig("inner", 8, 6, 8, "identity"),
    "outer": LinkConfig("outer", 8, 6, 5, "linear"),
    "bare": LinkConfig("outer", 8, 6, 5, "none", norm=False, bias=False),
}


def arguments(config: LinkConfig) -> tuple:
    """Everything of ``link_fwd_train`` in the order of its schema."""
    state = {name: parameter.detach() for name, parameter in make_link(config).named_parameters()}
    norms = ("pre_ln", "post_ln") if config.kind == "inner" else ("ln_source", "ln_target")
    names = [f"{layer}.{part}" for layer in ("proj1", "proj2", "residual_proj", *norms) for part in ("weight", "bias")]
    parameters = (state.get(name) for name in names)
    return (make_rows(3, config.in_features), *parameters, config.residual, "none", 1e-5, torch.float32)


@pytest.mark.parametrize("kind", CONFIGS)
def test_link_ops(kind):
    call = arguments(CONFIGS[kind])
    opcheck(LINK_FWD, (*call, False), test_utils=CHECKS)
    opcheck(LINK_FWD_TRAIN, call, test_utils=CHECKS)
    y, pre, z, stats = LINK_FWD_TRAIN(*call)
    for needs in ([True] * 11, [True] + [False] * 10):
        needs = [need and tensor is not None for need, tensor in zip(needs, call[:11], strict=True)]
        for kept in ((pre, z, stats), (None, None, None)):
            opcheck(LINK_BWD, (torch.ones_like(y), call[0], *kept, *call[1:], needs), test_utils=CHECKS)


def test_row_ops():
    rows, embeds, slots = make_rows(2, 8), make_rows(5, 8, seed=2), torch.tensor([3, 0])
    opcheck(ops.handoff_fwd, (rows, embeds, slots), test_utils=CHECKS)
    opcheck(ops.handoff_, (rows, embeds, slots), test_utils=CHECKS)
    opcheck(ops.handoff_bwd, (embeds, slots), test_utils=CHECKS)
    for token_ids, target in ((None, make_rows(5, 8)), (torch.tensor([0, 1, 1, 2, 3]), make_rows(9, 8))):
        call = (embeds, target, token_ids, torch.ones(5), 1.0, 0.1, 1.0)
        opcheck(ops.alignment_fwd, call, test_utils=CHECKS)


def learning(config: LinkConfig) -> tuple:
    return tuple(
        value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value for value in arguments(config)
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_plain_tensors_are_dispatched_once(kind, monkeypatch):
    """The second way through the dispatcher would take as long as the kernel of a small link."""
    call = learning(CONFIGS[kind])
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert LINK_FWD(*call, False).fake_mode is fake  # what comes between is served
    again = []
    redispatch = torch._ops.OpOverload.redispatch
    monkeypatch.setattr(torch._ops.OpOverload, "redispatch", lambda *args: again.append(1) or redispatch(*args))
    y = LINK_FWD(*call, False)
    y.sum().backward()
    with torch.no_grad():
        assert torch.equal(LINK_FWD(*call, False), y)
    assert not again
    negated = LINK_FWD(torch._neg_view(-call[0]), *call[1:], False)
    assert again
    assert torch.equal(negated, y)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_have_no_rule_for_the_ops():
    """What differentiates is refused; what batches runs them one by one."""
    x, *rest = learning(CONFIGS["inner"])
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: LINK_FWD(x, *rest, False).sum())(x)
    with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        torch.func.jvp(lambda x: LINK_FWD(x, *rest, False), (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            LINK_FWD(forward_ad.make_dual(x.detach(), x.detach()), *rest, False)
        assert LINK_FWD(x, *rest, False).requires_grad
    many = torch.stack([x, 2 * x])
    with torch.no_grad():
        batched = torch.func.vmap(lambda x: LINK_FWD(x, *rest, False))(many)
        assert torch.equal(batched, torch.stack([LINK_FWD(x, *rest, False) for x in many]))


def test_tensors_that_a_transform_left_behind():
    left: list[torch.Tensor] = []
    torch.func.grad(lambda x: (left.append(x * 1), x.sum())[1])(make_rows(3, 8))
    _, *rest = learning(CONFIGS["inner"])
    for run in (lambda x: LINK_FWD(x, *rest, False), lambda x: recursive_link(x, rest[0], rest[2])):
        y, expected = run(left[0]), run(make_rows(3, 8))
        assert torch.equal(y, expected)
        found, same = (torch.autograd.grad(value.sum(), (rest[0], rest[2])) for value in (y, expected))
        assert all(map(torch.equal, found, same))
