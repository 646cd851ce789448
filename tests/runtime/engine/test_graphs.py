"""Captured steps, on devices that are not there: what is recorded, replayed, counted, and restored after a failure."""

from __future__ import annotations

import threading
import warnings
from unittest import mock

import pytest
import torch

from recmas.agents import token_steps
from recmas.agents.agent import Agent
from recmas.engine import step_graph, stepper
from recmas.engine.fixed_shapes import bucket
from recmas.engine.messages import Prompt
from recmas.engine.stepper import AT_ONCE, SPARE, Stepper
from tests.runtime.fake_graphs import FakeGraphs
from tests.runtime.tiny import FAMILIES, prompts, tiny_agent, tiny_link

SECOND = "meta:1"
LENGTHS = (9, 3, 7)
STEPS = 6
USED_AGAIN = "a graph is captured when its bucket is used again"
FEW = [family for family in FAMILIES if family in ("llama", "gemma3_text", "qwen3_5_text")]


@pytest.fixture
def fake(monkeypatch):
    with FakeGraphs(monkeypatch) as devices, torch.no_grad():
        yield devices


def placed(family: str = "llama", device: str = SECOND, **options) -> tuple[Agent, torch.nn.Module]:
    agent = tiny_agent(family)
    link = tiny_link(agent).to(device)
    agent.to(device)
    agent.stepper = Stepper(**options)
    return agent, link


def on_host(family: str = "llama") -> Agent:
    """Whose tokens those of the fake device are to be."""
    return tiny_agent(family)


def hosted(prompt: Prompt) -> Prompt:
    return Prompt(prompt.embeds.cpu(), prompt.mask.cpu())


def batch(agent: Agent, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Prompt:
    made, _ = prompts(tiny_agent("llama" if agent.name == "agent" else agent.name), lengths, seed)
    return Prompt(agent.embed(tokens(lengths, seed).to(agent.device)), made.mask.to(agent.device))


def tokens(lengths: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 320, (len(lengths), max(lengths)), generator=generator)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-4, atol=1e-5)


def test_the_fake_shows_what_a_shared_capture_stream_does(fake):
    """Captured without a stream: right on the device that came first, and nothing at all on the other."""
    for device, operations in (("meta:0", 1), (SECOND, 0)):
        buffer, graph = torch.ones(3, device=device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            buffer.add_(1)
        assert len(graph.operations) == operations
        graph.replay()
        assert buffer.tolist() == [2.0] * 3  # recorded and replayed, or executed at once and never again


@pytest.mark.parametrize("family", FEW)
def test_latents_are_replayed_on_the_agents_own_device(fake, family):
    """One graph of one step, whatever the number of steps; on two devices, the first of which captured before."""
    for device in ("meta:0", SECOND):
        agent, link = placed(family, device)
        plain, _ = placed(family, device, graphs=False)
        for number, (lengths, steps) in enumerate([(LENGTHS, STEPS), ((4, 8, 2), STEPS), ((5, 5, 5), 3)]):
            prompt = batch(agent, lengths, number)
            replays = fake.replays
            states = agent.think(prompt, steps, link).states
            assert agent.stepper.reason == ("" if number else USED_AGAIN)
            assert fake.replays - replays == (steps - 1 if number else 0)
            close(states, plain.think(prompt, steps, link).states)
        assert (agent.stepper.captures, agent.stepper.reuses) == (1, 1)
        assert plain.stepper.reason == "graphs are off"
    assert fake.clean()
    assert fake.modes == {"thread_local"}


@pytest.fixture
def captured_soon(monkeypatch):
    monkeypatch.setattr(stepper, "AT_ONCE", 16)


@pytest.mark.parametrize(
    ("family", "temperature"), [("llama", 0.0), ("llama", 0.9), ("gemma3_text", 0.9), ("qwen3_5_text", 0.0)]
)
def test_tokens_are_replayed(fake, captured_soon, family, temperature):
    agent, _ = placed(family, look=4)
    prompt = batch(agent)
    settings = 22, temperature, 0.95, 3
    expected = on_host(family).decode(hosted(prompt), *settings)
    for _ in range(2):
        assert agent.decode(prompt, *settings) == expected
        assert agent.stepper.reason == ""
    assert (agent.stepper.captures, agent.stepper.reuses) == (1, 1)
    assert fake.replays >= 2 * (max(map(len, expected)) - 1)
    assert fake.clean()


def test_temperature_and_nucleus_are_no_part_of_a_graph(fake):
    agent, _ = placed(look=4)
    prompt, plain = batch(agent), on_host()
    for settings in ((0.5, 1.0), (1.5, 0.7), (1.0, 0.9)):
        assert agent.decode(prompt, 20, *settings) == plain.decode(hosted(prompt), 20, *settings)
    assert agent.stepper.captures == 1


class Waiting(torch.nn.Module):
    """A link that asks the device for a number."""

    def __init__(self, link: torch.nn.Module) -> None:
        super().__init__()
        self.link = link

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.link(hidden) if float(hidden[0, 0]) < 1e9 else hidden


class WaitingThen(Waiting):
    """One that does so at a certain call only: none that the watch before a capture can see."""

    calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(hidden) if self.calls == self.at else self.link(hidden)


@pytest.mark.parametrize("during", ["watch", "capture"])
def test_a_step_that_waits_is_not_captured_and_nothing_stays_of_the_attempt(fake, during):
    agent, link = placed()
    plain, _ = placed(graphs=False)
    prompt = batch(agent)
    expected = plain.think(prompt, STEPS, link).states
    waiting = Waiting(link)
    if during == "capture":
        waiting = WaitingThen(link)
        waiting.at = STEPS + 1 + 2 + 1  # the first rollout, e_1 of the second, two runs before the capture
    close(agent.think(prompt, STEPS, waiting).states, expected)
    message = "a step waits for the device at" if during == "watch" else "operation failed due to a previous error"
    with pytest.warns(UserWarning, match=f"steps go on without CUDA graphs: no graph could be captured: .*{message}"):
        close(agent.think(prompt, STEPS, waiting).states, expected)
    assert fake.clean()
    assert fake._debug == 0
    assert len(fake.released) == (during == "capture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(agent.think(prompt, STEPS, link).states, expected)
    assert "no graph could be captured" in agent.stepper.reason
    other, link = placed()  # another agent captures as if nothing had been
    for _ in range(2):
        close(other.think(prompt, STEPS, link).states, expected)
    assert other.stepper.reason == ""


def test_other_threads_may_wait_while_a_step_is_watched(fake):
    """Their warnings are their own."""

    class Beside(Waiting):
        def forward(self, hidden):
            thread = threading.Thread(target=lambda: fake._waits(torch.device(SECOND)) if fake._debug else None)
            thread.start()
            thread.join()
            return self.link(hidden)

    agent, link = placed()
    beside = Beside(link)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            agent.think(batch(agent), STEPS, beside)
    assert agent.stepper.reason == ""
    assert fake.waited > 0


def test_alternating_lengths_do_not_capture_without_end(fake):
    """Three buckets where two are kept: each is gone before it comes again."""
    agent, link = placed()
    for number in range(12):
        agent.think(batch(agent, ((10,), (80,), (150,))[number % 3]), STEPS, link)
    assert agent.stepper.captures == 0
    for number in range(12):
        agent.think(batch(agent, ((10,), (80,))[number % 2]), STEPS, link)
    assert (agent.stepper.captures, agent.stepper.reuses) == (2, 8)


def test_a_bucket_wider_than_its_steps_does_not_capture_earlier(fake):
    """One step to come, and a bucket with room for `AT_ONCE`."""
    agent, link = placed()
    assert bucket(1, AT_ONCE + 1) == (1, 2 * AT_ONCE)
    agent.think(batch(agent, (AT_ONCE,)), 2, link)
    assert (agent.stepper.reason, agent.stepper.captures) == (USED_AGAIN, 0)


def test_streams_share_no_buffers(fake):
    """Nothing orders the work of two streams, so what one of them still runs must not be written by the other."""
    agent, link = placed()
    prompt = batch(agent)
    expected = agent.think(prompt, STEPS, link).states
    (own,) = agent.stepper.pool.held.values()
    with torch.cuda.stream(torch.cuda.Stream(torch.device(SECOND))):
        close(agent.think(prompt, STEPS, link).states, expected)
    assert own.sights == 1
    assert len(agent.stepper.pool.held) == 2
    close(agent.think(prompt, STEPS, link).states, expected)
    assert own.sights == 2


def test_a_text_whose_capture_failed_tries_no_other(fake, monkeypatch):
    """It stays at fixed shapes; the larger buckets of the same text are not captured either."""

    def refused(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(token_steps, "FIRST", 8)
    monkeypatch.setattr(stepper, "AT_ONCE", 1)
    monkeypatch.setattr(step_graph, "StepGraph", refused)
    agent, _ = placed(look=4, fixed_shapes=True)
    plain = on_host()
    asked = mock.patch.object(agent.stepper, "capture", wraps=agent.stepper.capture)
    for writer in (agent, plain):
        writer.model.generation_config.eos_token_id = writer.tokenizer.eos_token = None
    prompt = batch(agent)
    with pytest.warns(UserWarning, match="no graph could be captured: no") as warned, asked as capture:
        assert agent.decode(prompt, 70) == plain.decode(hosted(prompt), 70)
    assert capture.call_count == 2  # one bucket of 64 columns, one of 128
    assert len(warned) == agent.stepper.captures == 1


def test_graphs_see_weights_that_change_in_place_and_follow_those_that_move(fake):
    agent, link = placed()
    plain, _ = placed(graphs=False)
    prompt = batch(agent)
    for _ in range(2):
        agent.think(prompt, STEPS, link)
    link.proj1.weight.mul_(0.5)
    close(agent.think(prompt, STEPS, link).states, plain.think(prompt, STEPS, link).states)
    assert agent.stepper.captures == 1
    kept = []
    while not agent.stepper.reason and len(kept) < 20:
        kept.append(link.proj1.weight.data)
        link.proj1.weight = torch.nn.Parameter(link.proj1.weight * 0.9, requires_grad=False)
        close(agent.think(prompt, STEPS, link).states, plain.think(prompt, STEPS, link).states)
    assert agent.stepper.reason == "graphs were captured more often than they were used again"
    assert agent.stepper.captures == agent.stepper.reuses + SPARE + 1


def test_weights_that_move_while_a_text_is_written(fake, captured_soon):
    """A stream may last as long as its reader likes; its graph must not read what was freed."""
    agent, _ = placed(look=4)
    prompt = batch(agent)
    expected = on_host().decode(hosted(prompt), 22)
    writing, written = agent.write(prompt, 22), [[], [], []]
    for number, grown in enumerate(writing):
        for row, ids in grown.items():
            written[row] += ids
        if number == 10:
            assert agent.stepper.reason == ""
            replays = fake.replays
            head = agent.model.lm_head
            head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    assert written == expected
    assert fake.replays - replays < 4


def test_what_is_not_captured_says_why(fake):
    agent, link = placed()
    prompt = batch(agent)
    for _ in range(2):
        agent.think(prompt, STEPS, lambda hidden: link(hidden))
        assert agent.stepper.reason == "the link is not a module, so a change of its weights cannot be noticed"
    agent.think(prompt, 1, link)
    assert agent.stepper.reason == "a single step feeds nothing back"
    agent.think(prompt, STEPS, link, weights_stay=False)
    assert agent.stepper.reason == "weights are on the device for visits only"
    assert list(agent.write(prompt, STEPS, weights_stay=False))
    assert agent.stepper.reason == "weights are on the device for visits only"
    assert agent.stepper.captures == 0


def test_no_graph_is_replayed_while_a_module_has_hooks(fake):
    """What a hook does is Python that no graph holds, and may be something else at every step."""
    agent, link = placed()
    plain, _ = placed(graphs=False)
    prompt = batch(agent)
    for _ in range(2):
        agent.think(prompt, STEPS, link)
    assert agent.stepper.captures == 1
    gains = [2.0]
    hooks = [
        each.decoder.layers[1].self_attn.v_proj.register_forward_hook(lambda part, given, states: gains[0] * states)
        for each in (agent, plain)
    ]
    for gains[0] in (2.0, 3.0):
        found = agent.think(prompt, STEPS, link).states
        assert agent.stepper.reason == "a module has hooks, which a graph would not call"
        close(found, plain.think(prompt, STEPS, link).states)
    for hook in hooks:
        hook.remove()
    reuses = agent.stepper.reuses
    close(agent.think(prompt, STEPS, link).states, plain.think(prompt, STEPS, link).states)
    assert (agent.stepper.captures, agent.stepper.reuses) == (1, reuses + 1)


def test_a_graph_is_captured_again_where_modules_do_something_else(fake):
    agent, link = placed()
    plain, _ = placed(graphs=False)
    prompt = batch(agent)
    for _ in range(3):
        before = agent.think(prompt, STEPS, link).states
    assert (agent.stepper.captures, agent.stepper.reuses) == (1, 1)
    for each in (agent, plain):
        each.decoder.layers[1].self_attn.scaling = 3.0
    for reuses in (1, 2):
        found = agent.think(prompt, STEPS, link).states
        assert (agent.stepper.captures, agent.stepper.reuses) == (2, reuses)
        close(found, plain.think(prompt, STEPS, link).states)
    assert not torch.allclose(found.cpu(), before.cpu(), rtol=1e-2)
