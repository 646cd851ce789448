"""Jacobians of random channels: those of autograd, and verdicts that follow from their norms."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import jacobians
from benchmarks.report.claims import FAILS, HOLDS
from benchmarks.report.evidence import links_keep_gradients, text_channels


def test_the_jacobian_of_a_text_channel_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch):
    kept = []
    real = jacobians.largest
    monkeypatch.setattr(jacobians, "largest", lambda a: kept.append(a) or real(a))
    norm = jacobians.text_norm(6, 0.5, 40, torch.Generator().manual_seed(1))
    made = torch.Generator().manual_seed(1)
    read, write = (torch.randn(40, 6, generator=made, dtype=torch.float64) / 6**0.5 for _ in range(2))
    h = torch.randn(6, generator=made, dtype=torch.float64)

    def entropy(scale: float) -> float:
        return float(torch.special.entr((write @ h * scale).softmax(0)).sum())

    scale = min((n / 1000 for n in range(1, 200_000)), key=lambda scale: abs(entropy(scale) - 0.5))
    exact = torch.autograd.functional.jacobian(lambda h: read.T @ (write @ h).softmax(0), scale * h)
    torch.testing.assert_close(kept[0], exact, rtol=1e-2, atol=1e-3)  # scale is known to a thousandth
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(exact, 2)), rel=1e-2)


def test_the_jacobian_of_a_link_is_that_of_autograd():
    norm, gain = jacobians.link_gains(8, torch.Generator().manual_seed(2))
    made = torch.Generator().manual_seed(2)
    first, second = ((torch.rand(8, 8, generator=made, dtype=torch.float64) * 2 - 1) / 8**0.5 for _ in range(2))
    h, v = torch.randn(2, 8, generator=made, dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(lambda h: h + second @ torch.nn.functional.gelu(first @ h), h)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(exact, 2)))
    assert gain == pytest.approx(float((exact @ v).norm() / v.norm()))


def test_a_record_is_written_and_judged(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(jacobians, "WIDTHS", (4, 8))
    monkeypatch.setattr(jacobians, "VOCABULARY", 30)
    monkeypatch.setattr(jacobians, "TEXT_DRAWS", 2)
    monkeypatch.setattr(jacobians, "LINK_DRAWS", 3)
    assert jacobians.main([str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(len(cell["norms"]), len(cell["gains"])) for cell in record["links"]] == [(3, 3)] * 2
    assert len(record["text"]) == 2 * len(jacobians.ENTROPIES)
    assert text_channels(record).verdict
    assert jacobians.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_verdicts_follow_from_how_norms_grow():
    def text(power: float) -> dict[str, list[dict[str, object]]]:
        """Norms of large entropies, of which the theorem says nothing, are another's."""
        norms = {entropy: 2 * entropy**power if entropy <= 0.3 else 1.0 for entropy in jacobians.ENTROPIES}
        return {
            "text": [{"d": d, "entropy": e, "norms": [norm, norm / 2]} for d in (4, 8) for e, norm in norms.items()]
        }

    def links(power: float) -> dict[str, list[dict[str, object]]]:
        cells = [(d, [1 + sign * d**power for sign in (-1.0, -0.5, 0.5, 1.0)]) for d in (4, 64)]
        return {"links": [{"d": d, "norms": norms, "gains": norms} for d, norms in cells]}

    assert text_channels(text(1.0)).verdict == HOLDS
    assert text_channels(text(1.5)).verdict == HOLDS
    assert text_channels(text(0.5)).verdict == FAILS
    assert text_channels(text(0.8)).verdict == FAILS
    assert links_keep_gradients(links(-0.5)).verdict == HOLDS
    assert links_keep_gradients(links(-0.3)).verdict == FAILS
