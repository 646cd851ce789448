"""`explain` names the backend that would serve a call, and refuses what the call refuses."""

from __future__ import annotations

import pytest
import torch

from recmas_kernels import explain, use_backend
from recmas_kernels.testing import configs, make_link, make_rows


def test_explain_names_the_backend_that_runs():
    link, x = make_link(configs()["outer"]), make_rows(3, 40)
    with use_backend("reference"):
        text = explain(link, x)
    assert "link_fwd_train cpu float32 3 x 40 -> 46 -> 23" in text
    assert "link_bwd" in text
    assert "reference: serves this call" in text
    with torch.no_grad():
        inference = explain(link, x)
    assert "link_fwd cpu" in inference
    assert "link_bwd" not in inference


def test_explain_refuses_what_the_call_refuses():
    link, x = make_link(configs()["inner"]), make_rows(2, 40)
    for wrong, error, message in [
        (x[:, 1:], ValueError, r"x has shape \(2, 39\), expected \[\.\.\., 40\]"),
        (x.long(), TypeError, "x has dtype torch.int64, expected a floating-point dtype"),
        (x.tolist(), TypeError, "x is a list, expected a tensor"),
    ]:
        for refusing in (explain, type(link).__call__):
            with pytest.raises(error, match=message):
                refusing(link, wrong)
    with pytest.raises(TypeError, match="link is a Linear, expected a RecursiveLink"):
        explain(torch.nn.Linear(40, 40), x)


def test_explain_and_the_call_agree_on_the_dtype():
    link = make_link(configs()["inner"], torch.float64)
    x = make_rows(2, 40, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert "link_fwd cpu float64" in explain(link, x)
        assert torch.equal(link(x), link(x).double())
        assert "link_fwd cpu bfloat16" in explain(link.float(), x.float())
