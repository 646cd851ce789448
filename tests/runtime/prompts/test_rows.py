"""Chats as rows: the last message is the question, the earlier ones stand before it in the chat template."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import numpy as np
import pytest

from recmas import SEQUENTIAL, Agent, RecursiveMAS
from recmas.config.system_json import AgentSpec, PromptSpec
from recmas.prompts.renderer import PromptRenderer
from recmas.prompts.rows import ChatRow, check_fields, earlier, read_row
from recmas.prompts.template import Slot, Template
from tests.runtime.tiny import CHAT_WITHOUT_SYSTEM, tiny_agent, tiny_tokenizer


def message(role, content):
    return {"role": role, "content": content}


CHAT = [
    message("system", "Be brief."),
    message("user", "the fox"),
    message("assistant", "which one?"),
    message("user", "the {{from:a}} lazy one"),
]
TEMPLATE = Template("Q {{question}} N {{from:a}} A")


def rendered(renderer, row, template=TEMPLATE):
    """The prompt as text, slots as they are written."""
    decode = renderer.tokenizer.decode
    segments = renderer.segments(template, row)
    return [str(segment) if isinstance(segment, Slot) else decode(segment) for segment in segments]


@pytest.mark.parametrize("system", [None, "You plan."])
def test_earlier_messages_stand_before_the_prompt(system):
    row = read_row(CHAT, 0)
    before, slot, after = rendered(PromptRenderer(tiny_tokenizer(), True, system), row)
    said = "Be brief." if system is None else "You plan.\n\nBe brief."
    assert before == (
        f"<|system|>{said}<|end|><|user|>the fox<|end|><|assistant|>which one?<|end|>"
        "<|user|>Q the {{from:a}} lazy one N "
    )
    assert slot == "{{from:a}}"
    assert after == " A<|end|><|assistant|>"


def test_system_messages_join_the_first_user_message_where_the_template_has_none():
    renderer = PromptRenderer(tiny_tokenizer(CHAT_WITHOUT_SYSTEM), True, "You plan.")
    before, _, _ = rendered(renderer, read_row(CHAT, 0))
    assert before.startswith("<|user|>You plan.\n\nBe brief.\n\nthe fox<|end|><|assistant|>which one?<|end|><|user|>Q ")


def test_a_chat_of_one_message_is_its_question():
    for chat in (True, False):
        renderer = PromptRenderer(tiny_tokenizer(), chat)
        assert rendered(renderer, read_row(CHAT[-1:], 0)) == rendered(renderer, {"question": "the {{from:a}} lazy one"})


def test_rows():
    assert read_row("fox", 0) == {"question": "fox"}
    both = {"question": "fox", "messages": "a field like any other"}
    assert read_row(both, 0) is both
    row = read_row({"messages": CHAT, "sheet": "x"}, 0)
    assert isinstance(row, ChatRow)
    assert row == {"question": CHAT[-1]["content"], "sheet": "x"}
    assert earlier(row) == tuple(CHAT[:-1])


@pytest.mark.parametrize("value", ["", "fox", 0, -1.5, Decimal("0.10"), 10**400, np.int64(3), np.float32(0.5)])
def test_a_field_is_a_text_or_a_number(value):
    check_fields({"question": value}, 0, {"question": "planner"})


@pytest.mark.parametrize(
    "value", [None, True, np.True_, float("nan"), float("inf"), np.float64("nan"), [], {}, {1}, date(2026, 1, 2)]
)
def test_a_field_of_another_kind_is_refused(value):
    with pytest.raises(ValueError, match="row 3: field 'question' is "):
        check_fields({"question": value}, 3, {"question": "planner"})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([], r"row 4: messages: expected a list of at least one message, got \[\]"),
        ({"messages": "fox"}, "row 4: messages: expected a list of at least one message, got 'fox'"),
        (["fox"], "row 4, message 0: 'fox' is not an object with role and content"),
        ([{"role": "user"}], "row 4, message 0: {'role': 'user'} is not an object with role and content"),
        ([message("user", 3)], "row 4, message 0: content: int, expected a string"),
        ([message("tool", "x")], "row 4, message 0: role 'tool', expected system or user"),
        ([CHAT[1], CHAT[1]], "row 4, message 1: role 'user', expected assistant"),
        (CHAT[:3], "row 4: the last message is of role 'assistant', expected user: the question"),
        (CHAT[:1], "row 4: the last message is of role 'system', expected user: the question"),
        (3, "row 4: int, expected a string, a list of messages or a mapping"),
    ],
)
def test_bad_chats_are_one_line(row, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        read_row(row, 4)


def agents():
    return {role: tiny_agent("llama", role, seed=seed) for seed, role in enumerate(SEQUENTIAL.roles)}


def test_every_agent_reads_the_chat():
    mas = RecursiveMAS.create(agents(), SEQUENTIAL, rounds=2, latent_steps=2, seed=0)
    rows = [CHAT, "fox", CHAT[-1:], {"messages": CHAT}]
    answers = mas.answer(rows, max_new_tokens=8, trace=True)
    alone = mas.answer([CHAT], max_new_tokens=8, trace=True)[0]
    assert answers[0].text == answers[3].text == alone.text
    for index in range(5):
        chat, bare = answers[0].handoffs[index].latents, answers[2].handoffs[index].latents
        assert not chat.allclose(bare, rtol=1e-2)
        assert chat.allclose(alone.handoffs[index].latents, atol=1e-5)
    assert "".join(mas.stream(CHAT, max_new_tokens=8)) == alone.text


def test_chats_that_an_agent_cannot_read_are_told_before_any_model_runs(monkeypatch):
    monkeypatch.setattr(Agent, "think", lambda *_: pytest.fail("a model ran"))
    settings = {role: AgentSpec("", PromptSpec("{{question}}"), chat=role != "solver") for role in SEQUENTIAL.roles}
    prompts = {"critic": "{{question}}{{from:planner}}", "solver": "{{question}}{{from:critic}}"}
    for role, text in prompts.items():
        settings[role].prompt = PromptSpec(text)
    mas = RecursiveMAS(agents(), {}, {}, SEQUENTIAL, settings=settings)
    with pytest.raises(ValueError, match="agent 'solver': chat is false, so a row cannot have messages before its q"):
        mas.answer([CHAT], mode="text")
    strict = tiny_agent("llama", chat_template="{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}x")
    mas = RecursiveMAS.create({**agents(), "solver": strict}, SEQUENTIAL, rounds=1)
    with pytest.raises(ValueError, match="agent 'solver': the chat template refuses the messages: one"):
        mas.answer([CHAT[1:]])
