"""Systems converted from the reference implementation's folders: same weights, same latents; bad input in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from recmas.agents.agent import Agent
from recmas.config.system_json import SystemSpec, edge_name, read_spec
from recmas.prompts.template import Slot
from recmas.recursive_mas import RecursiveMAS
from recmas.upstream import convert_upstream
from recmas.upstream.styles import OUTER, STYLES
from tests.runtime.sandbox.needed import needs_sandbox
from tests.runtime.upstream.fakes import link_state, write_clone, write_inner, write_outer, write_release

ROLES = {
    "sequential_light": {"planner": 32, "critic": 48, "solver": 32},
    "sequential_scaled": {"planner": 32, "critic": 48, "solver": 32},
    "mixture": {"math": 32, "code": 48, "science": 32, "summarizer": 40},
    "distillation": {"expert": 48, "learner": 32},
    "deliberation": {"reflector": 32, "toolcaller": 32},
}
FAMILIES = {"planner": "gemma3_text", "critic": "llama", "learner": "qwen3_5_text", "science": "mistral"}
FORMS = {
    "sequential_light": {"inner": "task", "outer": "tasks"},
    "sequential_scaled": {"inner": "manifest", "outer": "tasks"},
    "mixture": {"inner": "plain", "outer": "flat"},
    "distillation": {"inner": "manifest", "outer": "tasks"},
    "deliberation": {"inner": "plain", "outer": "trained"},
}
pytestmark = needs_sandbox  # for the clone's prompt builders
LIGHT = STYLES["sequential_light"]
States = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, States]:
    """A whole release of the light sequential style."""
    root = tmp_path_factory.mktemp("light")
    return root, write_release(
        root, "sequential_light", ROLES["sequential_light"], FAMILIES, **FORMS["sequential_light"]
    )


@pytest.fixture
def copy(light: tuple[Path, States], tmp_path: Path) -> Path:
    """A release to break: weights of models as links, all else as copies."""

    def link_models(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            Path(target).symlink_to(source)
        else:
            shutil.copy(source, target)

    return Path(shutil.copytree(light[0], tmp_path / "release", copy_function=link_models))


def assert_same_links(folder: Path, spec: SystemSpec, states: States, style_name: str) -> None:
    mas = RecursiveMAS.from_pretrained(folder, allow_outside=True)
    keys = {edge: key for key, edge in STYLES[style_name].family.edges.items()}
    links = {role: mas.inner_links[role] for role in spec.agents} | {keys[edge]: mas.outer_links[edge] for edge in keys}
    assert links.keys() == states.keys()
    for name, link in links.items():
        assert link.state_dict().keys() == states[name].keys()
        for key, value in link.state_dict().items():
            assert torch.equal(value, states[name][key]), (name, key)


@pytest.mark.parametrize("style", list(STYLES))
def test_every_style_converts_loads_and_answers(clone: Path, tmp_path: Path, style: str) -> None:
    weights, out = tmp_path / "weights", tmp_path / "made" / "system"
    states = write_release(weights, style, ROLES[style], FAMILIES, **FORMS[style])
    spec = convert_upstream(clone, style, out, weights=weights)
    assert read_spec(out) == spec
    assert not list(out.parent.glob(".*")), "a temporary folder was left"
    assert not (out / "agents").exists(), "models are linked, not copied"
    for role, agent in spec.agents.items():
        assert agent.model == str((weights / STYLES[style].repositories[role]).resolve())
    latent_steps, rounds = STYLES[style].settings["math"]
    assert (spec.defaults.latent_steps, spec.defaults.rounds) == (latent_steps, rounds)
    assert_same_links(out, spec, states, style)
    mas = RecursiveMAS.from_pretrained(out, allow_outside=True)
    answers = mas.answer(["what is 1 + 1?"], rounds=2, latent_steps=2, max_new_tokens=2, temperature=0.0)
    assert len(answers[0].tokens) >= 1
    assert set(answers[0].latent_steps) == set(spec.agents)


def inner_reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """UPSTREAM's ln_res_adapter, written out."""
    d = x.shape[-1]
    hidden = gelu(
        layer_norm(x, (d,), state["pre_ln.weight"], state["pre_ln.bias"]) @ state["proj1.weight"].T
        + state["proj1.bias"]
    )
    out = x + hidden @ state["proj2.weight"].T + state["proj2.bias"]
    return layer_norm(out, (d,), state["post_ln.weight"], state["post_ln.bias"])


def outer_reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """UPSTREAM's outer_ln_res_adapter, written out."""
    u = layer_norm(x, (x.shape[-1],), state["ln_source.weight"], state["ln_source.bias"])
    out = gelu(u @ state["proj1.weight"].T + state["proj1.bias"]) @ state["proj2.weight"].T + state["proj2.bias"]
    out = out + x @ state["residual_proj.weight"].T + state["residual_proj.bias"]
    return layer_norm(out, (out.shape[-1],), state["ln_target.weight"], state["ln_target.bias"])


def test_latents_equal_the_reference_algorithm(clone: Path, light: tuple[Path, States], tmp_path: Path) -> None:
    """Two rounds: uncached batch-1 rollouts in float64 over the .pt files, R_out(R_in(H)) in each slot."""
    root, states = light
    convert_upstream(clone, "sequential_light", tmp_path / "system", weights=root)
    mas = RecursiveMAS.from_pretrained(tmp_path / "system", dtype=torch.float64, allow_outside=True)
    exact = {name: {key: value.double() for key, value in state.items()} for name, state in states.items()}
    row, steps = {"question": "what is 2 * (3 + 4)?"}, 3
    answers = mas.answer([row], rounds=2, latent_steps=steps, max_new_tokens=1, temperature=0.0, trace=True)
    traced = {(handoff.round, handoff.source): handoff.latents for handoff in answers[0].handoffs}

    keys = {edge: key for key, edge in LIGHT.family.edges.items()}
    sent: dict[str, Tensor] = {}
    compared = 0
    for visit in mas.pattern.visits(2):
        if visit.final:
            break
        agent = mas.agents[visit.role]
        segments = mas.segments(visit, row)
        pieces = [
            outer_reference(exact[keys[piece.senders[0], visit.role]], sent[piece.senders[0]])
            if isinstance(piece, Slot)
            else agent.embed(torch.tensor([piece]))[0]
            for piece in segments
        ]
        sequence, thoughts = torch.cat(pieces)[None], []
        for _ in range(steps):
            thoughts.append(agent.decoder(inputs_embeds=sequence, use_cache=False).last_hidden_state[0, -1])
            sequence = torch.cat([sequence, inner_reference(exact[visit.role], thoughts[-1])[None, None]], dim=1)
        sent[visit.role] = inner_reference(exact[visit.role], torch.stack(thoughts))
        heard_in = visit.round + (visit.role == "solver")
        latents = traced[heard_in, visit.role]
        assert latents is not None
        torch.testing.assert_close(latents, sent[visit.role], rtol=0, atol=torch.finfo(torch.float64).eps ** 0.5)
        compared += 1
    assert compared == 5


def test_locally_trained_folders(clone: Path, light: tuple[Path, States], tmp_path: Path) -> None:
    """Overrides: an inner folder with adapter.pt, and outer_12.pt files with and without a manifest."""
    root, _ = light
    for form in ("trained", "companion"):
        states = write_outer(tmp_path / form, LIGHT, ROLES["sequential_light"], form)
        planner = tmp_path / f"planner-{form}"
        shutil.copytree(root / LIGHT.repositories["planner"], planner, ignore=shutil.ignore_patterns("*.pt"))
        states["planner"] = write_inner(planner, 32, 7)
        overrides = {"planner": str(planner), OUTER: str(tmp_path / form)}
        spec = convert_upstream(
            clone, "sequential_light", tmp_path / f"system-{form}", weights=root, overrides=overrides
        )
        assert spec.agents["planner"].model == str(planner.resolve())
        others = {role: light[1][role] for role in ("critic", "solver")}
        assert_same_links(tmp_path / f"system-{form}", spec, {**states, **others}, "sequential_light")


def test_one_round_without_the_link_back(clone: Path, copy: Path, tmp_path: Path) -> None:
    outer = copy / LIGHT.repositories[OUTER]
    content = json.loads((outer / "outerlink_config.json").read_text())
    content["tasks"]["math"]["adapters"].pop()
    (outer / "outerlink_config.json").write_text(json.dumps(content))
    (copy / LIGHT.repositories["solver"] / "adapter(math).pt").unlink()
    spec = convert_upstream(clone, "sequential_light", tmp_path / "system", weights=copy)
    assert spec.defaults.rounds == 1
    assert spec.agents["solver"].inner_link is None
    assert RecursiveMAS.from_pretrained(tmp_path / "system", allow_outside=True).answer(
        ["1 + 1?"], max_new_tokens=1, latent_steps=1
    )


def test_code_uses_the_links_of_code(clone: Path, copy: Path, tmp_path: Path) -> None:
    expected = write_outer(copy / LIGHT.repositories[OUTER], LIGHT, ROLES["sequential_light"], "tasks", "code")
    for seed, (role, width) in enumerate(ROLES["sequential_light"].items(), start=50):
        expected[role] = write_inner(copy / LIGHT.repositories[role], width, seed, "task", "code")
    spec = convert_upstream(clone, "sequential_light", tmp_path / "system", weights=copy, task="code")
    assert_same_links(tmp_path / "system", spec, expected, "sequential_light")
    assert spec.agents["solver"].decoding.temperature == 0.2


def test_roles_may_come_from_the_hub(
    clone: Path, light: tuple[Path, States], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Link files are fetched, the model stays a hub id; asked for only after local mistakes were told."""
    asked: list[str] = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        return str(light[0] / repository.partition("/")[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ValueError, match="no such folder for 'solver'"):
        convert_upstream(clone, "sequential_light", tmp_path / "system", overrides={"solver": "./absent"})
    assert not asked
    spec = convert_upstream(clone, "sequential_light", tmp_path / "system")
    assert asked == [f"RecursiveMAS/{name}" for name in LIGHT.repositories.values()]
    assert spec.agents["planner"].model == f"RecursiveMAS/{LIGHT.repositories['planner']}"


def test_a_model_with_a_link_beside_it_is_no_peft_adapter(
    light: tuple[Path, States], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PEFT is installed, transformers alone trips over such a folder; the agent does not."""
    from transformers import AutoModelForCausalLM

    for module in ("transformers.models.auto.auto_factory", "transformers.integrations.peft"):
        monkeypatch.setattr(f"{module}.is_peft_available", lambda: True)
    folder = light[0] / LIGHT.repositories["critic"]
    with pytest.raises((ImportError, OSError, TypeError, ValueError, KeyError)):
        AutoModelForCausalLM.from_pretrained(folder)
    assert Agent.from_pretrained(folder).hidden_size == 48


def test_pickles_run_no_code(clone: Path, copy: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"proj1.weight": Trap()}, copy / LIGHT.repositories["planner"] / "adapter(math).pt")
    with pytest.raises(ValueError, match=r"adapter\(math\)\.pt"):
        convert_upstream(clone, "sequential_light", tmp_path / "system", weights=copy)
    assert not (tmp_path / "sprung").exists()


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / LIGHT.repositories[OUTER] / "outerlink_config.json"
        content = json.loads(path.read_text())
        content["tasks"]["math"]["adapters"][0].update(changes)
        path.write_text(json.dumps(content))

    return edit


def in_planner(change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda root: change(root / LIGHT.repositories["planner"]) and None


def save_inner(**shape: Any) -> Callable[[Path], None]:
    return in_planner(lambda folder: torch.save(link_state(**shape), folder / "adapter(math).pt"))


def without_type(root: Path) -> None:
    save_inner(width_in=32, norm=False)(root)
    (root / LIGHT.repositories["planner"] / "adapter_config.json").unlink()


MANIFEST = "outerlink_config.json"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing role": (lambda root: shutil.rmtree(root / LIGHT.repositories["critic"]), "holds no folder for 'critic'"),
    "missing outer": (lambda root: shutil.rmtree(root / LIGHT.repositories[OUTER]), "holds no folder for 'outer'"),
    "missing manifest": (
        lambda root: (root / LIGHT.repositories[OUTER] / MANIFEST).unlink(),
        "has neither outerlink_config.json nor outer_adapter_config.json",
    ),
    "broken manifest": (
        lambda root: (root / LIGHT.repositories[OUTER] / MANIFEST).write_text('{"tasks": '),
        "outerlink_config.json: cannot be read as JSON",
    ),
    "no adapters": (
        lambda root: (root / LIGHT.repositories[OUTER] / MANIFEST).write_text("{}"),
        "adapters is None, expected a list",
    ),
    "manifest of a later format": (
        lambda root: (root / LIGHT.repositories[OUTER] / MANIFEST).write_text('{"format_version": 2}'),
        "format_version is 2, this version reads 1",
    ),
    "unknown key": (edit_manifest(legacy_key="outer_99"), "unknown link 'outer_99'"),
    "file that is not there": (edit_manifest(filename="absent.pt"), "names absent.pt, which does not exist"),
    "file outside": (edit_manifest(filename="../secret.pt"), "'../secret.pt' is not the name of a file beside it"),
    "manifest against weights": (edit_manifest(in_dim=31), "in_dim of Planner-Critic-Outerlink(math).pt is 31"),
    "type against weights": (edit_manifest(adapter_type="outer_adapter"), "adapter_type 'outer_adapter' has no norms"),
    "unknown type": (edit_manifest(adapter_type="outer_magic"), "unknown adapter_type 'outer_magic'"),
    "missing links": (edit_manifest(legacy_key="outer_23"), "no entry for outer_12"),
    "no link": (in_planner(lambda folder: (folder / "adapter(math).pt").unlink()), "has no inner link for math"),
    "no model": (in_planner(lambda folder: (folder / "config.json").unlink()), "has no config.json, expected the base"),
    "inner width": (save_inner(width_in=40), "maps 40 to 40 features, the models need 32 to 32"),
    "inner type against weights": (
        save_inner(width_in=32, norm=False),
        "adapter_type 'ln_res_adapter' needs pre_ln and post_ln",
    ),
    "ambiguous type": (without_type, "do not say whether the link has a residual"),
    "outer link as inner": (
        in_planner(
            lambda folder: (
                torch.save(link_state(32, 32), folder / "adapter(math).pt"),
                (folder / "adapter_config.json").unlink(),
            )
        ),
        "holds an outer link, expected an inner one",
    ),
    "truncated": (
        in_planner(lambda folder: (folder / "adapter(math).pt").write_bytes(b"PK\x03\x04")),
        "is not a readable state dict",
    ),
    "type that is no text": (
        in_planner(lambda folder: (folder / "adapter_config.json").write_text('{"adapter_type": 5}')),
        "adapter_type is 5, expected a string",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_release_that_does_not_fit_is_one_clear_line(clone: Path, copy: Path, tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    change(copy)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        convert_upstream(clone, "sequential_light", tmp_path / "made" / "system", weights=copy)
    assert message in str(caught.value)
    assert not (tmp_path / "made").exists(), "something was written"


def test_outer_width_mismatch(clone: Path, copy: Path, tmp_path: Path) -> None:
    write_outer(copy / LIGHT.repositories[OUTER], LIGHT, {**ROLES["sequential_light"], "critic": 40}, "tasks")
    with pytest.raises(ValueError, match=r"planner->critic: .* maps 32 to 40 features, the models need 32 to 48"):
        convert_upstream(clone, "sequential_light", tmp_path / "system", weights=copy)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"style": "sequential_heavy"}, "style: 'sequential_heavy' is not one of sequential_light, "),
        ({"task": "poetry"}, "task: 'poetry' is not one of math, code, choice"),
        ({"code_form": "poem"}, "code_form: 'poem' is not one of complete, function"),
        ({"code": "absent"}, "code: no such folder: absent"),
        ({"weights": "absent"}, "weights: no such folder: absent"),
        ({"overrides": {"judge": "x"}}, "override: unknown key 'judge'; the style has planner, critic, solver, outer"),
        ({"overrides": {"planner": "/absent/folder"}}, "override: no such folder for 'planner': /absent/folder"),
        ({"task": "code"}, "has no inner link for code: adapter(math).pt"),
    ],
)
def test_wrong_arguments(
    clone: Path, light: tuple[Path, States], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"code": clone, "style": "sequential_light", "weights": light[0], **changed}
    if changed == {"task": "code"}:  # outer links are read first, so give those
        write_outer(tmp_path / OUTER, LIGHT, ROLES["sequential_light"])
        arguments["overrides"] = {OUTER: str(tmp_path / OUTER)}
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        convert_upstream(out=tmp_path / "system", **arguments)
    assert message in str(caught.value)
    assert not (tmp_path / "system").exists()


def test_what_exists_is_left_alone(clone: Path, light: tuple[Path, States], tmp_path: Path) -> None:
    out = tmp_path / "system"
    out.mkdir()
    (out / "note").write_text("mine")
    with pytest.raises(ValueError, match=r"system: exists already; nothing was written"):
        convert_upstream(clone, "sequential_light", out, weights=light[0])
    assert [path.name for path in out.iterdir()] == ["note"]
    (out / "note").unlink()
    spec = convert_upstream(clone, "sequential_light", out, weights=light[0])
    assert {edge_name(edge) for edge in spec.outer_links} == {"planner->critic", "critic->solver", "solver->planner"}
