"""What holds of a tiny random model of one type, beside what it proves of itself.

Everything is compared with the model's own plain forward, row by row, without cache, mask or positions. A type is
right, right with a feature off, or refused in one line; anything else is a fault: wrong numbers that nobody was told
of, or an exception that is no ValueError of one line.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recmas import Pattern, RecursiveMAS
from recmas.agents.agent import Agent
from recmas.agents.checking import proofs_of, switched_off
from recmas.config.system_json import PromptSpec
from recmas.engine import abilities
from recmas.engine.latent_rollout import Rollouts
from recmas.engine.messages import Latents, Prompt
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.engine.probe import Probe, moved, slack
from recmas.prompts.template import Slot
from recmas.sizing.model_bytes import model_bytes
from recmas.system.prompt_assembly import assemble
from recmas.training import outer_loss
from recmas.training.proofs import TRAINING
from tests.runtime.families.tiny_configs import tiny_config
from tests.runtime.tiny import tiny_link, tiny_tokenizer

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 30_000_000
"""Parameters of the largest model that is built here."""
LENGTHS = (13, 4, 9)
STEPS = 6
Check = Callable[[Agent, Agent], float]
"""``check(agent, tested)``: how far what `tested` computes is from what is true of `agent`; they are one but for
`sensitivity`."""
SLOT = Slot(("other",))


class NotBuiltError(Exception):
    """Transformers cannot make a model of this type here."""


@dataclass
class Result:
    """Of one type.

    Attributes:
        refused: the line with which it is refused; empty if it is not.
        not_built: why transformers makes no such model here; empty if it does.
        off: features that are off.
        faults: what is wrong and was not said.
    """

    model_type: str
    refused: str = ""
    not_built: str = ""
    off: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.faults:
            return "wrong"
        if self.not_built:
            return "not built"
        if self.refused:
            return "refused"
        return "right, features off" if self.off else "right"


def tiny(model_type: str) -> Any:
    """A tiny random model, float32, no weight of which is zero or one."""
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise NotBuiltError(f"the smallest model has {size:,} parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
    except NotBuiltError:
        raise
    except Exception as error:  # transformers' own, of any kind
        raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    return model


def examine(model_type: str) -> Result:
    """All checks of one type."""
    result = Result(model_type)
    quiet()
    try:
        model = tiny(model_type)
    except NotBuiltError as error:
        result.not_built = str(error)
        return result
    try:
        agent = saved_and_loaded(model)
    except ValueError as error:
        result.refused = str(error)
        if len(result.refused.splitlines()) != 1:
            result.faults.append(f"refused in several lines: {result.refused!r}")
        return result
    except Exception as error:
        result.faults.append(f"loading: {type(error).__name__}: {error}")
        return result
    result.off = list(switched_off(proofs_of(agent.model, tuple(TRAINING))))
    bound = STEPS * Probe(agent.decoder).bound  # every step rounds once more
    for name, check in CHECKS.items():
        try:
            error = check(agent, agent)
            explained = bound if error <= bound else max(bound, sensitivity(agent, check))
        except Exception as raised:
            result.faults.append(f"{name}: {type(raised).__name__}: {' '.join(str(raised).split())[:200]}")
            continue
        if not error <= explained:
            result.faults.append(f"{name}: differs by {error:.1e}, rounding explains {explained:.1e}")
    return result


def sensitivity(agent: Agent, check: Check) -> float:
    """What rounding explains of a check where errors grow fast: a trusted run on an embedding table moved by one unit
    in the last place, against the plain one, times the factor of `recmas.engine.probe`."""
    disturbed = copy.deepcopy(agent)
    table = disturbed.model.get_input_embeddings().weight
    table.data.copy_(moved(table.data))
    with everything_off():
        return slack(agent.decoder) * check(agent, disturbed)


def quiet() -> None:
    """Transformers says much about kernels that are not installed and tokens that are not set."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def saved_and_loaded(model: Any) -> Agent:
    """The agent of a checkpoint; its own tokenizer is a tiny one."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tiny_tokenizer(None).save_pretrained(folder)
        agent = Agent.from_pretrained(folder, name="tiny")
    agent.source = None
    found = dict(agent.model.named_parameters())
    for name, weight in model.named_parameters():
        if not torch.equal(found[name], weight):
            raise AssertionError(f"{name} is another one after loading")
    return agent


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def rows_of(agent: Agent, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    top = agent.model.get_input_embeddings().weight.shape[0]
    return [torch.randint(10, min(top, 300), (length,), generator=generator).tolist() for length in lengths]


def plain_state(agent: Agent, embeds: Tensor) -> Tensor:
    """The last state of one row ``[1, T, d]``."""
    state: Tensor = agent.decoder(inputs_embeds=embeds.clone()).last_hidden_state[:, -1]
    return state


@torch.no_grad()
def plain_rollout(agent: Agent, embeds: Tensor, link: Callable[[Tensor], Tensor]) -> Tensor:
    """``[m, d]`` of one row."""
    states = []
    for _ in range(STEPS):
        states.append(link(plain_state(agent, embeds)))
        embeds = torch.cat([embeds, states[-1][:, None]], dim=1)
    return torch.cat(states)


def batch_of(agent: Agent, rows: list[list[int]]) -> Prompt:
    return assemble(agent.embed, [[row] for row in rows], {}, {}, pad_id=agent.pad_id, device="cpu")


@torch.no_grad()
def rollout(agent: Agent, tested: Agent, lengths: tuple[int, ...] = LENGTHS, fixed_shapes: bool = False) -> float:
    link = tiny_link(agent)
    rows = rows_of(agent, lengths)
    tested.rollouts = Rollouts(fixed_shapes=fixed_shapes)
    found = tested.think(batch_of(tested, rows), STEPS, link).states
    tested.rollouts = Rollouts()
    return max(
        difference(states, plain_rollout(agent, agent.embed(torch.tensor([row])), link))
        for row, states in zip(rows, found, strict=True)
    )


@torch.no_grad()
def decoding(agent: Agent, tested: Agent, reply: tuple[int, ...] = ()) -> float:
    """Greedy tokens against the model's own logits over token ids; a tie within rounding may fall either way."""
    rows, many = rows_of(agent, LENGTHS), 5
    answer = (lambda row, token, room: reply if room and row % 2 == 0 else ()) if reply else None
    written: list[list[int]] = [[] for _ in rows]
    for grown in tested.write(batch_of(tested, rows), many, reply=answer):
        for row, tokens in grown.items():
            written[row] += tokens
    worst = 0.0
    for number, (row, tokens) in enumerate(zip(rows, written, strict=True)):
        logits = agent.model(input_ids=torch.tensor([row + tokens])).logits[0]
        place = 0
        while place < len(tokens):
            here = logits[len(row) + place - 1]
            worst = max(worst, ((here.max() - here[tokens[place]]) / here.abs().max()).item())
            place += 1
            if reply and number % 2 == 0 and tokens[place : place + len(reply)] == list(reply):
                place += len(reply)
    return worst


@torch.no_grad()
def prefix_reuse(agent: Agent, tested: Agent) -> float:
    """Two rounds of the same texts with other latents between them."""
    link, reuse = tiny_link(agent), PrefixReuse()
    heads, tails = rows_of(agent, LENGTHS, 1), rows_of(agent, (5, 1, 3), 2)
    worst = 0.0
    for round in range(3):
        states = torch.randn(len(heads), 4, agent.hidden_size, generator=torch.Generator().manual_seed(round))
        latents = {SLOT.senders: Latents(states * agent.embedding_rms())}
        segments = [[head, SLOT, tail] for head, tail in zip(heads, tails, strict=True)]
        identity = {SLOT.senders: torch.nn.Identity()}
        prompt, given = (
            assemble(each.embed, segments, latents, identity, pad_id=agent.pad_id, device="cpu")
            for each in (agent, tested)
        )
        found = tested.think(given, STEPS, link, prefill=reuse.prefill("a", (lambda: heads) if round < 2 else None))
        for row in range(len(heads)):
            alone = prompt.embeds[row : row + 1, prompt.mask[row] == 1]
            worst = max(worst, difference(found.states[row], plain_rollout(agent, alone, link)))
    return worst


def teacher_forcing(agent: Agent, tested: Agent) -> float:
    """States that predict given tokens of a ragged batch, and their gradient."""
    rows, said = rows_of(agent, LENGTHS), rows_of(agent, (5, 5, 5), 3)
    prompt = batch_of(tested, rows)
    embeds = prompt.embeds.detach().requires_grad_()
    targets, mask = torch.tensor(said), torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5])
    found = tested.hidden(Prompt(embeds, prompt.mask), targets, mask)
    weight = torch.randn(found.shape[-1], generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad((found * weight * mask[..., None]).sum(), embeds)
    worst = 0.0
    for number, row in enumerate(rows):
        count = int(mask[number].sum())
        alone = agent.embed(torch.tensor([row + said[number][: count - 1]])).detach().requires_grad_()
        states = agent.decoder(inputs_embeds=1.0 * alone).last_hidden_state[0, -count:]
        (expected,) = torch.autograd.grad((states * weight).sum(), alone)
        worst = max(
            worst,
            difference(found[number, :count], states),
            difference(gradient[number, prompt.mask[number] == 1], expected[0, : len(row)]),
        )
    return worst


@contextmanager
def everything_off() -> Iterator[None]:
    """Within, no decoder has proved anything but how it is called."""

    def missing(decoder: Any, feature: str) -> str:
        known = ("intact inputs", "masks", "positions")
        return real(decoder, feature) if feature in known else "off"

    real = abilities.missing
    homes = ("decoder_call", "fixed_shapes", "prefill", "prefix_reuse")
    with mock.patch.multiple("recmas.training.proofs", missing=missing):
        patches = [mock.patch(f"recmas.engine.{home}.missing", missing) for home in homes]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def system_of(agent: Agent) -> RecursiveMAS:
    """Two roles on one model, two rounds; texts before, between and after the slots."""
    pattern = Pattern((("first",), ("second",)))
    prompts = {
        "first": PromptSpec(
            first="question: {{question}} and the notes", later="question: {{question}} notes {{from:second}} and"
        ),
        "second": PromptSpec(later="what is the answer to {{question}} ? {{from:first}} the answer"),
    }
    return RecursiveMAS.create(
        {"first": agent, "second": agent}, pattern, prompts=prompts, rounds=2, latent_steps=4, seed=0
    )


QUESTIONS = ["fox", "what is the answer to everything?", "0 + 1 ="]


def whole_system(agent: Agent, tested: Agent) -> float:
    """Latents of a run with all that is proved, and of one with everything off."""
    with everything_off():
        expected = system_of(agent).answer(QUESTIONS, max_new_tokens=3, trace=True, batch_size=1)
    found = system_of(tested).answer(QUESTIONS, max_new_tokens=3, trace=True)
    return max(
        difference(handoff.latents, other.latents)
        for answer, wanted in zip(found, expected, strict=True)
        for handoff, other in zip(answer.handoffs, wanted.handoffs, strict=True)
    )


def training_step(agent: Agent, tested: Agent, latents: str) -> float:
    """Loss and gradients of an outer step with all that is proved, and with everything off."""
    rows = [
        {"question": question, "targets": {"first": "the fox and", "second": "everything"}} for question in QUESTIONS
    ]

    def step(agent: Agent, recompute: bool) -> Tensor:
        system = system_of(agent)
        weights = [weight for link in system.outer_links.values() for weight in link.parameters()]
        loss = outer_loss(system, rows, 2, latents=latents, recompute=recompute)
        return torch.cat([part.reshape(-1) for part in (loss, *torch.autograd.grad(loss, weights))]).detach()

    with everything_off():
        expected = step(agent, recompute=False)
    return difference(step(tested, recompute=True), expected)


def memory(agent: Agent, _: Agent) -> float:
    """The estimate of a row's bytes has an answer."""
    found = model_bytes(agent.model.config, 4)
    return 0.0 if found.cache(64) > 0 or found.state > 0 else float("inf")


CHECKS: dict[str, Check] = {
    "rollout of a ragged batch": rollout,
    "rollout of one length": partial(rollout, lengths=(8, 8)),
    "rollout of single tokens": partial(rollout, lengths=(1, 2)),
    "rollout at fixed shapes": partial(rollout, fixed_shapes=True),
    "decoding": decoding,
    "decoding with tool replies": partial(decoding, reply=(20, 21, 22)),
    "prefix reuse": prefix_reuse,
    "teacher forcing": teacher_forcing,
    "a whole system": whole_system,
    "outer training, forced": partial(training_step, latents="forced"),
    "outer training, rollouts": partial(training_step, latents="rollout"),
    "memory table": memory,
}
