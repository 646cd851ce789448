"""LoopLM in small (Table 3): one agent that reads its own latents in 1, 2 and 3 passes, beside the system it is of.

The looped agent is the solver, `recmas.evaluation.looped_model` of it, with the question in its first pass: no other
agent's answers are words. It knows its own sheet alone, as every agent does here, so what it cannot reach is what the
others would have told it; how well it can do without is `recmas.lab.world.chance`.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.relay.asked import BATCH, asked, heading, right
from benchmarks.relay.labs import Measured
from recmas import RecursiveMAS
from recmas.config.pattern import Pattern
from recmas.config.system_json import PromptSpec
from recmas.evaluation import looped_model
from recmas.lab.tasks import RELAY

ROUNDS = (1, 2, 3)
ROLE = "solver"


def measure(system: RecursiveMAS, count: int) -> Measured:
    """A cell per system and number of rounds or passes: which questions were right."""
    rows, cells = asked(count), []
    for name, one in (("system", system), ("looped", looped(system))):
        for rounds in ROUNDS:
            answers = one.answer(rows, rounds=rounds, batch_size=BATCH)
            cells.append({"system": name, "rounds": rounds, "correct": right(answers, rows)})
    return heading(count) | {"role": ROLE}, cells


def looped(system: RecursiveMAS) -> RecursiveMAS:
    """The solver alone: it reads the question, then its own latents of the pass before."""
    later = RELAY.prompts[ROLE]["first"].replace("{{from:critic}}", f"{{{{from:{ROLE}}}}}")
    prompt = PromptSpec(later.replace(f"{{{{from:{ROLE}}}}}", "{{question}}"), later)
    alone = RecursiveMAS(
        {ROLE: system.agents[ROLE]},
        {ROLE: system.inner_links[ROLE]},
        {},
        Pattern(((ROLE,),)),
        settings={ROLE: replace(system.settings[ROLE], prompt=prompt)},
    )
    return looped_model(alone)
