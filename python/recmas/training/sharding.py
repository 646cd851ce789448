"""Frozen agents whose layers are dealt out among the processes of a run, by torch's FSDP2 (``fully_shard``).

A layer's weights are gathered for its forward and for its backward; in between, each process holds its share of them.
Gathering takes all processes, so all of them run the same layers in the same order, whatever rows they have: nothing
that is sharded is run for some rows of a batch alone, read ahead, or left to one process. Embeddings, head and norms
outside of layers stay whole in every process, and so do links.
"""

from __future__ import annotations

import os
from weakref import WeakSet

from torch import nn

from recmas.agents.agent import Agent
from recmas.engine.abilities import missing
from recmas.engine.continuation import frequency_switch
from recmas.system.system import System
from recmas.training.processes import processes
from recmas.training.unroll import layers_of

_SHARDED: WeakSet[nn.Module] = WeakSet()
_ASKED = (
    *("padding", "masks", "positions", "intact inputs", "recompute", "begun prefixes"),
    *("cache", "cached gradients", "several positions"),
)
"""What training asks of a decoder: it is proved while every process still has all of the weights."""


def is_sharded(system: System) -> bool:
    """Whether an agent's layers are dealt out among processes."""
    return any(agent.model in _SHARDED for agent in system.agents.values())


def asked_by_accelerate() -> bool:
    """Whether ``accelerate launch --use_fsdp`` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def check_sharding(system: System) -> None:
    """Raise ValueError unless `shard_agents` can shard; names the agent that it cannot, and why."""
    together = processes()
    if together.count == 1:
        raise ValueError("shard_agents: this is the only process; start several (accelerate launch, torchrun)")
    for role, agent in system.agents.items():
        kind = together.device.type
        if agent.device.type != kind:
            raise ValueError(
                f"shard_agents: agent {role!r} is on {agent.device}, but the processes join {kind} devices"
            )
        if reason := unshardable(agent):
            raise ValueError(f"shard_agents: agent {role!r} cannot be sharded: {reason}")


def shard_agents(system: System) -> None:
    """Deal the layers of all agents out among the processes of this run, where they are, until it ends.

    To be called in all processes. Agents can then train links, but they are neither saved nor run by one process alone.

    Raises:
        ValueError: there is one process, or an agent whose layers cannot be sharded. Nothing is sharded then.
        ImportError: the [train] extra is not installed.
    """
    check_sharding(system)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    together = processes()
    mesh = init_device_mesh(together.device.type, (together.count,))
    for agent in system.agents.values():
        if agent.model not in _SHARDED:  # which several roles may share
            agent.unpack()
            for layer in layers_of(agent.decoder):
                fully_shard(layer, mesh=mesh)
            _SHARDED.add(agent.model)


def unshardable(agent: Agent) -> str:
    """Why an agent's layers cannot be dealt out; empty if they can."""
    decoder = agent.decoder
    layers = layers_of(decoder)
    if not layers:
        return f"{type(decoder).__name__} has no layers that transformers could run again (GradientCheckpointingLayer)"
    held = [id(parameter) for layer in layers for parameter in layer.parameters()]
    inside = {part for layer in layers for part in layer.modules()}
    others = {id(p) for part in agent.model.modules() if part not in inside for p in part.parameters(recurse=False)}
    if len(held) != len(set(held)) or not others.isdisjoint(held):
        return "its layers share parameters with each other, or with parts that stay whole"
    if frequency_switch(decoder.config) is not None:
        return "it reads long rows otherwise than short ones, so that processes would run different layers"
    for feature in _ASKED:
        if (reason := missing(decoder, feature)) and feature == "padding":
            return f"rows of different lengths run apart, so that processes would run different layers ({reason})"
    return ""
