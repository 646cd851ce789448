"""The least work of every op, against hand counts and torch's own flop counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import floors
from benchmarks.harness.floors import Work
from recmas_kernels import LinkConfig
from recmas_kernels.testing import configs, eager_twin, make_link, make_rows

BF16 = 2


@pytest.mark.parametrize("name", configs())
def test_counts_what_the_eager_module_computes(name: str) -> None:
    config = configs()[name]
    link, x = eager_twin(make_link(config), torch.float32), make_rows(7, config.in_features)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        link(x)
    assert floors.link_forward(config, 7, 4).flops == forward.get_total_flops()
    with FlopCounterMode(display=False) as training:
        link(x.requires_grad_()).backward(make_rows(7, config.out_features))
    assert floors.link_training(config, 7, 4).flops == training.get_total_flops()


@pytest.mark.parametrize("name", configs())
def test_counts_every_parameter(name: str) -> None:
    link = make_link(configs()[name])
    assert floors.link_parameters(link.config) == sum(p.numel() for p in link.parameters())


# Megabytes and gigaflops as derived by hand from the sizes, biases and norms left out.
@pytest.mark.parametrize(
    ("config", "tokens", "megabytes", "gigaflops"),
    [
        (LinkConfig("inner", 2048, 2048, 2048, "identity", norm=False, bias=False), 1, 16.8, 0.0168),
        (LinkConfig("inner", 2048, 2048, 2048, "identity", norm=False, bias=False), 4096, 50.3, 68.7),
        (LinkConfig("inner", 2048, 128, 2048, "identity", norm=False, bias=False), 16384, 135.3, 17.2),
        (LinkConfig("outer", 2048, 3072, 1536, "linear", norm=False, bias=False), 1536, 39.3, 43.5),
    ],
)
def test_link_against_hand_counts(config: LinkConfig, tokens: int, megabytes: float, gigaflops: float) -> None:
    work = floors.link_forward(config, tokens, BF16)
    assert work.bytes_min / 1e6 == pytest.approx(megabytes, rel=5e-3)
    assert work.flops / 1e9 == pytest.approx(gigaflops, rel=5e-3)


def test_other_ops_against_hand_counts() -> None:
    assert floors.alignment_training(16384, 2048, BF16).bytes_min / 1e6 == pytest.approx(201, rel=5e-3)
    step = floors.vocabulary_step(32, 2048, 151_936, BF16)
    assert step.weight_bytes / 1e6 == pytest.approx(622, rel=5e-3)
    assert step.flops == 2 * 32 * 2048 * 151_936


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work(flops=1000, bytes_min=10, weight_bytes=10), 10.0, "compute"),
        (Work(flops=10, bytes_min=1000, weight_bytes=900), 100.0, "weights"),
        (Work(flops=10, bytes_min=1000, weight_bytes=100), 100.0, "memory"),
    ],
)
def test_floor_is_the_slower_of_both(work: Work, seconds: float, bound: str) -> None:
    assert floors.floor(work, flops_per_second=100, bytes_per_second=10) == floors.Floor(seconds, bound)


def test_a_body_reads_its_weights_in_every_pass_and_attends_to_all_before() -> None:
    work = floors.body_pass(parameters=10, layers=3, features=2, fed=range(4, 6), batch=7, passes=2)
    assert work == Work(7 * (2 * 10 * 2 + 3 * 4 * 2 * (5 + 6)), 2 * 40, 2 * 40)
