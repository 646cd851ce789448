"""RecursiveMAS: answers and their accounts, construction, saving and loading, and what is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch

from recmas import MIXTURE, SEQUENTIAL, Agent, Pattern, RecursiveMAS
from recmas.config.system_json import AgentSpec, PromptSpec, read_spec
from tests.runtime.tiny import tiny_agent, tiny_link

QUESTIONS = ["fox", "what is the answer to everything?", "the lazy dog", "0 + 1 ="]


def agents():
    return {
        "planner": tiny_agent("qwen3", "planner", 32, 1),
        "critic": tiny_agent("llama", "critic", 40, 2),
        "solver": tiny_agent("qwen2", "solver", 24, 3),
    }


@pytest.fixture(scope="module")
def mas():
    return RecursiveMAS.create(agents(), SEQUENTIAL, rounds=2, latent_steps=3, seed=0)


def texts(answers):
    return [answer.text for answer in answers]


def test_accounts(mas):
    answers = mas.answer(QUESTIONS, latent_steps={"solver": 5}, max_new_tokens=4)
    assert len(answers) == 4
    for answer in answers:
        assert answer.latent_steps == {"planner": 6, "critic": 6, "solver": 5}
        assert answer.text_tokens == {"solver": len(answer.tokens)}
        assert answer.handoffs == []
    turns = [f"round {round}, {role}" for round in (1, 2) for role in SEQUENTIAL.roles]
    assert list(answers.seconds) == turns
    assert type(answers.seconds) is dict
    assert all(seconds > 0 for seconds in answers.seconds.values())


def test_text_mode_counts_tokens_and_no_latent_steps(mas):
    answers = mas.answer(QUESTIONS[:2], mode="text", max_new_tokens=4, trace=True)
    for answer in answers:
        assert answer.latent_steps == {}
        assert answer.text_tokens["planner"] <= 8
        assert [handoff.latents for handoff in answer.handoffs] == [None] * 5
        assert all(isinstance(handoff.text, str) for handoff in answer.handoffs)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mode", ["latent", "text"])
def test_answers_do_not_depend_on_the_batch(mas, mode, temperature):
    arguments = {"mode": mode, "temperature": temperature, "seed": 7, "max_new_tokens": 5}
    whole = mas.answer(QUESTIONS, **arguments)
    for size in (1, 3):
        assert texts(mas.answer(QUESTIONS, batch_size=size, **arguments)) == texts(whole)


def test_no_questions(mas):
    assert mas.answer([]) == []


def test_messages_can_be_replaced(mas):
    plain = mas.answer(QUESTIONS, max_new_tokens=1, trace=True)

    def roll(visit, message):
        message.states = message.states.roll(1, dims=0)
        return message

    changed = mas.answer(QUESTIONS, max_new_tokens=1, trace=True, on_message=roll)
    first = torch.stack([answer.handoffs[0].latents for answer in plain])
    order = sorted(range(4), key=lambda index: len(QUESTIONS[index]))
    rolled = torch.stack([changed[index].handoffs[0].latents for index in order])
    assert torch.equal(rolled, first[order].roll(1, dims=0))


def test_progress_counts_every_row_of_every_visit(mas):
    seen = []
    mas.answer(QUESTIONS, max_new_tokens=1, batch_size=3, progress=seen.append)
    assert seen == [3] * 6 + [1] * 6


def test_fresh_links_have_the_released_shape_and_the_embedding_scale(mas):
    assert set(mas.inner_links) == set(SEQUENTIAL.roles)
    assert set(mas.outer_links) == {("planner", "critic"), ("critic", "solver"), ("solver", "planner")}
    for role, link in mas.inner_links.items():
        width = mas.agents[role].hidden_size
        assert (link.config.in_features, link.config.hidden_features, link.config.out_features) == (width,) * 3
        assert link.norm_out.weight.tolist() == pytest.approx([mas.agents[role].embedding_rms()] * width)
    for (source, target), link in mas.outer_links.items():
        widths = mas.agents[source].hidden_size, mas.agents[target].hidden_size
        assert (link.config.in_features, link.config.hidden_features, link.config.out_features) == (
            widths[0],
            2 * widths[1],
            widths[1],
        )
        assert link.norm_out.weight.tolist() == pytest.approx([mas.agents[target].embedding_rms()] * widths[1])
        assert link.proj1.weight.dtype == torch.float32
    assert not any(weight.requires_grad for agent in mas.agents.values() for weight in agent.model.parameters())


def test_links_are_drawn_from_the_seed():
    def first_weight(seed, **options):
        return RecursiveMAS.create(agents(), SEQUENTIAL, seed=seed, **options).inner_links["planner"].proj1.weight

    state = torch.get_rng_state()
    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))
    assert torch.equal(torch.get_rng_state(), state)
    mas = RecursiveMAS.create(agents(), SEQUENTIAL, rounds=1, link_scale="none")
    assert set(mas.inner_links) == {"planner", "critic"}
    assert mas.inner_links["planner"].norm_out.weight.unique().tolist() == [1.0]


def test_save_and_load_give_equal_answers(mas, tmp_path):
    folder = tmp_path / "deep" / "system"
    mas.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["agents", "links", "system.json"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["system"]
    again = RecursiveMAS.from_pretrained(folder)
    for mode in ("latent", "text"):
        arguments = {"mode": mode, "max_new_tokens": 6, "temperature": 0.7}
        assert texts(again.answer(QUESTIONS, **arguments)) == texts(mas.answer(QUESTIONS, **arguments))
    assert again.spec() == mas.spec()


def test_saving_over_a_system_replaces_links_and_keeps_the_rest(mas, tmp_path):
    mas.save_pretrained(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    loaded = RecursiveMAS.from_pretrained(tmp_path / "s")
    kept = os.stat(tmp_path / "s" / "agents" / "planner" / "model.safetensors").st_ino
    with torch.no_grad():
        loaded.outer_links["planner", "critic"].proj1.bias.add_(1.0)
    loaded.save_pretrained(tmp_path / "s")
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"
    assert os.stat(tmp_path / "s" / "agents" / "planner" / "model.safetensors").st_ino == kept
    bias = RecursiveMAS.from_pretrained(tmp_path / "s").outer_links["planner", "critic"].proj1.bias
    assert torch.equal(bias, loaded.outer_links["planner", "critic"].proj1.bias)


def test_weighted_scores_are_stored_with_the_links(tmp_path):
    pattern = Pattern((("planner", "critic"), ("solver",)), combine="weighted")
    mas = RecursiveMAS.create(agents(), pattern, rounds=2, latent_steps=2, seed=0)
    with torch.no_grad():
        mas.edge_scores["critic", "solver"].fill_(0.75)
    mas.save_pretrained(tmp_path / "s")
    again = RecursiveMAS.from_pretrained(tmp_path / "s")
    assert {edge: score.item() for edge, score in again.edge_scores.items()} == {
        edge: 0.75 if edge == ("critic", "solver") else 0.0 for edge in mas.outer_links
    }
    assert texts(again.answer(QUESTIONS, max_new_tokens=3)) == texts(mas.answer(QUESTIONS, max_new_tokens=3))


def test_roles_can_share_one_model(tmp_path):
    one = tiny_agent("llama", "one")
    mas = RecursiveMAS.create({"math": one, "code": one, "science": one, "summarizer": one}, MIXTURE, latent_steps=2)
    mas.save_pretrained(tmp_path / "s")
    assert [path.name for path in (tmp_path / "s" / "agents").iterdir()] == ["math"]
    again = RecursiveMAS.from_pretrained(tmp_path / "s")
    assert len(set(map(id, again.agents.values()))) == 1
    assert texts(again.answer(QUESTIONS, max_new_tokens=3)) == texts(mas.answer(QUESTIONS, max_new_tokens=3))


def test_dtype_on_loading(mas, tmp_path):
    mas.save_pretrained(tmp_path / "s")
    low = RecursiveMAS.from_pretrained(tmp_path / "s", dtype=torch.bfloat16)
    assert low.agents["planner"].dtype == low.inner_links["planner"].proj1.weight.dtype == torch.bfloat16
    named = RecursiveMAS.from_pretrained(tmp_path / "s", dtype="bfloat16")
    assert named.agents["planner"].dtype == named.inner_links["planner"].proj1.weight.dtype == torch.bfloat16
    assert RecursiveMAS.from_pretrained(tmp_path / "s", dtype="auto").agents["planner"].dtype == torch.float32
    for wrong in ("bf16", torch.int8, 16):
        with pytest.raises(ValueError, match="dtype: .* is not one of auto, float32, bfloat16, float16"):
            RecursiveMAS.from_pretrained(tmp_path / "s", dtype=wrong)
    assert len(low.answer(["fox"], max_new_tokens=2)[0].tokens) > 0
    content = json.loads((tmp_path / "s" / "system.json").read_text())
    content["agents"]["critic"]["dtype"] = "bfloat16"
    (tmp_path / "s" / "system.json").write_text(json.dumps(content))
    mixed = RecursiveMAS.from_pretrained(tmp_path / "s")
    assert mixed.agents["critic"].dtype == torch.bfloat16
    assert mixed.inner_links["critic"].proj1.weight.dtype == mixed.agents["planner"].dtype == torch.float32
    assert len(mixed.answer(["fox"], max_new_tokens=2)[0].tokens) > 0
    assert mixed.to(dtype=torch.float32).agents["critic"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_on_making(tmp_path, dtype):
    tiny_agent("llama").save_pretrained(tmp_path / "m")
    made = RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, tmp_path / "m"), SEQUENTIAL, latent_steps=1, dtype=dtype)
    made.save_pretrained(tmp_path / "s")
    assert read_spec(tmp_path / "s").agents["planner"].dtype == "bfloat16"
    assert RecursiveMAS.from_pretrained(tmp_path / "s").agents["planner"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {**dict.fromkeys(SEQUENTIAL.roles, "x"), "poet": "x"}}, "models: unknown role 'poet'; the pattern"),
        ({"prompts": {"planner": "{{question}}"}}, "prompts: that of 'planner' is a str, expected a PromptSpec"),
        ({"latent_steps": 1.5}, "latent_steps: 1.5 is not an integer >= 0"),
        ({"latent_steps": 10**9}, "latent_steps: 1000000000 is more than"),
        ({"rounds": 1000}, "rounds: 1000 is more than"),
    ],
)
def test_what_no_system_can_be_made_with_is_told_before_anything_is_loaded(changes, message):
    arguments = {"models": dict.fromkeys(SEQUENTIAL.roles, "/no/such/folder"), "pattern": SEQUENTIAL} | changes
    with pytest.raises(ValueError, match=message):
        RecursiveMAS.create(**arguments)


def test_what_could_not_be_loaded_again_is_refused_before_any_part_is_written(tmp_path, monkeypatch):
    mas = RecursiveMAS.create(agents(), SEQUENTIAL, rounds=1, latent_steps=1)
    mas.settings["critic"].dtype = "float64"
    monkeypatch.setattr(Agent, "save_pretrained", lambda *_: pytest.fail("an agent was written"))
    with pytest.raises(ValueError, match=f"^{tmp_path}/s/system.json: agents.critic.dtype: 'float64' is not one of"):
        mas.save_pretrained(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_is_the_same_one_from_another_working_directory(tmp_path, monkeypatch, made):
    """``models/one`` and ``agents/planner`` could be names of models on the hub."""
    one = tiny_agent("llama", chat_template=None)
    one.save_pretrained(tmp_path / "models" / "one")
    mas = RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, one), SEQUENTIAL, latent_steps=1)
    mas.save_pretrained(tmp_path / "s")
    monkeypatch.chdir(tmp_path if made else tmp_path / "s")
    if made:
        mas = RecursiveMAS.create(dict.fromkeys(SEQUENTIAL.roles, "models/one"), SEQUENTIAL, latent_steps=1)
    else:
        mas = RecursiveMAS.from_pretrained(".")
    monkeypatch.chdir("/")
    mas.save_pretrained(tmp_path / "copy")
    assert texts(RecursiveMAS.from_pretrained(tmp_path / "copy").answer(["fox"], max_new_tokens=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": "hot"}, "temperature: 'hot' is not a number"),
        ({"settle": "soon"}, "settle: 'soon' is not in"),
        ({"mode": "telepathy"}, "mode: 'telepathy' is not one of latent, text"),
        ({"rounds": 0}, "rounds: 0 is not a positive integer"),
        ({"rounds": -2}, "rounds: -2 is not a positive integer"),
        ({"latent_steps": -1}, "latent_steps: -1 for 'planner' is not an integer >= 0"),
        ({"latent_steps": {"poet": 2}}, "latent_steps: unknown role 'poet'; the pattern has planner, critic, solver"),
        ({"batch_size": 0}, "batch_size: 0 is not positive"),
        ({"max_new_tokens": -1}, "max_new_tokens: -1 is negative"),
        ({"temperature": float("nan")}, "temperature: nan is not a finite number"),
        ({"top_p": 0.0}, "top_p: 0.0 is not in"),
        ({"rows": "fox"}, "rows: a single str, expected a list of questions"),
        ({"rows": None}, "rows: a single NoneType, expected a list of questions"),
        ({"rows": ["fox", 3]}, "row 1: int, expected a string, a list of messages or a mapping"),
        ({"rows": ["fox", {"q": 1}]}, "row 1: no field 'question', which agent 'solver' reads; it has q"),
    ],
)
def test_wrong_arguments_are_told_before_any_model_runs(mas, monkeypatch, arguments, message):
    monkeypatch.setattr(Agent, "think", lambda *_: pytest.fail("a model ran"))
    monkeypatch.setattr(Agent, "decode", lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=message):
        mas.answer(**{"rows": QUESTIONS, **arguments})


def test_rounds_without_feedback_links_name_the_missing_edges():
    mas = RecursiveMAS.create(agents(), SEQUENTIAL, rounds=1, latent_steps=2)
    with pytest.raises(ValueError, match="rounds=2 needs outer links that the system lacks: solver->planner$"):
        mas.answer(["fox"], rounds=2)
    assert mas.answer(["fox"], rounds=2, mode="text", max_new_tokens=2)[0].text_tokens["solver"] > 0
    mas.outer_links["solver", "planner"] = tiny_link(mas.agents["solver"], mas.agents["planner"])
    with pytest.raises(ValueError, match="rounds=2 needs inner links that the system lacks: solver$"):
        mas.answer(["fox"], rounds=2)


def test_parts_that_do_not_fit_are_refused():
    parts = agents()
    with pytest.raises(ValueError, match="role 'solver' of the pattern has no agent"):
        RecursiveMAS({"planner": parts["planner"], "critic": parts["critic"]}, {}, {}, SEQUENTIAL)
    with pytest.raises(ValueError, match="unknown role 'poet'"):
        RecursiveMAS({**parts, "poet": parts["critic"]}, {}, {}, SEQUENTIAL)
    with pytest.raises(ValueError, match="inner link of 'planner' maps 40 to 40 features, the models need 32 to 32"):
        RecursiveMAS(parts, {"planner": tiny_link(parts["critic"])}, {}, SEQUENTIAL)
    wrong = tiny_link(parts["planner"], parts["solver"])
    with pytest.raises(ValueError, match="outer link planner->critic maps 32 to 24 features, the models need 32 to 40"):
        RecursiveMAS(parts, {}, {("planner", "critic"): wrong}, SEQUENTIAL)
    settings = {role: AgentSpec("", PromptSpec("{{question}} {{from:solver}}")) for role in SEQUENTIAL.roles}
    with pytest.raises(
        ValueError, match="agent 'planner', round 1: template .* has a slot for 'solver', but reads from"
    ):
        RecursiveMAS(parts, {}, {}, SEQUENTIAL, settings=settings)
    with pytest.raises(ValueError, match="link_scale: 'big' is neither"):
        RecursiveMAS.create(parts, SEQUENTIAL, link_scale="big")
    with pytest.raises(ValueError, match="prompts: unknown role 'poet'"):
        RecursiveMAS.create(parts, SEQUENTIAL, prompts={"poet": PromptSpec("x")})


def test_a_prompt_that_never_hears_the_last_agent_serves_one_round_only():
    prompts = {"planner": PromptSpec("{{question}}")}
    mas = RecursiveMAS.create(agents(), SEQUENTIAL, prompts=prompts, latent_steps=2)
    assert len(mas.answer(["fox"], rounds=1, max_new_tokens=1)) == 1
    with pytest.raises(ValueError, match="agent 'planner', round 2: template .* has no slot {{from:solver}}"):
        mas.answer(["fox"], rounds=2)
