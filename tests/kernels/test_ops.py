"""What torch asks of a custom op: schema, fake and tracing, by ``opcheck``."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from recmas_kernels import LinkConfig, ops
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
