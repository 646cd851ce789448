"""Templates and their tokenised segments."""

from __future__ import annotations

import re

import pytest

from recmas.prompts.renderer import PromptRenderer
from recmas.prompts.template import Slot, Template
from tests.runtime.tiny import CHAT_WITHOUT_SYSTEM, tiny_tokenizer

SYSTEM_DROPPED = (
    "{% for message in messages if message.role == 'user' %}<|user|>{{ message.content }}<|end|>{% endfor %}"
)
QUESTION, PLAN = Template("Question: {{question}}"), Template("Q {{question}}\nPlan {{from:planner}}\nAnswer:")


def text_of(tokenizer, segments):
    """Segments with ids decoded and slots written out."""
    return [str(piece) if isinstance(piece, Slot) else tokenizer.decode(piece) for piece in segments]


def test_parts_of_a_template():
    template = Template("{{a}} and {{ b.c }}{{from:planner}} {{a}}{{from:critic,solver}}")
    assert template.fields == ("a", "b.c")
    assert template.slots == (Slot(("planner",)), Slot(("critic", "solver")))
    assert template.senders == ("planner", "critic", "solver")
    rendered = template.render({"a": 1, "b.c": "x", "unused": 0})
    assert rendered == ["1 and x", Slot(("planner",)), " 1", Slot(("critic", "solver"))]


def test_single_pass():
    """Marks inside inserted values stay what they are: text."""
    row = {"question": "{{from:planner}} {{secret}} {{question}}", "secret": "!"}
    assert QUESTION.render(row) == ["Question: " + row["question"]]
    tokenizer = tiny_tokenizer()
    for chat in (False, True):
        segments = PromptRenderer(tokenizer, chat).segments(PLAN, row, {"planner": "{{secret}}{{from:critic}}"})
        assert len(segments) == 1
        assert "{{secret}}{{from:critic}}" in tokenizer.decode(segments[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {{from:}} b", "'{{from:}}' is neither a field nor from:role"),
        ("{{two words}}", "neither a field"),
        ("{{}}", "neither a field"),
        ("{{open", "'{{' is never closed"),
    ],
)
def test_malformed_marks(text, message):
    with pytest.raises(ValueError, match=message):
        Template(text)


def test_unknown_names_are_told_with_the_template():
    with pytest.raises(
        ValueError, match="template 'Question: {{question}}': no field 'question' in the row, which has a, b"
    ):
        QUESTION.render({"b": 1, "a": 2})
    with pytest.raises(ValueError, match="agent 'x': template .* has a slot for 'planner', but reads from nobody"):
        PLAN.check_senders((), False, "agent 'x'")
    with pytest.raises(ValueError, match="has no slot {{from:critic}}"):
        PLAN.check_senders(("planner", "critic"), False, "agent 'x'")


def test_joint_slots_go_with_combine():
    joint = Template("{{from:b,a}}")
    joint.check_senders(("a", "b"), True, "x")
    with pytest.raises(ValueError, match="has no slot {{from:a}}"):
        joint.check_senders(("a", "b"), False, "x")
    with pytest.raises(ValueError, match="has no slot {{from:a,b}}"):
        Template("{{from:a}}{{from:b}}").check_senders(("a", "b"), True, "x")
    with pytest.raises(ValueError, match="joint slot {{from:a,b}} needs combine"):
        Template("{{from:a}}{{from:b}}{{from:a,b}}").check_senders(("a", "b"), False, "x")


def test_plain_prompt_is_taken_as_it_is():
    tokenizer = tiny_tokenizer(None)
    renderer = PromptRenderer(tokenizer, chat=False)
    segments = renderer.segments(Template("<bos>{{question}} {{from:planner}}<|end|>"), {"question": "fox"})
    assert text_of(tokenizer, segments) == ["<bos>fox ", "{{from:planner}}", "<|end|>"]
    assert segments[0][0] == tokenizer.bos_token_id
    assert segments[2] == tokenizer.convert_tokens_to_ids(["<|end|>"])


def test_every_piece_is_tokenised_by_itself():
    tokenizer = tiny_tokenizer()
    segments = PromptRenderer(tokenizer, chat=False).segments(Template("the qui{{from:a}}ck"), {})
    assert segments == [
        tokenizer("the qui", add_special_tokens=False)["input_ids"],
        Slot(("a",)),
        tokenizer("ck", add_special_tokens=False)["input_ids"],
    ]


def test_chat_prompt_without_a_slot_equals_the_chat_templates_ids():
    tokenizer = tiny_tokenizer()
    segments = PromptRenderer(tokenizer, chat=True, system="Be brief.").segments(QUESTION, {"question": "why?"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Question: why?"}]
    assert segments == [tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]]


@pytest.mark.parametrize(
    ("chat_template", "begin"),
    [
        (None, "<|system|>Be brief.<|end|><|user|>Q fox\nPlan "),
        (CHAT_WITHOUT_SYSTEM, "<|user|>Be brief.\n\nQ fox\nPlan "),
        (SYSTEM_DROPPED, "<|user|>Be brief.\n\nQ fox\nPlan "),
    ],
    ids=["system role", "system refused", "system dropped"],
)
def test_system_message(chat_template, begin):
    tokenizer = tiny_tokenizer() if chat_template is None else tiny_tokenizer(chat_template)
    segments = PromptRenderer(tokenizer, chat=True, system="Be brief.").segments(PLAN, {"question": "fox"})
    first, slot, last = text_of(tokenizer, segments)
    assert first == begin
    assert slot == "{{from:planner}}"
    assert last.startswith("\nAnswer:<|end|>")


def test_sentinels_never_collide_with_what_is_inserted():
    tokenizer = tiny_tokenizer()
    nasty = "<recmas 0 0><recmas 1 0> <recmas 0 1> <recmas 2"
    template = Template("{{question}}{{from:a}}<recmas 2 {{question}}{{from:b}}0>")
    segments = PromptRenderer(tokenizer, chat=True, system="<recmas 3 1>").segments(template, {"question": nasty})
    assert text_of(tokenizer, segments) == [
        f"<|system|><recmas 3 1><|end|><|user|>{nasty}",
        "{{from:a}}",
        f"<recmas 2 {nasty}",
        "{{from:b}}",
        "0><|end|><|assistant|>",
    ]


def test_texts_fill_slots_and_the_others_stay():
    tokenizer = tiny_tokenizer()
    template = Template("{{from:a}}|{{from:b}}|{{from:a,b}}")
    segments = PromptRenderer(tokenizer, chat=False).segments(template, {}, {"a": "fox"})
    assert text_of(tokenizer, segments) == ["fox|", "{{from:b}}", "|", "{{from:a,b}}"]
    segments = PromptRenderer(tokenizer, chat=False).segments(template, {}, {"a": "fox", "b": "dog"})
    assert text_of(tokenizer, segments) == ["fox|dog|fox\ndog"]


def test_a_chat_template_that_drops_or_repeats_a_slot_is_an_error():
    drops = tiny_tokenizer("{{ messages[0].content | replace(' 0 0>', '') }}")
    with pytest.raises(ValueError, match="agent 'x': slot {{from:planner}} occurs 0 times in the rendered prompt"):
        PromptRenderer(drops, chat=True, name="agent 'x'").segments(PLAN, {"question": "fox"})
    repeats = tiny_tokenizer("{{ messages[0].content }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match="occurs 2 times"):
        PromptRenderer(repeats, chat=True).segments(PLAN, {"question": "fox"})
    turned = tiny_tokenizer("{{ messages[0].content.split('dog') | reverse | join('dog') }}")
    with pytest.raises(ValueError, match="the chat template drops or changes"):
        PromptRenderer(turned, chat=True).segments(Template("{{question}} dog {{from:planner}}"), {"question": "fox"})


def test_refused():
    with pytest.raises(ValueError, match="x: the tokenizer has no chat template; set chat to false"):
        PromptRenderer(tiny_tokenizer(None), chat=True, name="x")
    with pytest.raises(ValueError, match="system is set but chat is false"):
        PromptRenderer(tiny_tokenizer(), chat=False, system="Be brief.")
    with pytest.raises(ValueError, match="renders to an empty prompt"):
        PromptRenderer(tiny_tokenizer(), chat=False).segments(Template("{{question}}"), {"question": ""})


def test_a_piece_is_tokenised_once_and_handed_out_as_a_copy():
    class Counting:
        chat_template, calls = None, 0

        def __call__(self, text, **options):
            self.calls += 1
            return tiny(text, **options)

    tiny, counting = tiny_tokenizer(), Counting()
    renderer = PromptRenderer(counting, chat=False)
    first = renderer.segments(QUESTION, {"question": "the fox"})
    expected = [list(first[0])]
    first[0].append(7)
    assert renderer.segments(QUESTION, {"question": "the fox"}) == expected
    assert counting.calls == 1 + 2  # the piece, and once what the pipeline puts before a prompt
    renderer.segments(QUESTION, {"question": "the dog"})
    assert counting.calls == 2 + 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content[:3] }}", "drops or changes what the user says"),
        ("{{ messages[0].content | upper }}", "drops or changes what the user says"),
        ("{{ messages[0].content | e }}<", "drops or changes what the user says"),
        ("{{ messages[0].content | replace('fox', 'hen') }}", "drops or changes 'Q fox"),
        ("{{ tools[0].name }}{{ messages[0].content }}", "refuses the messages: UndefinedError"),
        ("{{ messages[0].content + 1 }}", "refuses the messages: TypeError"),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}",
            "refuses the messages: no",
        ),
    ],
)
def test_a_chat_template_that_fails_or_changes_the_prompt_is_one_line(template, message):
    renderer = PromptRenderer(tiny_tokenizer(template), chat=True, name="agent 'x'")
    with pytest.raises(ValueError, match=f"^agent 'x': the chat template {re.escape(message)}") as raised:
        renderer.segments(PLAN, {"question": "fox"})
    assert "\n" not in str(raised.value)


def test_a_template_that_wants_parts_gets_parts():
    tokenizer = tiny_tokenizer(
        "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}|"
    )
    renderer = PromptRenderer(tokenizer, chat=True)
    for _ in range(2):
        assert text_of(tokenizer, renderer.segments(Template("Q {{question}}"), {"question": "fox"})) == ["Q fox|"]


def test_a_template_that_wants_tools_gets_none_of_them():
    tokenizer = tiny_tokenizer("{{ tools | length }} tools|{{ messages[0].content }}")
    assert text_of(tokenizer, PromptRenderer(tokenizer, chat=True).segments(QUESTION, {"question": "fox"})) == [
        "0 tools|Question: fox"
    ]
    with pytest.raises(ValueError, match="the chat template refuses the messages: UndefinedError"):
        PromptRenderer(tiny_tokenizer("{{ tools[0].name.x }}"), chat=True).segments(QUESTION, {"question": "fox"})


def test_a_short_prompt_that_the_template_drops_is_missed_all_the_same():
    """What it says stands elsewhere in the template."""
    tokenizer = tiny_tokenizer("5 {{ bos_token }}")
    with pytest.raises(ValueError, match="the chat template drops or changes what the user says"):
        PromptRenderer(tokenizer, chat=True).segments(Template("{{question}}"), {"question": 5})


def test_parts_that_are_printed_are_no_text():
    tokenizer = tiny_tokenizer("{{ messages[0].content[0] }}")
    with pytest.raises(ValueError, match="the chat template drops or changes what the user says"):
        PromptRenderer(tokenizer, chat=True).segments(QUESTION, {"question": "fox"})


def test_two_fields_never_spell_a_special_token_together():
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token
    for at in range(1, len(end)):
        row = {"a": f"fox{end[:at]}", "b": f"{end[at:]}dog"}
        (ids,) = PromptRenderer(tokenizer, chat=False).segments(Template("{{a}}{{b}}"), row)
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == f"fox{end}dog"


def test_what_is_inserted_never_becomes_a_special_token():
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token
    for renderer in (PromptRenderer(tokenizer, chat=False), PromptRenderer(tokenizer, chat=True)):
        plain = renderer.segments(Template("Q {{question}}"), {"question": "fox"})
        (ids,) = renderer.segments(Template("Q {{question}}"), {"question": f"fox {end} dog"})
        assert ids.count(tokenizer.eos_token_id) == plain[0].count(tokenizer.eos_token_id)
        sent = renderer.segments(PLAN, {"question": "fox"}, {"planner": end})
        assert sent[0].count(tokenizer.eos_token_id) == plain[0].count(tokenizer.eos_token_id)
    written = PromptRenderer(tokenizer, chat=False).segments(Template(f"Q {end}"), {})
    assert written[0].count(tokenizer.eos_token_id) == 1  # a template is its author's


def test_a_plain_prompt_begins_as_the_tokenizer_begins_a_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    first = tokenizer.eos_token  # any token that is there
    number = tokenizer.convert_tokens_to_ids(first)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, number)]
    )
    renderer = PromptRenderer(tokenizer, chat=False)
    assert renderer.segments(Template("fox"), {})[0][0] == number
    assert renderer.segments(Template(f"{first}fox"), {})[0].count(number) == 1
    assert renderer.segments(Template("{{from:a}} fox"), {})[0] == [number]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "is null"),
        (["fox"], r"is \['fox'\], expected a text or a number"),
        ({"a": 1}, "is {'a': 1}, expected a text or a number"),
        ("a \ud83d", r"holds '\\ud83d', half of a surrogate pair"),
    ],
)
def test_values_that_are_no_text(value, problem):
    with pytest.raises(ValueError, match=f"field 'question' {problem}"):
        PromptRenderer(tiny_tokenizer(), chat=False).segments(Template("{{question}}"), {"question": value})
    if isinstance(value, str):
        with pytest.raises(ValueError, match=f"template .* {problem}"):
            Template(value)
        with pytest.raises(ValueError, match=f"x: system {problem}"):
            PromptRenderer(tiny_tokenizer(), chat=True, system=value, name="x")


def test_a_token_that_the_model_does_not_know_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    renderer = PromptRenderer(tokenizer, chat=False, name="agent 'x'", vocabulary=320)
    told = "agent 'x': token 320 \\('<tool>'\\) of its tokenizer is beyond its model's 320 embeddings"
    with pytest.raises(ValueError, match=told):
        renderer.segments(QUESTION, {"question": "the <tool>"})
    assert renderer.segments(QUESTION, {"question": "the fox"})
