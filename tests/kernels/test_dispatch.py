"""Which backend serves a call, and the errors of asking for one that cannot."""

from __future__ import annotations

import pytest
import torch

from recmas_kernels import BackendUnavailableError, backends, explain, recursive_link, use_backend
from tests.kernels.helpers import configs, make_link, make_rows

CALL = backends.Call("link_fwd", "cpu", torch.float32, 4, 8, 8, 8, training=False)


def test_a_named_backend_never_falls_back():
    link, x = make_link(configs()["inner"]), make_rows(2, 40)
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match="does not serve cpu tensors"):
        link(x)
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match="float64"):
        link.double()(x.double())


def test_an_unknown_backend_is_named(monkeypatch):
    with (
        pytest.raises(ValueError, match="unknown backend 'cudnn': expected one of auto, reference"),
        use_backend("cudnn"),
    ):
        pass
    monkeypatch.setenv("RECMAS_BACKEND", "turbo")
    with pytest.raises(ValueError, match="unknown backend 'turbo'"):
        make_link(configs()["inner"])(make_rows(2, 40))


def test_the_environment_chooses_and_the_context_overrides(monkeypatch):
    monkeypatch.setenv("RECMAS_BACKEND", "reference")
    assert backends.choose("link_fwd", CALL).__name__ == "recmas_kernels.reference"
    with use_backend("auto"):
        assert backends.requested() == "auto"
    assert backends.requested() == "reference"


def test_auto_serves_float64_and_unknown_devices_by_the_reference():
    for call in (CALL._replace(dtype=torch.float64), CALL._replace(device="meta")):
        assert backends.choose("link_fwd", call).__name__ == "recmas_kernels.reference"


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


def test_a_block_of_another_thread_may_end_first():
    first, second = use_backend("reference"), use_backend("auto")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.requested() == "auto"
    second.__exit__(None, None, None)


VALID = {"x": (2, 8), "w1": (6, 8), "w2": (8, 6)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7)}, r"x has shape \(2, 7\), expected \[\.\.\., 8\]"),
        ({"w2": torch.zeros(8, 5)}, r"w2 has shape \(8, 5\), expected \(8, 6\)"),
        ({"w1": torch.zeros(6)}, "w1 and w2 must have two dimensions"),
        ({"b1": torch.zeros(8)}, r"b1 has shape \(8,\), expected \(6,\)"),
        ({"b2": torch.zeros(6)}, "b2 has shape"),
        ({"norm_in": (torch.zeros(6), None)}, "norm_in weight has shape"),
        ({"norm_out": (torch.zeros(8), torch.zeros(6))}, "norm_out bias has shape"),
        ({"norm_in": (None, torch.zeros(8))}, "norm_in has no weight"),
        ({"residual": "gated"}, "residual is 'gated', expected one of identity, linear, none"),
        ({"residual": "linear"}, "w3 is missing with residual='linear'"),
        ({"w3": torch.zeros(8, 8)}, "w3 is given with residual='identity'"),
        ({"b3": torch.zeros(8)}, "b3 is given without w3"),
        ({"w2": torch.zeros(5, 6)}, "needs in_features == out_features, got 8 and 5"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"x": torch.zeros(2, 8, dtype=torch.bfloat16)}, "x has dtype torch.bfloat16 and w1 has torch.float32"),
        ({"w1": torch.zeros(6, 8, device="meta")}, "x is on cpu and w1 is on meta"),
    ],
)
def test_bad_input_is_named_before_any_kernel_runs(change, message):
    call = {name: torch.zeros(shape) for name, shape in VALID.items()}
    with pytest.raises(ValueError, match=message):
        recursive_link(**{**call, **change})


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="x is a list, expected a tensor"):
        recursive_link([[0.0] * 8], torch.zeros(6, 8), torch.zeros(8, 6))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        recursive_link(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(6, 8), torch.zeros(8, 6))
