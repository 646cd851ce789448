"""What a recursive system is compared with, made of the same agents and prompts and run by the same walk.

- The recursive text system: the same agents, templates and rounds with texts in the slots, ``answer(mode="text")``.
- The single agent: one agent by itself.
- The looped model: one agent that reads its own latents.
- No latents: ``latent_steps=0`` leaves every slot empty.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from recmas.config.pattern import Pattern
from recmas.config.system_json import Defaults, PromptSpec
from recmas.evaluation.answerer import Answerer
from recmas.prompts.template import Slot
from recmas.recursive_mas import RecursiveMAS
from recmas_kernels import FusedRecursiveLink


def single_agent(mas: RecursiveMAS, role: str | None = None, prompt: str | None = None) -> RecursiveMAS:
    """One agent of the system by itself: it reads no messages and answers in one round.

    Args:
        mas: the system whose agent, chat settings and decoding these are.
        role: the agent; None takes the one that answers.
        prompt: its template; None takes its template of round 1 with the slots left out.

    Raises:
        ValueError: an unknown role, or a prompt with a slot.
    """
    role = _role(mas, role)
    text = mas.template(role, 1).without_slots() if prompt is None else prompt
    setting = replace(mas.settings[role], prompt=PromptSpec(text))
    alone = Pattern(((role,),))
    return RecursiveMAS(
        {role: mas.agents[role]},
        {},
        {},
        alone,
        settings={role: setting},
        defaults=Defaults(1, 0),
        offload=_visited(mas, role),
    )


def looped_model(mas: RecursiveMAS, role: str | None = None) -> RecursiveMAS:
    """One agent that goes over the question again and again, each time reading its own latents of the time before.

    A looped language model (LoopLM, the baseline to equation 2 of arXiv 2604.25917) applies one stack of layers to its
    own last states. Here the stack is the frozen agent and the way back its inner link R_in. With x the prompt, m
    latent steps and r rounds

        E_1 = think(x, m),  E_k = think(x with E_(k-1) in its slot, m) for k = 2 .. r - 1,
        answer = decode(x with E_(r-1) in its slot)

    where think is the latent rollout, ``E [m, d] = R_in(h_1 .. h_m)``. So r counts passes over the question, the one
    that writes included, as the rounds of a system do: r = 1 is `single_agent`. The latents enter the slot as they are:
    there is no outer link, and nothing is trained for the loop.

    The prompt of pass 1 is the agent's own of round 1 without slots; that of later passes is its own of later rounds,
    with its slot in the place of the first slot (at the end, if it has none) and no others.

    Args:
        mas: the system whose agent, inner link, chat settings and decoding these are.
        role: the agent; None takes the one that answers.

    Raises:
        ValueError: an unknown role, or an agent without an inner link.
    """
    role = _role(mas, role)
    if role not in mas.inner_links:
        raise ValueError(f"role: agent {role!r} has no inner link to loop through")
    agent, inner = mas.agents[role], mas.inner_links[role]
    prompt = PromptSpec(mas.template(role, 1).without_slots(), mas.template(role, 2).without_slots(Slot((role,))))
    return RecursiveMAS(
        {role: agent},
        {role: inner},
        {(role, role): _unchanged(agent.hidden_size).to(agent.device)},
        Pattern(((role,),)),
        settings={role: replace(mas.settings[role], prompt=prompt)},
        defaults=mas.defaults,
        offload=_visited(mas, role),
    )


def variant(mas: Answerer, mode: str) -> tuple[Answerer, str]:
    """The system, and the mode of its `answer`, that a mode of an evaluation means.

    "latent" and "text" are the system itself; "single" and "loop" are its answering agent, alone and looped.

    Raises:
        ValueError: an agent by itself, of a system whose agents are in other processes.
    """
    if mode not in ("single", "loop"):
        return mas, mode
    if not isinstance(mas, RecursiveMAS):
        raise ValueError(f"mode: {mode!r} is one agent by itself, and runs in this process alone")
    return single_agent(mas) if mode == "single" else looped_model(mas), "latent"


def _role(mas: RecursiveMAS, role: str | None) -> str:
    role = mas.pattern.last if role is None else role
    if role not in mas.agents:
        raise ValueError(f"role: unknown role {role!r}; the pattern has {', '.join(mas.pattern.roles)}")
    return role


def _visited(mas: RecursiveMAS, role: str) -> torch.device | None:
    """The device that offload copies the agent's weights to; None without offload."""
    return None if mas.offloader is None else mas.devices[role]


def _unchanged(features: int) -> FusedRecursiveLink:
    """The link ``y = x``: an identity residual with nothing added."""
    link = FusedRecursiveLink.inner(features, hidden=1, norm=False, bias=False)
    assert link.proj2 is not None
    nn.init.zeros_(link.proj2.weight)
    return link
