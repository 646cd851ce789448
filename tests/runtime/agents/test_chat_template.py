"""Chat templates are programs of whoever made the model: bounded in time and memory, and every failure is one line."""

from __future__ import annotations

import os
import resource

import pytest

from recmas.agents import chat_template
from recmas.agents.chat_template import ChatTemplate
from recmas.prompts.renderer import ChatTemplateError, PromptRenderer
from recmas.prompts.template import Template
from tests.runtime.tiny import CHAT, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "fox"}]
HOSTILE = {
    "code": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: access to attribute '__class__'"),
    "code by a filter": ("{{ ('' | attr('__class__')).mro() }}", "SecurityError|UndefinedError"),
    "a file": ("{% include '/etc/passwd' %}", "TypeError|TemplateNotFound|no loader"),
    "no template": ("{% for %}", "TemplateSyntaxError"),
    "division by zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "a raised error": ("{{ raise_exception('two\nlines') }}", "two$"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "much memory": ("{{ 'a' * 10 ** 10 }}", "512 MiB of memory|ended with status"),
    "memory bit by bit": (
        "{% set n = namespace(t='a' * 2 ** 20) %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
        "512 MiB of memory|ended with status",
    ),
    "a long range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError|Range too big"),
    "a large power": ("{{ 9 ** (9 ** 9) }}", "takes more than 2 seconds of processor time"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line_and_the_next_one_works(name):
    template, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message) as raised:
        ChatTemplate(tiny_tokenizer(template))(MESSAGES)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert ChatTemplate(tiny_tokenizer(CHAT))(MESSAGES) == "<|user|>fox<|end|><|assistant|>"


def test_an_agent_s_prompt_names_the_agent():
    for_ever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = tiny_tokenizer(for_ever)
    renderer = PromptRenderer(tokenizer, True, name="agent 'x'", apply=ChatTemplate(tokenizer))
    with pytest.raises(ValueError, match="^agent 'x': the chat template takes more than 2 seconds") as raised:
        renderer.segments(Template("fox"), {})
    assert not isinstance(
        raised.value, ChatTemplateError
    )  # which would have been tried in other ways, two seconds each


def test_a_process_that_holds_many_files_open_applies_templates():
    """A server that has a thousand connections, when the first chat comes."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, limits[1]), limits[1]))
    opened = []
    try:
        while not opened or opened[-1] < 1024:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        chat_template._running.clear()
        assert ChatTemplate(tiny_tokenizer(CHAT))(MESSAGES) == "<|user|>fox<|end|><|assistant|>"
    finally:
        chat_template._running.clear()
        for handle in opened:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_template_s_process_has_nothing_of_our_environment(monkeypatch):
    monkeypatch.setenv("RECMAS_SECRET", "hidden")
    chat_template._running.clear()
    process = chat_template._process()
    with open(f"/proc/{process._process.pid}/environ", "rb") as environment:
        assert b"hidden" not in environment.read()
    text = ChatTemplate(tiny_tokenizer("{{ '{0.__class__} {0.__init__}'.format('') }}|{{ environment }}"))(MESSAGES)
    assert text == " |"
