"""What holds of a tiny random model of one type, beside what it proves of itself.

Everything is compared with the model's own plain forward, row by row, without cache, mask or positions. A type is
right, right with a feature off, or refused in one line; anything else is a fault: wrong numbers that nobody was told
of, or an exception that is no ValueError of one line.
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from recmas import Pattern, RecursiveMAS
from recmas.agents.agent import Agent
from recmas.agents.checking import proofs_of, switched_off
from recmas.agents.required import REQUIRED
from recmas.config.system_json import PromptSpec
from recmas.engine import abilities
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.messages import Latents, Prompt
from recmas.engine.prefix_reuse import PrefixReuse
from recmas.engine.probe import Probe, moved, slack
from recmas.engine.stepper import Stepper
from recmas.prompts.template import Slot
from recmas.sizing.model_bytes import model_bytes
from recmas.system.prompt_assembly import assemble
from recmas.training import outer_loss
from recmas.training.proofs import TRAINING
from recmas_kernels import named_weights
from tests.runtime.families.tiny_configs import VARIANTS, tiny_config
from tests.runtime.tiny import tiny_link, tiny_tokenizer

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION = tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL)
"""Types of text and images, whose text part is the agent."""
TYPES = (*CAUSAL, *VISION)
CASES = (*TYPES, *VARIANTS)
LARGEST = 30_000_000
"""Parameters of the largest model that is built here."""
LENGTHS = (13, 4, 9)
STEPS = 6
Check = Callable[[Agent, Agent], float]
"""``check(agent, tested)``: how far what `tested` computes is from what is true of `agent`; they are one but for
`sensitivity`."""
SLOT = Slot(("other",))


class NotBuiltError(Exception):
    """Transformers cannot make a model of this type here, or none that is small."""


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

    @property
    def row(self) -> str:
        """What `docs/models.md` says of the type: nothing that another processor rounds otherwise."""
        if self.faults:
            return "WRONG: " + "; ".join(self.faults)
        if self.not_built:
            return f"not examined: {self.not_built}"
        if self.refused:
            reason = self.refused.partition(" is refused: ")[2] or self.refused.partition(" cannot load FOLDER: ")[2]
            proof = reason.partition(":")[0]
            return f"refused: {proof if proof in REQUIRED else reason}"
        return f"without {', '.join(self.off)}" if self.off else "everything"


def tiny(model_type: str) -> Any:
    """A tiny random model, float32, no weight of which is zero or one."""
    try:
        config = tiny_config(model_type)
        kind = AutoModelForImageTextToText if model_type in VISION else AutoModelForCausalLM
        with torch.device("meta"):
            size = sum(weight.numel() for weight in kind.from_config(config).parameters())
        if size > LARGEST:
            raise NotBuiltError(f"the smallest model has {size:,} parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind.from_config(config).float()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.02 * torch.randn_like(weight))
    except NotBuiltError:
        raise
    except Exception as error:  # transformers' own, of any kind
        raise NotBuiltError(" ".join(str(error).split()).partition(" but it ")[0]) from error
    return model


def examine(model_type: str, checks: Collection[str] | None = None) -> Result:
    """What one type proves, and these of `CHECKS` (None: all)."""
    result = Result(model_type)
    quiet()
    try:
        config = tiny_config(model_type)
    except Exception as error:  # transformers' own, of any kind
        result.not_built = f"no tiny configuration: {type(error).__name__}"
        return result
    try:
        agent = saved_and_loaded(tiny(model_type))
    except NotBuiltError as error:
        refuse_checkpoint(config, result)
        if "no file named" in result.refused:  # nothing else stands against it than that there is no model to try
            result.refused, result.not_built = "", str(error)
        return result
    except ValueError as error:
        result.refused = re.sub(r"cannot load \S+:", "cannot load FOLDER:", str(error))
        if len(result.refused.splitlines()) != 1:
            result.faults.append(f"refused in several lines: {result.refused!r}")
        return result
    except Exception as error:
        result.faults.append(f"loading: {type(error).__name__}: {error}")
        return result
    result.off = list(switched_off(proofs_of(agent.model, tuple(TRAINING))))
    each = Probe(agent.decoder).bound
    for name, (forwards, check) in CHECKS.items():
        if checks is not None and name not in checks:
            continue
        bound = forwards * each  # each of them rounds once more
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
    disturbed = Agent(copy.deepcopy(agent.model), agent.tokenizer, name=agent.name)
    table = disturbed.model.get_input_embeddings().weight
    table.data.copy_(moved(table.data))
    with everything_off():
        return slack(agent.decoder) * check(agent, disturbed)


def refuse_checkpoint(config: PreTrainedConfig, result: Result) -> None:
    """Put what loading a checkpoint of this configuration says into `result`; it has no weights."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tiny_tokenizer(None).save_pretrained(folder)
        try:
            Agent.from_pretrained(folder, name="tiny")
        except ValueError as error:
            result.refused = str(error).replace(folder, "FOLDER")
        except Exception as error:
            result.faults.append(f"loading: {type(error).__name__}: {error}")


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
    found = dict(named_weights(agent.model))
    tables = {id(model.get_input_embeddings().weight)}
    for name, weight in model.named_parameters():
        first = 1 if id(weight) in tables else 0  # some models set the padding token's row, 0, to zero when they load
        if not torch.equal(found[name][first:], weight[first:]):
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
    return DecoderCall.plain(agent.decoder)(embeds)[:, -1]


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
    tested.stepper = Stepper(fixed_shapes=fixed_shapes)
    found = tested.think(batch_of(tested, rows), STEPS, link).states
    tested.stepper = Stepper()
    return max(
        difference(states, plain_rollout(agent, agent.embed(torch.tensor([row])), link))
        for row, states in zip(rows, found, strict=True)
    )


@torch.no_grad()
def decoding(agent: Agent, tested: Agent, reply: tuple[int, ...] = ()) -> float:
    """The logits that every token was chosen by, against the model's own over token ids.

    Replies are read by all rows at once, as far as the shortest one goes; those of odd rows are shorter.
    """
    rows, chosen_by = rows_of(agent, LENGTHS), []
    replies = [list(reply[: len(reply) - row % 2]) for row in range(len(rows))]
    answer = (lambda row, token, room: replies[row] if room else ()) if reply else None
    whole = [list(row) for row in rows]
    seen: list[Tensor] = []

    def logits(hidden: Tensor) -> Tensor:
        seen.append(type(tested).logits(tested, hidden))
        return seen[-1]

    with mock.patch.object(tested, "logits", logits):
        for grown in tested.write(batch_of(tested, rows), 5, reply=answer):
            for row, tokens in grown.items():
                chosen_by.append((row, len(whole[row]) - 1, seen[-1][row]))
                whole[row] += tokens
    expected = [agent.model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in whole]
    return max(difference(found, expected[row][place]) for row, place, found in chosen_by)


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
        identity = {SLOT.senders: [torch.nn.Identity()] * len(heads)}
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
        states = DecoderCall.plain(agent.decoder)(alone)[0, -count:]
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


CHAIN = 4 * 4
"""Forwards, one after the other, in two rounds of two agents of four latent steps."""
CHECKS: dict[str, tuple[int, Check]] = {
    "rollout of a ragged batch": (STEPS, rollout),
    "rollout of one length": (STEPS, partial(rollout, lengths=(8, 8))),
    "rollout of single tokens": (STEPS, partial(rollout, lengths=(1, 2))),
    "rollout at fixed shapes": (STEPS, partial(rollout, fixed_shapes=True)),
    "decoding": (1, decoding),
    "decoding with tool replies": (1, partial(decoding, reply=(20, 21, 22))),
    "prefix reuse": (STEPS, prefix_reuse),
    "teacher forcing": (1, teacher_forcing),
    "a whole system": (CHAIN, whole_system),
    "outer training, forced": (CHAIN, partial(training_step, latents="forced")),
    "outer training, rollouts": (CHAIN, partial(training_step, latents="rollout")),
    "memory table": (1, memory),
}
"""Checks, and the number of forwards whose rounding adds up in each."""
