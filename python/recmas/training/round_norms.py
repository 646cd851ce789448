"""What each round teaches a link that all rounds share: the norm of the gradient that comes through its messages.

Each round is given a link of its own, whose parameters are the shared one's in the same memory with gradients of their
own. The link's gradient is their sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from recmas.config.pattern import Edge, LinkKey
from recmas.config.system_json import edge_name
from recmas.system.system import System
from recmas.training.processes import processes
from recmas_kernels import RecursiveLink

RoundNorms = Callable[[], "dict[str, list[float]]"]


@contextmanager
def rounds_apart(system: System, keys: Sequence[LinkKey], rounds: int) -> Iterator[RoundNorms]:
    """Within, the rounds' gradients of the links with these keys are kept apart.

    Each of so many rounds holds gradients of the links' size. Links that belong to one round are left as they are.

    Yields:
        What adds these gradients up, over all processes and rounds, and makes them the links' own. It returns the norm
        of each round's, from round 1 on, by the link's name; 0 of a round that the step did not reach.
    """
    shared: dict[Edge, dict[int, RecursiveLink]] = {(key[0], key[1]): {} for key in keys if len(key) == 2}
    links, scores = dict(system.outer_links), dict(system.edge_scores)
    for source, target, sent in system.pattern.links_by_round(rounds):
        edge, own = (source, target), (source, target, sent)
        if edge in shared and own not in links:
            shared[edge][sent] = system.outer_links[own] = _view(links[edge])
            if edge in scores:
                system.edge_scores[own] = scores[edge]

    def norms() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        views = [link for by_round in shared.values() for link in by_round.values()]
        processes().sum_gradients(parameter for view in views for parameter in view.parameters())
        for edge, by_round in shared.items():
            by_link = found[edge_name(edge)] = [0.0] * max(by_round, default=0)
            for sent, view in by_round.items():
                gradients = [part.grad for part in view.parameters() if part.grad is not None]
                by_link[sent - 1] = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
                _move(view, links[edge])
        return found

    try:
        yield norms
    finally:
        for (source, target), by_round in shared.items():
            for sent in by_round:
                del system.outer_links[source, target, sent]
                system.edge_scores.pop((source, target, sent), None)


def _view(link: RecursiveLink) -> RecursiveLink:
    """The same link, in the same memory, with gradients of its own."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in link.parameters()}
    return copy.deepcopy(link, parameters)


def _move(view: nn.Module, link: nn.Module) -> None:
    """Add a view's gradients to those of its link, and forget them."""
    for part, parameter in zip(view.parameters(), link.parameters(), strict=True):
        if part.grad is not None:
            parameter.grad = part.grad if parameter.grad is None else parameter.grad.add_(part.grad)
            part.grad = None
