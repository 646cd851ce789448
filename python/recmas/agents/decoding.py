"""The one decoding loop: each row is written by itself, on the same cache as the rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from recmas.agents.model import FrozenModel
from recmas.agents.sampling import RowName, Sampler
from recmas.agents.token_steps import token_steps
from recmas.engine.messages import Prompt
from recmas.engine.prefill import Prefill, prefill_all
from recmas.engine.stepper import Stepper

_UNBOUNDED = 1 << 62
Reply = Callable[[int, int, int], Sequence[int]]
"""``reply(row, token, room)``: what the row reads after the token it just wrote; at most `room` ids.

Called for every token of every row of the batch; `room` is 0 after a row's last one."""


@torch.no_grad()
def write(
    model: FrozenModel,
    prompt: Prompt,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: Sequence[int],
    rows: Sequence[RowName],
    reply: Reply | None = None,
    prefill: Prefill = prefill_all,
    *,
    stepper: Stepper,
    weights_stay: bool = True,
) -> Iterator[dict[int, list[int]]]:
    """Write text; after every step, the token ids by which rows of the batch grew.

    What a reply adds to a row is fed to that row alone, one token a step beside the other rows' own, or several at once
    where every row has some: its cache goes on, nothing is read twice, and no other row is held up or changed by it.

    Args:
        model: writes.
        prompt: the batch of prompts.
        max_new_tokens: most tokens that a row writes; those of replies do not count. They do count against the context.
        temperature: 0 is greedy.
        top_p: nucleus, in (0, 1].
        seed: integers that name the run.
        rows: name of each row in the run, for its random stream.
        reply: see `Reply`.
        prefill: reads the prompt.
        stepper: runs the steps; several between two looks of the host, unless a reply may come after each.
        weights_stay: as for `Stepper.begin`.

    Raises:
        FloatingPointError: logits that are not finite; names agent and row.
    """
    batch, context = prompt.embeds.shape[0], model.context_length
    used = prompt.mask.sum(dim=1).tolist()
    space = [_UNBOUNDED if context is None else context - positions + 1 for positions in used]  # left in the context
    left = [min(max_new_tokens, positions) for positions in space]  # tokens that each row may still write
    going = {row for row in range(batch) if left[row] > 0}
    if not going:
        return
    sampler, steps = Sampler(temperature, top_p, seed, rows), max(left) - 1
    most = steps if reply is None else max(space)
    past, hidden = prefill(model.decoder, prompt, steps, context)
    chosen = [sampler.choose(model.logits(hidden), sampler.draw(going)[0]).tolist()]
    unread: list[list[int]] = [[] for _ in range(batch)]
    choosing, ends = set(going), model.eos_ids
    with token_steps(model, past, sampler, stepper, steps, most, weights_stay) as ahead:
        while True:
            for tokens in chosen:
                grown = {}
                for row in sorted(choosing & going):
                    token = tokens[row]
                    if token < 0:
                        raise FloatingPointError(
                            f"agent {model.name!r}: the logits of row {rows[row]} are not finite in {model.dtype}"
                        )
                    left[row] -= 1
                    space[row] -= 1
                    last = token in ends or left[row] == 0 or space[row] == 0
                    answer = [] if reply is None else list(reply(row, token, 0 if last else space[row]))
                    space[row] -= len(answer)
                    if last or space[row] == 0:
                        going.discard(row)
                    grown[row] = unread[row] = [token, *answer]
                yield grown
                if not going:
                    return
            width = min(len(unread[row]) for row in going)
            fed = [unread[row][:width] if row in going else [model.pad_id] * width for row in range(batch)]
            unread = [ids[width:] for ids in unread]
            choosing = {row for row in going if not unread[row]}
            count = min(ahead.look, max(left[row] for row in going)) if reply is None else 1
            chosen = ahead.feed(fed, choosing, count)
