"""Prompt templates from the user's own clone of the reference implementation.

Its prompt builders are called, in a sandbox, with a sentinel for the question; what they return is translated into a
template: the sentinel becomes ``{{question}}``, their slot strings become ``{{from:role}}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recmas.config.system_json import PromptSpec
from recmas.prompts.template import Slot, Template
from recmas.sandbox import Limits, choose, run
from recmas.upstream.styles import Family

CODE_FORMS = ("complete", "function")
FUNCTION_FIELD = "fn_name"
_MODULE_PLACES = ("inference", ".")  # of prompts.py in a clone, newest layout first
_WORKER = Path(__file__).with_name("_builders.py")
_LIMITS = Limits(seconds=300.0, memory=8 << 30, output=4 << 20)  # memory: a clone's modules may load torch
_MOST_TOLD = 500  # characters of an error of the clone's
_FUNCTION_SENTINEL = "recmas_sentinel_function"
_ROUND_NUMBER = re.compile(r"\bround\s+\d+\b", re.IGNORECASE)


@dataclass(frozen=True)
class _Builder:
    """One call that gives a prompt: function, arguments beside the question, and the sender behind each slot."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    slots: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Recipe:
    """Where a role's templates come from; `first` only where round 1 has a prompt of its own."""

    later: _Builder
    first: _Builder | None = None


@dataclass(frozen=True)
class ClonePrompts:
    """What a clone says: the system message, and the templates by role."""

    system: str
    prompts: dict[str, PromptSpec]


def read_prompts(
    clone: Path,
    family: Family,
    task: str,
    *,
    code_form: str = "complete",
    reference_quirks: bool = False,
    sandbox: str | None = None,
) -> ClonePrompts:
    """Templates of every role of `family`, translated from the clone's builders.

    Args:
        clone: root of the clone; its code is run and its files are never written to.
        family: whose prompts.
        task: "math", "code" or "choice".
        code_form: on code, "complete" (a program that reads and prints) or "function" (rows have a field fn_name).
        reference_quirks: keep a round number that stands fixed in later rounds' prompts, the mathematical feedback
            prompt on code tasks, and the answer format the released runner uses for GPQA.
        sandbox: "bubblewrap", "landlock", or "none": its code can then do whatever this user can. By default the first
            of the two that works here.

    Raises:
        ValueError: no clone, no sandbox, a module, function or slot it lacks, or a prompt that no template can express.
    """
    folder = _module_folder(clone)
    sandbox = choose(sandbox)
    recipes = _recipes(family, task, code_form, reference_quirks)
    questions = [_sentinel(number, task) for number in (1, 2)]
    system, slot_text, asked = _constants(folder, family, task, recipes, questions, sandbox)
    wanted = [
        (role, place, builder)
        for role, recipe in recipes.items()
        for place, builder in (("first", recipe.first), ("later", recipe.later))
        if builder is not None
    ]
    calls = [_call(of.name, {"question": text, **of.arguments}) for text in asked for *_, of in wanted]
    texts = _run(folder, calls, sandbox)
    prompts = {role: PromptSpec() for role in recipes}
    for (role, place, builder), text, other in zip(wanted, texts[: len(wanted)], texts[len(wanted) :], strict=True):
        fixed_round = place == "later" and recipes[role].first is not None and not reference_quirks
        templates = [
            _translate(builder, written, question, slot_text, f"{folder}: {builder.name}", fixed_round)
            for written, question in zip((text, other), questions, strict=True)
        ]
        if templates[0] != templates[1]:  # what a builder makes of a question must be its place and nothing else
            raise ValueError(f"{folder}: the text of {builder.name} changes with the question's wording")
        setattr(prompts[role], place, templates[0])
    return ClonePrompts(system, prompts)


def _constants(
    folder: Path, family: Family, task: str, recipes: Mapping[str, _Recipe], questions: list[str], sandbox: str
) -> tuple[str, dict[str, str], list[str]]:
    """The system message, the slot strings by name, and the questions as the reference's data loader gives them."""
    builders = [builder for recipe in recipes.values() for builder in (recipe.first, recipe.later) if builder]
    slots = sorted({slot for builder in builders for slot in builder.slots})
    calls = [_call(name, None) for name in slots]
    if task == "choice" and family.name == "sequential":  # there the loader adds the instruction, no prompt does
        loader = "inference_utils.answer_utils"
        calls += [_call("ensure_choice_instruction", {"question": question}, loader) for question in questions]
    deliberates = family.name == "deliberation"
    calls.append(
        _call("get_system_prompt", {"mas_design": "deliberation"}) if deliberates else _call("SYSTEM_PROMPT", None)
    )
    *texts, system = _run(folder, calls, sandbox)
    return system, dict(zip(slots, texts[: len(slots)], strict=True)), texts[len(slots) :] or questions


def _recipes(family: Family, task: str, code_form: str, quirks: bool) -> dict[str, _Recipe]:
    form: dict[str, Any] = {"task_type": code_form, "fn_name": None}
    if task == "code" and code_form == "function":
        form["fn_name"] = _FUNCTION_SENTINEL
    if family.name == "sequential":
        kind = "code" if task == "code" else "math"
        own = form if task == "code" else {}
        choice_form = 2 if quirks and task == "choice" else 0
        final = {"args": {"solver_pre_question": 0, "choice_old_prompt": choice_form}, "mas_shape": "chain"}
        feedback = "math" if quirks else kind
        return {
            "planner": _Recipe(
                first=_Builder(f"build_{kind}_planner_prompt", own),
                later=_Builder(
                    f"build_{feedback}_planner_prompt_with_feedback_slot",
                    own if feedback == kind else {},
                    {"FEEDBACK_SLOT": "solver"},
                ),
            ),
            "critic": _Recipe(_Builder(f"build_{kind}_refiner_prompt_with_slot", own, {"PLANNER_SLOT": "planner"})),
            "solver": _Recipe(
                _Builder(f"build_{kind}_solver_prompt_with_slots", {**own, **final}, {"REFINED_SLOT": "critic"})
            ),
        }
    form["mas_task"] = task
    if family.name == "mixture":
        experts = {
            role: _Recipe(
                first=_Builder("build_hie_expert_prompt", {**form, "hie_role": f"hie_{role}_expert"}),
                later=_Builder(
                    "build_hie_expert_prompt_with_feedback_slot",
                    {**form, "hie_role": f"hie_{role}_expert"},
                    {"HIE_FEEDBACK_SLOT": "summarizer"},
                ),
            )
            for role in ("math", "code", "science")
        }
        slots = {f"HIE_{role.upper()}_EXPERT_SLOT": role for role in experts}
        return {**experts, "summarizer": _Recipe(_Builder("build_hie_summarizer_prompt_with_slots", form, slots))}
    short = "distill" if family.name == "distillation" else "deliberation"
    sender, writer = family.pattern.roles
    feedback_slot, sender_slot = f"{short.upper()}_FEEDBACK_SLOT", f"{short.upper()}_{sender.upper()}_SLOT"
    return {
        sender: _Recipe(
            first=_Builder(f"build_{short}_{sender}_prompt", form),
            later=_Builder(f"build_{short}_{sender}_prompt_with_feedback_slot", form, {feedback_slot: writer}),
        ),
        writer: _Recipe(_Builder(f"build_{short}_{writer}_prompt_with_slot", form, {sender_slot: sender})),
    }


def _translate(
    builder: _Builder, text: str, question: str, slot_text: Mapping[str, str], where: str, drop_round_number: bool
) -> str:
    """The template of what `builder` wrote for the sentinel `question`."""
    for name in builder.slots:
        if text.count(slot_text[name]) != 1:
            raise ValueError(f"{where} holds {name} {text.count(slot_text[name])} times, expected once")
    if question not in text:
        raise ValueError(f"{where} does not hold the question as it was given")
    marks = {question: "{{question}}", _FUNCTION_SENTINEL: f"{{{{{FUNCTION_FIELD}}}}}"}
    marks.update({slot_text[name]: str(Slot((sender,))) for name, sender in builder.slots.items()})
    if drop_round_number:
        lines = text.split("\n")
        text = "\n".join(
            line for line in lines if not _ROUND_NUMBER.search(line) or any(mark in line for mark in marks)
        )
    return _template(text, marks, where)


def _template(text: str, marks: Mapping[str, str], where: str) -> str:
    """`text` with sentinels replaced by marks; checked by rendering it back."""
    template = re.sub("|".join(map(re.escape, marks)), lambda found: marks[found.group()], text)
    back = {mark: sentinel for sentinel, mark in marks.items()}
    try:
        parts = Template(template).render({mark.strip("{}"): sentinel for mark, sentinel in back.items()})
        rendered = "".join(part if isinstance(part, str) else back[str(part)] for part in parts)
    except (ValueError, KeyError):
        rendered = None
    if rendered != text:
        raise ValueError(f"{where}: its text has braces next to each other, which a template would take for a mark")
    return template


def _sentinel(number: int, task: str) -> str:
    """A question that no prompt holds; on choice tasks with lettered options, by which builders know such tasks."""
    question = f"recmas sentinel question no. {number}"
    return question + "".join(f"\n{letter}. option {number}" for letter in "ABCD") if task == "choice" else question


def _call(name: str, arguments: Mapping[str, Any] | None, module: str = "prompts") -> dict[str, Any]:
    return {"module": module, "name": name, "arguments": arguments}


def _module_folder(clone: Path) -> Path:
    if not clone.is_dir():
        raise ValueError(f"code: no such folder: {clone}")
    for place in _MODULE_PLACES:
        if (clone / place / "prompts.py").is_file():
            return (clone / place).resolve()
    raise ValueError(f"code: {clone} holds neither inference/prompts.py nor prompts.py; is it a clone of the code?")


def _run(folder: Path, calls: list[dict[str, Any]], sandbox: str) -> list[str]:
    """The texts of `calls`, from an isolated interpreter that leaves no files in the clone."""
    request = json.dumps({"folder": str(folder), "calls": calls}).encode()
    done = run(_WORKER, request, sandbox, _LIMITS, more=[folder])
    if done.stopped is not None:
        raise ValueError(f"{folder}: its prompt builders were stopped {done.stopped}")
    try:
        answer = json.loads(done.output)
        error, texts = answer.get("error"), answer.get("texts")
    except (ValueError, AttributeError, RecursionError):
        last = (done.errors.decode("utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{folder}: its prompt builders ended with status {done.status}: {_told(last)}") from None
    if error is not None:
        raise ValueError(f"{folder}: {_told(str(error))}")
    if not isinstance(texts, list) or len(texts) != len(calls) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{folder}: its prompt builders did not give {len(calls)} texts")
    return texts


def _told(text: str) -> str:
    """What the clone said as one line of bounded length, without what would steer a terminal."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())[:_MOST_TOLD]
