"""The latent rollout: on the growing cache, or one step at fixed shapes, m - 1 times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recmas.engine.continuation import Past
from recmas.engine.fixed_shapes import FixedShapeContinuation
from recmas.engine.messages import run_link
from recmas.engine.stepper import Stepper

Link = Callable[[Tensor], Tensor]


def rollout(
    past: Past, hidden: Tensor, steps: int, link: Link, stepper: Stepper, *, weights_stay: bool = True
) -> Tensor:
    """e_1..e_m, ``[B, m, d]``, from the hidden states ``[B, d]`` at the last prompt position, m at least 1.

    ``e_k = link(h_k)``, ``h_(k+1) = step(e_k)``; the last e is not fed back.

    Args:
        past: has read the prompt.
        hidden: h_1.
        steps: m.
        link: the inner link.
        stepper: runs the steps.
        weights_stay: as for `Stepper.begin`.
    """
    states = [run_link(link, hidden)]
    name = ("latent", link, states[0].dtype)

    def make(on: FixedShapeContinuation) -> LatentStep:
        return LatentStep(on, states[0], link)

    with stepper.begin(past, steps - 1, name, make, weights_stay=weights_stay) as run:
        if run is None:
            dtype = past.decoder.get_input_embeddings().weight.dtype
            for _ in range(steps - 1):
                states.append(run_link(link, past.feed(states[-1][:, None].to(dtype))))
        else:
            run.program.start(states[0])
            for _ in range(steps - 1):
                run()
                states.append(run.program.state[: len(hidden)].clone())
    return torch.stack(states, dim=1)


class LatentStep:
    """``e_(k+1) = link(step(e_k))`` in place.

    Args:
        continuation: makes the step.
        like: e ``[B, d]`` of some batch.
        link: the inner link. Weights of one that is no module cannot be watched, so none of it is captured.

    Attributes:
        state: e ``[rows, d]``.
        modules: as for `recmas.engine.buckets.Program`.
    """

    def __init__(self, continuation: FixedShapeContinuation, like: Tensor, link: Link) -> None:
        self._continuation, self._link = continuation, link
        self.state = like.new_zeros(continuation.rows, like.shape[1])
        self.modules = (link,) if isinstance(link, nn.Module) else None

    def start(self, state: Tensor) -> None:
        """Begin with e_1 ``[B, d]``; rows that no sequence needs repeat the last one."""
        rows = torch.arange(len(self.state), device=state.device).clamp_(max=len(state) - 1)
        self.state.copy_(state[rows])

    def reset(self) -> None:
        """Any state is as good as any other."""

    def __call__(self) -> None:
        self.state.copy_(run_link(self._link, self._continuation.step(self.state)))
