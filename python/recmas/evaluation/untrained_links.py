"""Links that nobody trained, for trained ones to be compared with: they pass their input on, or have random bases."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from recmas.agents.agent import Agent
from recmas.agents.spelling import spelled
from recmas_kernels import FusedRecursiveLink, RecursiveLink

MOST_TOKENS = 8192
"""Tokens that a least-squares map is fitted on, at most."""


def passing(sender: Agent, receiver: Agent, outer: bool = False) -> FusedRecursiveLink:
    """The link that passes its input on into the receiver's embeddings: nothing but a residual and its output norm."""
    widths = sender.hidden_size, receiver.hidden_size
    link = FusedRecursiveLink.outer(*widths, hidden=1) if outer else FusedRecursiveLink.inner(widths[0], hidden=1)
    with torch.no_grad():
        for parameter in link.proj2.parameters():
            parameter.zero_()
        if outer:
            same = widths[0] == widths[1]
            link.residual_proj.weight.copy_(torch.eye(widths[0]) if same else embedding_map(sender, receiver).T)
            link.residual_proj.bias.zero_()
        assert link.norm_out is not None
        link.norm_out.weight.fill_(receiver.embedding_rms())
    return link.to(receiver.device)


def shared_tokens(sender: Agent, receiver: Agent) -> tuple[list[int], list[int]]:
    """Ids, of both, of the tokens that both spell alike; spaces count, special tokens do not; `MOST_TOKENS` at most."""
    theirs = spelled(receiver)
    pairs = sorted((own, theirs[text]) for text, own in spelled(sender).items() if text in theirs)[:MOST_TOKENS]
    return [own for own, _ in pairs], [other for _, other in pairs]


@torch.no_grad()
def embedding_map(sender: Agent, receiver: Agent) -> Tensor:
    """``[d_sender, d_receiver]`` float32: by least squares, from the sender's embeddings of shared tokens.

    Of all maps that fit equally well it is the smallest.
    """
    own, others = shared_tokens(sender, receiver)
    x, y = (
        agent.embed(torch.tensor([ids], device=agent.device))[0].cpu().double()
        for agent, ids in ((sender, own), (receiver, others))
    )
    return torch.linalg.lstsq(x, y, driver="gelsd").solution.float()


def respun(link: RecursiveLink, generator: torch.Generator) -> RecursiveLink:
    """A copy whose weight matrices keep their singular values alone; biases and norms stay."""
    made = copy.deepcopy(link)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                values = torch.linalg.svdvals(weight.detach().cpu().double())
                left, right = (_orthogonal(size, len(values), generator) for size in weight.shape)
                weight.copy_(left * values @ right.T)
    return made


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns: `columns` of `rows` entries each, every basis as likely as every other."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()
