"""Templates translated from a clone's prompt builders render to what the builders would have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from recmas.prompts.renderer import PromptRenderer
from recmas.prompts.template import Slot, Template
from recmas.upstream.clone import read_prompts
from recmas.upstream.styles import (
    DELIBERATION_FAMILY,
    DISTILLATION_FAMILY,
    FAMILIES,
    MIXTURE_FAMILY,
    SEQUENTIAL_FAMILY,
    Family,
)
from tests.runtime.sandbox.needed import needs_sandbox
from tests.runtime.tiny import tiny_tokenizer
from tests.runtime.upstream.fakes import BUILDERS, load_builders, write_clone

pytestmark = needs_sandbox
FAKE = load_builders()
QUESTION = "How many {{mice}} fit?\n  {a} 3 < 4?"
CHOICES = "Which?\nA. mice\nB. cats\nC. owls\nD. none"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clone(tmp_path_factory.mktemp("clone"))


def reference_prompts(
    family: Family, question: str, task: str, task_type: str = "complete", fn_name: str | None = None
) -> dict[tuple[str, int], tuple[str, dict[str, str]]]:
    """(role, round) -> what the builders write for `question`, and the sender of each slot string."""
    form = {"task_type": task_type, "fn_name": fn_name}
    hie = {"mas_task": task, **form}
    if family is SEQUENTIAL_FAMILY:
        if task == "choice":
            question = FAKE.ensure_choice_instruction(question)
        kind, own = ("code", form) if task == "code" else ("math", {})

        class Args:
            solver_pre_question = choice_old_prompt = 0

        build = {
            name: getattr(FAKE, f"build_{kind}_{name}")
            for name in (
                "planner_prompt",
                "planner_prompt_with_feedback_slot",
                "refiner_prompt_with_slot",
                "solver_prompt_with_slots",
            )
        }
        return {
            ("planner", 1): (build["planner_prompt"](question, **own), {}),
            ("planner", 2): (
                build["planner_prompt_with_feedback_slot"](question, **own).replace("You are in round 2 now.\n", ""),
                {FAKE.FEEDBACK_SLOT: "solver"},
            ),
            ("critic", 1): (build["refiner_prompt_with_slot"](question, **own), {FAKE.PLANNER_SLOT: "planner"}),
            ("solver", 1): (
                build["solver_prompt_with_slots"](question, args=Args(), **own),
                {FAKE.REFINED_SLOT: "critic"},
            ),
        }
    if family is MIXTURE_FAMILY:
        prompts = {}
        for role in ("math", "code", "science"):
            hie_role = f"hie_{role}_expert"
            prompts[role, 1] = (FAKE.build_hie_expert_prompt(question, hie_role, **hie), {})
            later = FAKE.build_hie_expert_prompt_with_feedback_slot(question, hie_role, **hie)
            prompts[role, 2] = (later, {FAKE.HIE_FEEDBACK_SLOT: "summarizer"})
        slots = {FAKE.HIE_MATH_EXPERT_SLOT: "math", FAKE.HIE_CODE_EXPERT_SLOT: "code"}
        slots[FAKE.HIE_SCIENCE_EXPERT_SLOT] = "science"
        return {**prompts, ("summarizer", 1): (FAKE.build_hie_summarizer_prompt_with_slots(question, **hie), slots)}
    if family is DISTILLATION_FAMILY:
        later = FAKE.build_distill_expert_prompt_with_feedback_slot(question, **hie)
        learner = FAKE.build_distill_learner_prompt_with_slot(question, **hie)
        return {
            ("expert", 1): (FAKE.build_distill_expert_prompt(question, **hie), {}),
            ("expert", 2): (later, {FAKE.DISTILL_FEEDBACK_SLOT: "learner"}),
            ("learner", 1): (learner, {FAKE.DISTILL_EXPERT_SLOT: "expert"}),
        }
    later = FAKE.build_deliberation_reflector_prompt_with_feedback_slot(question, **hie)
    caller = FAKE.build_deliberation_toolcaller_prompt_with_slot(question, **hie)
    return {
        ("reflector", 1): (FAKE.build_deliberation_reflector_prompt(question, **hie), {}),
        ("reflector", 2): (later, {FAKE.DELIBERATION_FEEDBACK_SLOT: "toolcaller"}),
        ("toolcaller", 1): (caller, {FAKE.DELIBERATION_REFLECTOR_SLOT: "reflector"}),
    }


@pytest.mark.parametrize("task", ["math", "code", "choice"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_token_segments_equal_the_builders_own(clone: Path, family: Family, task: str) -> None:
    """Chat-rendered builder text, cut at its slot strings, each piece tokenised: the segments of our template."""
    question = CHOICES if task == "choice" else QUESTION
    found = read_prompts(clone, family, task)
    tokenizer = tiny_tokenizer()
    renderer = PromptRenderer(tokenizer, True, found.system)
    for (role, round), (text, slots) in reference_prompts(family, question, task).items():
        messages = [{"role": "system", "content": found.system}, {"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected: list[list[int] | Slot] = []
        for slot in sorted(slots, key=text.index):
            before, rendered = rendered.split(slot)
            expected += [tokenizer(before, add_special_tokens=False)["input_ids"], Slot((slots[slot],))]
        expected.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        segments = renderer.segments(Template(found.prompts[role].at(round)), {"question": question})
        assert segments == [piece for piece in expected if piece], (role, round)


def test_system_messages(clone: Path) -> None:
    assert read_prompts(clone, SEQUENTIAL_FAMILY, "math").system == "Mind your manners."
    assert read_prompts(clone, DELIBERATION_FAMILY, "math").system == "Use <tool> tags."


def test_only_first_stages_have_a_prompt_of_their_own_for_round_one(clone: Path) -> None:
    prompts = read_prompts(clone, SEQUENTIAL_FAMILY, "math").prompts
    assert [role for role, prompt in prompts.items() if prompt.first] == ["planner"]
    assert all(prompt.later for prompt in prompts.values())


def test_function_form_takes_the_name_from_the_row(clone: Path) -> None:
    found = read_prompts(clone, SEQUENTIAL_FAMILY, "code", code_form="function")
    expected = reference_prompts(SEQUENTIAL_FAMILY, QUESTION, "code", "function", "weigh")["planner", 1][0]
    row = {"question": QUESTION, "fn_name": "weigh"}
    assert Template(str(found.prompts["planner"].first)).render(row) == [expected]
    assert Template(str(read_prompts(clone, SEQUENTIAL_FAMILY, "code").prompts["planner"].first)).fields == (
        "question",
    )


def test_quirks(clone: Path) -> None:
    """A fixed round number, mathematical feedback on code, and the other answer format stay only when asked for."""

    def planner(task: str, quirks: bool) -> str:
        return str(read_prompts(clone, SEQUENTIAL_FAMILY, task, reference_quirks=quirks).prompts["planner"].later)

    assert "round 2" in planner("math", True)
    assert "round 2" not in planner("math", False)
    assert planner("math", True).replace("You are in round 2 now.\n", "") == planner("math", False)
    assert planner("code", True) == planner("math", True)
    assert planner("code", False).startswith("Sketch code anew.")
    for quirks, line in ((True, "Letter only."), (False, "Name the letter.")):
        found = read_prompts(clone, SEQUENTIAL_FAMILY, "choice", reference_quirks=quirks).prompts["solver"]
        assert str(found.later).endswith(line)


def test_the_newer_layout_is_preferred(tmp_path: Path) -> None:
    write_clone(tmp_path)
    write_clone(tmp_path, "inference", BUILDERS.replace("Sketch a route.", "Newer."))
    assert str(read_prompts(tmp_path, SEQUENTIAL_FAMILY, "math").prompts["planner"].first).startswith("Newer.")


def test_nothing_is_written_into_the_clone(tmp_path: Path) -> None:
    write_clone(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    read_prompts(tmp_path, SEQUENTIAL_FAMILY, "choice")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def build_math_planner_prompt(", "def renamed(", "has no build_math_planner_prompt"),
        ("REFINED_SLOT, FEEDBACK_SLOT = ", "REFINED_SLOT, OTHER = ", "module prompts has no FEEDBACK_SLOT"),
        (
            "{question}\\n{PLANNER_SLOT}",
            "{question}\\n",
            "build_math_refiner_prompt_with_slot holds PLANNER_SLOT 0 times",
        ),
        ("Sketch a route.\\n{question}", "Sketch a route.", "build_math_planner_prompt does not hold the question"),
        ("Sketch a route.", "Sketch {{{{a}}}} route.", "braces next to each other"),
        ("Sketch a route.", "Sketch a route {len(question)} {question[-1]}.", "changes with the question's wording"),
        ('return f"Sketch a route', 'raise KeyError("no route")\n    return f"Sketch a route', "KeyError: 'no route'"),
        ("import re\n", "import re, absent_module_of_nobody\n", "No module named 'absent_module_of_nobody'"),
        ("import re\n", "import re, os; os._exit(3)\n", "ended with status 3"),
        ('SYSTEM_PROMPT = "Mind your manners."', "SYSTEM_PROMPT = 5", "SYSTEM_PROMPT gives int, expected a text"),
    ],
)
def test_a_clone_that_does_not_fit_is_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in BUILDERS
    clone = write_clone(tmp_path, builders=BUILDERS.replace(old, new))
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        read_prompts(clone, SEQUENTIAL_FAMILY, "math")
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_clone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="code: no such folder: .*absent"):
        read_prompts(tmp_path / "absent", SEQUENTIAL_FAMILY, "math")
    with pytest.raises(ValueError, match="holds neither inference/prompts.py nor prompts.py"):
        read_prompts(tmp_path, SEQUENTIAL_FAMILY, "math")


def hostile(tmp_path: Path, line: str) -> Path:
    """A clone that does something else when its prompts are imported."""
    return write_clone(tmp_path / "clone", builders=f"{line}\n{BUILDERS}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import os\nwhile True: os.write(1, bytes(1 << 20))", "OSError: [Errno 27] File too large"),
        ("import os\nwhile True: os.write(2, bytes(1 << 20))", "OSError: [Errno 27] File too large"),
        ("import os\nos.write(1, b'[' * 3_000_000)\nos._exit(0)", "ended with status 0"),
        ("import os\nos.write(1, b'[1, 2]')\nos._exit(0)", "ended with status 0"),
        ("import os\nos.write(1, b'{\"texts\": [3]}')\nos._exit(0)", "did not give 4 texts"),
        ("raise ValueError('\\x1b[2J' + 'a\\n' * 10_000)", "ValueError: [2Ja a a"),
        ("x = bytearray(1 << 36)", "MemoryError"),
    ],
)
def test_a_hostile_clone_is_one_short_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n\x1b]*$") as caught:
        read_prompts(hostile(tmp_path, line), SEQUENTIAL_FAMILY, "math")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_clone_reads_and_writes_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its module finds is what the sandbox leaves: none of our files, variables or sockets."""
    secret = tmp_path / "secret"
    secret.write_text("key")
    monkeypatch.setenv("RECMAS_TEST_KEY", "key")
    line = f"""
import os, socket
found = ["variable"] if "RECMAS_TEST_KEY" in os.environ else []
for what, reach in (
    ("file", lambda: open({str(secret)!r})),
    ("socket", lambda: socket.socket()),
    ("own file", lambda: open(__file__, "a")),
):
    try:
        reach()
        found.append(what)
    except OSError:
        pass
assert not found, found
"""
    found = read_prompts(hostile(tmp_path, line), SEQUENTIAL_FAMILY, "math")
    assert found.system == "Mind your manners."
    with pytest.raises(ValueError, match=r"AssertionError: \['file', 'socket', 'own file'\]"):
        read_prompts(hostile(tmp_path / "again", line), SEQUENTIAL_FAMILY, "math", sandbox="none")
