"""The compiled alignment loss and handoff on every instruction set: any shape, layout and thread count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recmas_kernels import reference
from recmas_kernels.backends import cpu
from recmas_kernels.testing import LOW_PRECISION, make_rows, name_of
from tests.kernels.cpu_settings import AVAILABLE, LAYOUTS, guarded_allocations, instruction_set, laid_out, threads

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ANY_SHAPE = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # a case takes milliseconds
ISAS = st.sampled_from(AVAILABLE or ("baseline",))


@ANY_SHAPE
@given(
    tokens=st.integers(0, 300),
    features=st.integers(1, 300),
    dtype=st.sampled_from(LOW_PRECISION),
    gather=st.booleans(),
    masked=st.booleans(),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    isa=ISAS,
)
def test_alignment_of_any_shape(tokens, features, dtype, gather, masked, layouts, isa):
    generator = torch.Generator().manual_seed(tokens)
    pred = laid_out(make_rows(tokens, features, dtype=dtype), layouts[0])
    target = laid_out(make_rows(9 if gather else tokens, features, dtype=dtype, seed=2), layouts[1])
    token_ids = torch.randint(9, (tokens,), generator=generator) if gather else None
    mask = torch.rand(tokens, generator=generator) > 0.25 if masked else None
    arguments = (token_ids, mask, 0.75, 0.25, 1.5)
    with instruction_set(isa), guarded_allocations():
        loss, grad = cpu.alignment_fwd(pred, target, *arguments)
        grad = grad.clone()
    true_loss, true_grad = reference.alignment_fwd(pred.double(), target.double(), *arguments)
    assert grad.shape == pred.shape
    assert grad.dtype is dtype
    assert torch.isfinite(loss)
    # Sums of a row round as float32 sums of its length do. The gradient's two cosine terms, each of length 1 / |p|, may
    # cancel down to that; then it is rounded once to its dtype.
    rounding = (8 + features**0.5) * torch.finfo(torch.float32).eps
    assert abs(loss.double() - true_loss) <= rounding * max(1.0, true_loss.item())
    if tokens:
        kept = tokens if mask is None else max(1, int(mask.sum()))
        terms = 1 / pred.double().norm(dim=1).min() / kept + true_grad.abs().max()
        assert (grad - true_grad).abs().max() <= torch.finfo(dtype).eps * true_grad.abs().max() + rounding * terms


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_alignment_gives_the_same_bits_at_every_thread_count(isa, dtype):
    pred, table = make_rows(300, 123, dtype=dtype), make_rows(50, 123, dtype=dtype, seed=2)
    token_ids = torch.randint(50, (300,), generator=torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2, 3, 2):
        with instruction_set(isa), threads(count):
            results.append(cpu.alignment_fwd(pred, table, token_ids, None, 1.0, 0.1, 1.0))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@ANY_SHAPE
@given(
    table_rows=st.integers(0, 300),
    features=st.integers(0, 300),
    share=st.floats(0, 1),
    dtype=st.sampled_from([*LOW_PRECISION, torch.float64]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_handoff_of_any_shape(table_rows, features, share, dtype, layouts):
    slot_rows = torch.randperm(table_rows, generator=torch.Generator().manual_seed(1))[: int(share * table_rows)]
    rows = laid_out(make_rows(len(slot_rows), features, dtype=dtype), layouts[0])
    embeds = laid_out(make_rows(table_rows, features, dtype=dtype, seed=2), layouts[1])
    before = embeds.clone()
    assert torch.equal(cpu.handoff_fwd(rows, embeds, slot_rows), reference.handoff_fwd(rows, embeds, slot_rows))
    drows, dembeds = cpu.handoff_bwd(embeds, slot_rows)
    assert torch.equal(drows, before[slot_rows])
    assert torch.equal(dembeds, before.index_fill(0, slot_rows, 0))
    assert torch.equal(embeds, before)
