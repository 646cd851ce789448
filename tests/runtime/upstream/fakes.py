"""A small stand-in for a clone of the reference implementation and its releases: same surface, invented texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from recmas.upstream.styles import OUTER, STYLES, Style
from recmas_kernels import RecursiveLink
from tests.runtime.tiny import tiny_model, tiny_tokenizer

BUILDERS = """
import re
from inference_utils.tool_notes import NOTES

SYSTEM_PROMPT = "Mind your manners."
PLANNER_SLOT, REFINED_SLOT, FEEDBACK_SLOT = "[[sketch]]", "[[polished sketch]]", "[[verdict]]"
HIE_MATH_EXPERT_SLOT, HIE_CODE_EXPERT_SLOT, HIE_SCIENCE_EXPERT_SLOT = "[[sums]]", "[[loops]]", "[[cells]]"
HIE_FEEDBACK_SLOT = "[[digest]]"
DISTILL_EXPERT_SLOT, DISTILL_FEEDBACK_SLOT = "[[wisdom]]", "[[doubt]]"
DELIBERATION_REFLECTOR_SLOT, DELIBERATION_FEEDBACK_SLOT = "[[musing]]", "[[findings]]"
print("imported")


def get_system_prompt(mas_design="chain", mas_role=None):
    return NOTES if mas_design == "deliberation" else SYSTEM_PROMPT


def _shape(task_type, fn_name):
    return f"Fill in {fn_name}." if task_type == "function" and fn_name else "Hand in a script."


def _body(question, mas_task, task_type, fn_name):
    if mas_task == "code":
        return f"{_shape(task_type, fn_name)}\\nExercise: {question}\\n"
    if mas_task == "choice":
        return f"Quiz: {question.rstrip()}\\nTick one box.\\n"
    return f"Riddle: {question}\\n"


def build_math_planner_prompt(question):
    return f"Sketch a route.\\n{question}\\nRoute:"


def build_math_planner_prompt_with_feedback_slot(question):
    return f"Sketch anew.\\nYou are in round 2 now.\\n{question}\\nThe verdict: {FEEDBACK_SLOT}\\nRoute:"


def build_math_refiner_prompt_with_slot(question):
    return f"Polish this.\\n{question}\\n{PLANNER_SLOT}\\nPolished:"


def build_math_solver_prompt_with_slots(question, args=None, mas_shape="chain"):
    assert mas_shape == "chain" and args.solver_pre_question == 0
    lettered = re.search(r"(?m)^B\\. ", question)
    end = ("Letter only." if args.choice_old_prompt == 2 else "Name the letter.") if lettered else "Name the number."
    return f"Walk it: {REFINED_SLOT}\\n{question}\\n{end}"


def build_code_planner_prompt(question, task_type, fn_name=None):
    return f"Sketch code. {_shape(task_type, fn_name)}\\n{question}\\nRoute:"


def build_code_planner_prompt_with_feedback_slot(question, task_type, fn_name=None):
    return f"Sketch code anew. {_shape(task_type, fn_name)}\\n{question}\\nThe verdict: {FEEDBACK_SLOT}\\nRoute:"


def build_code_refiner_prompt_with_slot(question, task_type, fn_name=None):
    return f"Polish code. {_shape(task_type, fn_name)}\\n{question}\\n{PLANNER_SLOT}\\nPolished:"


def build_code_solver_prompt_with_slots(question, task_type, args=None, mas_shape="chain", fn_name=None):
    return f"Type it. {_shape(task_type, fn_name)}\\n{REFINED_SLOT}\\n{question}\\nCode:"


def build_hie_expert_prompt(question, hie_role, mas_task="math", task_type="complete", fn_name=None):
    return f"You know {hie_role}.\\n{_body(question, mas_task, task_type, fn_name)}"


def build_hie_expert_prompt_with_feedback_slot(question, hie_role, mas_task="math", task_type="complete", fn_name=None):
    return f"Still {hie_role}: {HIE_FEEDBACK_SLOT}\\n{_body(question, mas_task, task_type, fn_name)}"


def build_hie_summarizer_prompt_with_slots(question, mas_task="math", task_type="complete", fn_name=None):
    heard = f"{HIE_MATH_EXPERT_SLOT} {HIE_CODE_EXPERT_SLOT} {HIE_SCIENCE_EXPERT_SLOT}"
    return f"Sum up {heard}\\n{_body(question, mas_task, task_type, fn_name)}Total:"


def build_distill_expert_prompt(question, mas_task="math", task_type="complete", fn_name=None):
    return f"Teach.\\n{_body(question, mas_task, task_type, fn_name)}"


def build_distill_expert_prompt_with_feedback_slot(question, mas_task="math", task_type="complete", fn_name=None):
    return f"Teach again: {DISTILL_FEEDBACK_SLOT}\\n{_body(question, mas_task, task_type, fn_name)}"


def build_distill_learner_prompt_with_slot(question, mas_task="math", task_type="complete", fn_name=None):
    return f"Learn from {DISTILL_EXPERT_SLOT}\\n{_body(question, mas_task, task_type, fn_name)}"


def build_deliberation_reflector_prompt(question, mas_task="math", task_type="complete", fn_name=None):
    return f"Muse.\\n{_body(question, mas_task, task_type, fn_name)}"


def build_deliberation_reflector_prompt_with_feedback_slot(
    question, mas_task="math", task_type="complete", fn_name=None
):
    return f"Muse on {DELIBERATION_FEEDBACK_SLOT}\\n{_body(question, mas_task, task_type, fn_name)}"


def build_deliberation_toolcaller_prompt_with_slot(question, mas_task="math", task_type="complete", fn_name=None):
    return f"Look up {DELIBERATION_REFLECTOR_SLOT}\\n{_body(question, mas_task, task_type, fn_name)}"
"""
LOADER = """
def ensure_choice_instruction(question):
    return question if "pick a letter" in question.lower() else f"{question}\\n\\nPick a letter."
"""


def write_clone(root: Path, layout: str = ".", builders: str = BUILDERS) -> Path:
    """A clone whose prompts module stands in `layout`."""
    folder = root / layout
    (folder / "inference_utils").mkdir(parents=True)
    (folder / "prompts.py").write_text(builders)
    (folder / "inference_utils" / "__init__.py").write_text("")
    (folder / "inference_utils" / "tool_notes.py").write_text('NOTES = "Use <tool> tags."\n')
    (folder / "inference_utils" / "answer_utils.py").write_text(LOADER)
    return root


def load_builders() -> ModuleType:
    """The invented builders as a module of this process: what a template must render to."""
    module = ModuleType("fake_prompts")
    exec(BUILDERS.replace("from inference_utils.tool_notes import NOTES", 'NOTES = "Use <tool> tags."'), vars(module))
    exec(LOADER, vars(module))
    return module


def write_model(folder: Path, family: str, width: int, seed: int) -> None:
    tiny_model(family, width, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def link_state(width_in: int, width_out: int | None = None, seed: int = 0, **shape: Any) -> dict[str, torch.Tensor]:
    """The state dict of a random link, inner where no `width_out` is given, norms included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        link = RecursiveLink.inner(width_in, **shape) if width_out is None else None
        link = link or RecursiveLink.outer(width_in, width_out or width_in, **shape)
        return {name: value + 0.1 * torch.randn_like(value) for name, value in link.state_dict().items()}


def write_outer(
    folder: Path, style: Style, widths: Mapping[str, int], form: str = "flat", task: str = "math"
) -> dict[str, dict[str, torch.Tensor]]:
    """Outer links of a release: `form` "flat", "tasks", "trained" (its flat manifest) or "companion" (no manifest)."""
    folder.mkdir(parents=True, exist_ok=True)
    states, entries, companion = {}, [], {}
    for seed, (key, (source, target)) in enumerate(style.family.edges.items(), start=100):
        states[key] = link_state(widths[source], widths[target], seed)
        released = f"{source.title()}-{target.title()}-Outerlink({task}).pt"
        name = released if form in ("flat", "tasks") else f"{key}.pt"
        torch.save(states[key], folder / name)
        sizes = {"adapter_type": "outer_ln_res_adapter", "in_dim": widths[source], "out_dim": widths[target]}
        entries.append({"legacy_key": key, "filename": name, **sizes})
        companion.update({f"{key}_type": sizes["adapter_type"], f"{key}_in_dim": sizes["in_dim"]})
    manifest: dict[str, Any] = {"format_version": 1, "paradigm": style.family.name}
    manifest.update({"tasks": {task: {"adapters": entries}}} if form == "tasks" else {"adapters": entries})
    if form == "companion":
        (folder / "outer_adapter_config.json").write_text(json.dumps(companion))
    else:
        (folder / "outerlink_config.json").write_text(json.dumps(manifest))
    return states


def write_inner(
    folder: Path, width: int, seed: int, form: str = "plain", task: str = "math"
) -> dict[str, torch.Tensor]:
    """An inner link beside a model: `form` "plain", "task" or "manifest" (which names another file)."""
    name = {"plain": "adapter.pt", "task": f"adapter({task}).pt", "manifest": "adapter-of-manifest.pt"}[form]
    state = link_state(width, seed=seed)
    torch.save(state, folder / name)
    (folder / "adapter_config.json").write_text('{"adapter_type": "ln_res_adapter"}')
    if form == "manifest":
        (folder / "innerlink_config.json").write_text(json.dumps({"tasks": {task: {"adapter.pt": name}}}))
    return state


def write_release(
    root: Path, style_name: str, widths: Mapping[str, int], families: Mapping[str, str], **forms: str
) -> dict[str, dict[str, torch.Tensor]]:
    """All repositories of a style under `root`; returns every link's state by role or link key."""
    style = STYLES[style_name]
    inner, outer = forms.get("inner", "plain"), forms.get("outer", "flat")
    states = {}
    for seed, (role, width) in enumerate(widths.items()):
        folder = root / style.repositories[role]
        write_model(folder, families.get(role, "qwen3"), width, seed)
        states[role] = write_inner(folder, width, seed, inner)
    return {**states, **write_outer(root / style.repositories[OUTER], style, widths, outer)}
