"""``python -m benchmarks.harness.gpu.small_shapes``: all ops of all GPU backends, for compute-sanitizer.

Shapes are small, and sizes divide nothing, so that the last tile of everything is a part; each result is held to the
kernels' error budget.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch

from recmas_kernels import BackendUnavailableError, LinkConfig, alignment_loss, use_backend
from recmas_kernels.testing import check_budget, check_link, eager_twin, make_link, make_rows

CONFIGS = {
    "inner": LinkConfig("inner", 40, 40, 40, "identity"),
    "outer": LinkConfig("outer", 40, 46, 23, "linear"),
    "aligned": LinkConfig("outer", 64, 96, 48, "linear", norm=False),
}
TOKENS = (1, 33)
DTYPES = (torch.bfloat16, torch.float32)


def inference(config: LinkConfig, dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    link = make_link(config, dtype).to(device)
    x = make_rows(tokens, config.in_features, dtype=dtype).to(device)
    with torch.no_grad():
        truth = eager_twin(link, torch.float64)(x.double())
        check_budget("y", link(x), eager_twin(link, dtype)(x), truth, dtype)


def training(config: LinkConfig, dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    x = make_rows(tokens, config.in_features, dtype=dtype).to(device)
    check_link(make_link(config, dtype).to(device), x, make_rows(tokens, config.out_features, dtype=dtype).to(device))


def handoff(config: LinkConfig, dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    width = config.out_features
    rows, embeds = (
        make_rows(tokens, width, dtype=dtype).to(device),
        make_rows(tokens + 9, width, dtype=dtype).to(device),
    )
    slots = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(0))[:tokens].to(device)
    expected = embeds.index_copy(0, slots, rows)
    assert torch.equal(torch.ops.recmas.handoff_fwd(rows, embeds, slots), expected)
    taken, rest = torch.ops.recmas.handoff_bwd(expected, slots)
    assert torch.equal(taken, rows)
    assert torch.equal(rest, expected.index_fill(0, slots, 0.0))
    torch.ops.recmas.handoff_(rows, embeds, slots)
    assert torch.equal(embeds, expected)


def alignment(config: LinkConfig, dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    pred = make_rows(tokens, config.out_features, dtype=dtype).to(device).requires_grad_()
    table = make_rows(11, config.out_features, dtype=dtype, seed=2).to(device)
    ids = torch.arange(tokens, device=device) % 11
    mask = torch.arange(tokens, device=device) != 2

    def results(pred: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = alignment_loss(pred, table, token_ids=ids, mask=mask, mse_weight=0.1)
        return loss.detach(), torch.autograd.grad(loss, pred)[0]

    loss, grad = results(pred, table)
    with use_backend("reference"):
        exact = results(pred.detach().double().requires_grad_(), table.double())
        plain = results(pred, table)
    check_budget("loss", loss, plain[0], exact[0], dtype)
    check_budget("gradient", grad, plain[1], exact[1], dtype)


OPS: dict[str, Callable[[LinkConfig, torch.dtype, int, torch.device], None]] = {
    "inference": inference,
    "training": training,
    "handoff": handoff,
    "alignment": alignment,
}


def ways(backend: str) -> dict[str, AbstractContextManager[object]]:
    """By name, what makes ``backend`` serve a link in each way that it has; Triton's defaults would leave one out."""
    if backend != "triton":
        return {backend: nullcontext()}
    from recmas_kernels.backends.triton import plan

    def forced(name: str) -> AbstractContextManager[object]:
        def variant(link: plan.Link) -> str:
            return name if name in plan.candidates(link) else plan.LIBRARY

        return mock.patch.object(plan, "variant", variant)

    return {f"triton ({name})": forced(name) for name in (plan.LIBRARY, plan.SMALL)}


def run(backend: str, op: str, device: torch.device) -> tuple[int, str]:
    """How many calls of ``op`` ran, and why the last of those that were refused did not."""
    ran, reason = 0, ""
    for config in CONFIGS.values():
        for dtype in DTYPES:
            for tokens in TOKENS:
                try:
                    with use_backend(backend):
                        OPS[op](config, dtype, tokens, device)
                except BackendUnavailableError as error:
                    reason = str(error)
                else:
                    ran += 1
    return ran, reason


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.gpu.small_shapes", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"])
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    for backend in options.backends:
        for name, way in ways(backend).items():
            with way:
                for op in OPS:
                    ran, reason = run(backend, op, device)
                    print(f"{name} {op}: {ran} calls" + (f"; refused: {reason}" if reason else ""), flush=True)
                    if ran == 0 and op == "handoff":  # the one op that every backend has
                        print(f"error: backend {backend} serves nothing: {reason}", file=sys.stderr)
                        return 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
