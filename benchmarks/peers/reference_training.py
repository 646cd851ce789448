"""The reference implementation's training, as an algorithm: what ours is measured against.

The outer step: samples run one by one, each with its own backward. A sample's visits make one graph over all rounds: an
agent reads its whole prompt and its gold text at once, without a cache; all layers' hidden states and the logits of all
positions are computed in every visit; the latents it sends are among its hidden states; and the cross entropy of the
last agent's answer is built in every round, although only the last one's is the loss. Only the first agent's first
visit runs without gradients. Links and their order are ours, and so are the positions of the latents (those that
predict the text's tokens; the reference takes those of the tokens), so that gradients must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.reference_run import SLOT
from recmas import RecursiveMAS
from recmas.agents.agent import Agent
from recmas.config.system_json import PromptSpec
from recmas.prompts.rows import Fields
from recmas.training import DataSource, InnerConfig
from recmas.training.pairs import utterances

IGNORED = -100


@contextmanager
def recomputing(system: RecursiveMAS, enabled: bool) -> Iterator[None]:
    """Within, if enabled, the models keep each layer's input alone and run the layer again in the backward.

    The reference does so. Transformers asks for training mode, which changes nothing else in models without dropout,
    and from now on has embeddings require gradients, for adapters in layers. Here latents carry these, so that they
    need not; left on, that would also have whoever uses the model later differentiate what depends on no link.
    """
    models = [agent.model for agent in system.agents.values() if enabled]
    for model in models:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
        model.train()
    try:
        yield
    finally:
        for model in models:
            model.activation_checkpointing_disable()
            model.eval()


def reference_step(
    system: RecursiveMAS,
    links: Mapping[str, nn.Module],
    prompts: Mapping[str, PromptSpec],
    rows: Sequence[Mapping[str, object]],
    rounds: int,
    steps: int,
) -> float:
    """Add the gradients of the mean loss over the rows to the outer links'; the loss.

    Args:
        system: whose agents these are.
        links: eager inner links by role, and outer ones by ``source->target``.
        prompts: templates with ``{{question}}`` and at most one slot, by role in the order of the sequence.
        rows: with ``question`` and ``targets``, one text per role.
        rounds: r.
        steps: at most so many latents are read off a text.
    """
    total = 0.0
    for row in rows:
        loss = _sample_loss(system, links, prompts, row, rounds, steps) / len(rows)
        loss.backward()
        total += loss.item()
    return total


def _sample_loss(
    system: RecursiveMAS,
    links: Mapping[str, nn.Module],
    prompts: Mapping[str, PromptSpec],
    row: Mapping[str, object],
    rounds: int,
    steps: int,
) -> Tensor:
    roles, losses, received = list(prompts), list[Tensor](), None
    for visit in range(rounds * len(roles)):
        role, receiver = roles[visit % len(roles)], roles[(visit + 1) % len(roles)]
        agent, template = system.agents[role], prompts[role].at(visit // len(roles) + 1)
        prompt = _prompt(agent, template.replace("{{question}}", str(row["question"])), received)
        target = _target_ids(agent, str(row["targets"][role]))  # type: ignore[index]
        embeds = torch.cat([prompt, agent.embed(target)])[None]
        with torch.set_grad_enabled(visit > 0):
            output = agent.model(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
                use_cache=False,
                output_hidden_states=True,
            )
        if role == roles[-1]:
            labels = torch.cat([target.new_full((len(prompt),), IGNORED), target])
            losses.append(F.cross_entropy(output.logits[0, :-1].float().contiguous(), labels[1:], ignore_index=IGNORED))
        if visit < rounds * len(roles) - 1:
            first = len(prompt) - 1
            states = output.hidden_states[-1][:, first : first + min(steps, len(target))]
            received = links[f"{role}->{receiver}"](links[role](states))[0]
    return losses[-1]


def _prompt(agent: Agent, text: str, received: Tensor | None) -> Tensor:
    """Input embeddings ``[T, d]``."""
    pieces = []
    for part, piece in enumerate(SLOT.split(text)):
        if part > 0:
            assert received is not None
            pieces.append(received)
        pieces.append(agent.embed(torch.tensor(agent.tokenizer(piece)["input_ids"], dtype=torch.int64)))
    return torch.cat(pieces)


def _target_ids(agent: Agent, text: str) -> Tensor:
    return torch.tensor([*agent.tokenizer(text)["input_ids"], agent.tokenizer.eos_token_id])


def reference_inner(
    system: RecursiveMAS, role: str, link: nn.Module, rows: Sequence[Fields], config: InnerConfig
) -> float:
    """Train an inner link as the reference does; the mean loss of the last epoch.

    The frozen model runs again for every batch of every epoch, with all layers' hidden states and the logits of all
    positions; the loss is made of plain operators. Batches, schedule and optimiser are ours.
    """
    agent, source = system.agents[role], DataSource(rows, config.batch_size, config.seed)
    optimizer = torch.optim.AdamW(link.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
    losses = []
    for step in range(config.steps):
        said = utterances(system, role, source.batch(step), 1)
        width = max(len(one.prompt) + len(one.said) for one in said)
        ids = [[*one.prompt, *one.said, *[agent.pad_id] * (width - len(one.prompt) - len(one.said))] for one in said]
        mask = [[1] * len(row.prompt) + [1] * len(row.said) for row in said]
        mask = [row + [0] * (width - len(row)) for row in mask]
        with torch.no_grad():
            output = agent.model(
                input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True
            )
        spoken = [(at, len(one.prompt), len(one.said)) for at, one in enumerate(said)]
        hidden = torch.cat([output.hidden_states[-1][at, first - 1 : first - 1 + n] for at, first, n in spoken])
        target = agent.model.get_input_embeddings().weight[torch.tensor([i for one in said for i in one.said])]
        loss = (1 - F.cosine_similarity(link(hidden), target.detach())).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(link.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()
        losses.append(loss.item())
    epoch = losses[-(len(rows) // config.batch_size) :]
    return sum(epoch) / len(epoch)
