"""Templates of a megabyte: parsed, checked and rendered in linear time. What grew with the square took hours."""

from __future__ import annotations

import pytest

from recmas import Pattern
from recmas.config.system_json import MAX_TEMPLATE
from recmas.prompts.renderer import PromptRenderer, unused_stem
from recmas.prompts.template import Slot, Template
from tests.runtime.limits import within
from tests.runtime.tiny import tiny_tokenizer

SECONDS = 12
HOSTILE = {
    "openings": "{{",
    "openings and names": "{{a",
    "closings": "}}",
    "empty marks": "{{}}",
    "marks": "{{a}}",
    "spaces": "{{ " + " " * 100,
    "slots": "{{from:a}}",
    "senders": "{{from:" + "a," * 1000,
    "names": "{{" + "a" * 1000,
    "sentinels": "<recmas ",
}


def repeated(text: str, share: int = 1) -> str:
    return text * (MAX_TEMPLATE // share // len(text))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(("end", "share"), [("", 1), ("}}", 4), ("!}}", 4)])
def test_parsing_is_linear(name, end, share):
    def parse():
        try:
            return len(Template(repeated(HOSTILE[name], share) + end).fields)
        except ValueError as error:
            return len(str(error))

    assert within(SECONDS // share, parse) < 300


def test_slots_are_compared_in_linear_time():
    """Of 63 agents that send to one, whose template is a megabyte of slots for another sender."""
    roles = tuple(f"r{number}" for number in range(63))
    pattern = Pattern((roles, ("last",)))
    senders = pattern.senders("last", 1)
    template = Template(repeated("{{from:r0}}") + "".join(f"{{{{from:{role}}}}}" for role in roles))
    within(SECONDS, lambda: [template.check_senders(senders, False, "x") for _ in range(20)])


def test_a_prompt_is_rendered_in_linear_time():
    """As many slots as the template holds, with texts between them that are all different, in a chat template."""
    count = MAX_TEMPLATE // 20
    template = Template("".join(f"{number:x} {{{{from:a}}}}" for number in range(count)))
    renderer = PromptRenderer(tiny_tokenizer("{{ messages[0].content }}"), chat=True)
    found = within(SECONDS, lambda: sum(isinstance(part, Slot) for part in renderer.segments(template, {})))
    assert found == count


def test_a_sentinel_is_found_in_linear_time():
    taken = "".join(f"<recmas {number} " for number in range(MAX_TEMPLATE // 12))
    assert within(SECONDS, lambda: unused_stem([taken] * 10)) == f"<recmas {MAX_TEMPLATE // 12} "
