"""Inner links and the warm-up on any text, against loops by hand."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from recmas.training import (
    InnerConfig,
    OuterConfig,
    WarmupConfig,
    inner_loss,
    pair_cache,
    read_texts,
    train_inner,
    train_outer,
    train_warmup,
    warmup_loss,
)
from recmas.training.pairs import utterances
from tests.runtime.tiny import tiny_agent
from tests.runtime.training.by_hand import ROUNDING, ROWS, build, embeds, ids, link, states

TEXTS = [{"text": "red blue bako dog"}, {"text": "1 cat", "prompt": "dilo 2 0"}, {"text": "remu"}]


@pytest.mark.parametrize("role", ["planner", "critic", "solver"])
def test_inner_loss_on_texts_is_the_formula(exact, role):
    """A text follows its prompt and ends with its end; one without a prompt follows <bos> and ends as it ends."""
    terms = []
    for row in TEXTS:
        prompt = embeds(exact, role, row.get("prompt", "<bos>"))
        end = [exact.agents[role].tokenizer.eos_token_id] if "prompt" in row else []
        tokens = [*ids(exact, role, row["text"]), *end]
        table = exact.agents[role].model.get_input_embeddings().weight
        hidden = states(exact, role, torch.cat([prompt, table[tokens[:-1]]]))[len(prompt) - 1 :]
        pred = link(exact.inner_links[role], hidden, "inner")
        terms += [1 - torch.cosine_similarity(p, e, dim=0) for p, e in zip(pred, table[tokens], strict=True)]
    expected = sum(terms) / len(terms)
    for round in (1, 2):
        torch.testing.assert_close(inner_loss(exact, role, TEXTS, round), expected, rtol=ROUNDING, atol=0)


def test_warmup_loss_on_texts_is_the_formula(exact):
    table = exact.agents["solver"].model.get_input_embeddings().weight
    tokenizer = exact.agents["solver"].tokenizer
    counterparts = [[["re", "##d"], ["blue"], ["ba", "##ko"], ["dog"]], [["1"], ["cat"]], [["re", "##mu"]]]
    terms = []
    for row, groups in zip(TEXTS, counterparts, strict=True):
        prompt, text = embeds(exact, "critic", row.get("prompt", "<bos>")), embeds(exact, "critic", row["text"])
        hidden = states(exact, "critic", torch.cat([prompt, text]))[len(prompt) - 1 : -1]
        latents = link(exact.inner_links["critic"], hidden, "inner")
        pred = link(exact.outer_links["critic", "solver"], latents, "outer")
        for p, group in zip(pred, groups, strict=True):
            terms.append(1 - torch.cosine_similarity(p, table[tokenizer.convert_tokens_to_ids(group)].mean(0), dim=0))
    loss = warmup_loss(exact, ("critic", "solver"), TEXTS)
    torch.testing.assert_close(loss, sum(terms) / len(terms), rtol=ROUNDING, atol=0)


def test_links_learn_from_texts_and_rows_together(tmp_path):
    system = build()
    rows = [*TEXTS, ROWS[0]]
    config = InnerConfig(steps=60, batch_size=2, learning_rate=1e-2, warmup_steps=2)
    results = train_inner(system, rows, config, cache=tmp_path, progress=False)
    warmup = WarmupConfig(steps=60, batch_size=2, learning_rate=1e-2, warmup_steps=2)
    results |= train_warmup(system, rows, warmup, edges=[("critic", "solver")], cache=tmp_path, progress=False)
    for result in results.values():
        assert result.loss < 0.5 * result.records[0].loss


def test_a_chat_agent_reads_the_prompt_in_its_template(exact):
    system = build()
    agent = system.agents["planner"]
    agent.tokenizer.chat_template = "{{ '<bos> ' }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ ' <in>' }}"
    agents = dict(system.agents)
    settings = dict(system.settings)
    settings["planner"].chat = True
    chatting = type(system)(agents, system.inner_links, system.outer_links, system.pattern, settings=settings)
    (said,) = utterances(chatting, "planner", [TEXTS[1]], 1)
    assert list(said.prompt) == ids(exact, "planner", "<bos> dilo 2 0 <in>")


def test_a_tokenizer_without_a_first_token_begins_with_its_end():
    system = build()
    system.agents["critic"].tokenizer.bos_token = None
    (said,) = utterances(system, "critic", [TEXTS[0]], 1)
    assert list(said.prompt) == [system.agents["critic"].tokenizer.eos_token_id]
    assert list(said.said) == ids(system, "critic", TEXTS[0]["text"])


def test_a_text_longer_than_the_context_is_cut(exact):
    long = {"text": "red blue " * 50, "prompt": "dilo 2 0"}
    (said,) = utterances(exact, "critic", [long], 1)
    assert len(said.said) == 64 + 1 - 3  # the last token is predicted, not read
    assert torch.isfinite(inner_loss(exact, "critic", [long]))
    (said,) = utterances(exact, "critic", [long], 1, max_tokens=5)
    assert len(said.said) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "row 1: expected 'text' to be a text that is not empty, got ''"),
        ({"text": 5}, "row 1: expected 'text' to be a text that is not empty, got 5"),
        ({"text": "red", "prompt": ["x"]}, r"row 1: expected 'prompt' to be a text that is not empty, got \['x'\]"),
        ({"body": "red"}, "row 1: no field 'text'; it has body"),
    ],
)
def test_rows_that_are_no_texts_are_named(tmp_path, row, message):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (TEXTS[0], row)))
    with pytest.raises(ValueError, match=message):
        read_texts(str(path))


def test_the_outer_stage_asks_for_targets():
    with pytest.raises(ValueError, match="row 0: expected 'targets' to be an object of texts by agent, got None"):
        train_outer(build(), TEXTS, OuterConfig(steps=1, rounds=1), progress=False)


def test_texts_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return [{"text": "red", "url": "x"}, {"text": "blue", "prompt": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_texts("owner/corpus") == [{"text": "red"}, {"text": "blue"}]
    assert asked == [(("owner/corpus", None), {"split": "train"})]


def test_rows_without_a_field_that_a_prompt_names():
    rows = [ROWS[0], {"question": "1", "targets": ROWS[0]["targets"]}]
    with pytest.raises(ValueError, match="row 1: no field 'sheet', which agent 'planner' reads"):
        train_inner(build(), rows, InnerConfig(steps=1), progress=False)


def test_the_command_line_trains_on_texts_from_a_cache(tmp_path, monkeypatch, capsys):
    from recmas import SEQUENTIAL, RecursiveMAS
    from recmas.cli import main

    monkeypatch.chdir(tmp_path)
    agents = {role: tiny_agent("llama", role, 32) for role in SEQUENTIAL.roles}
    RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2).save_pretrained("system")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"fox {n} runs"}) + "\n" for n in range(4)))
    words = ["--texts", "texts.jsonl", "--steps", "2", "--batch-size", "2"]
    assert main(["train", "inner", "system", *words]) == 0
    assert "MB of pairs for 4 texts to write" in capsys.readouterr().err
    assert len(list((tmp_path / "system" / "training" / "pairs").glob("*/*.safetensors"))) == 3
    assert main(["train", "warmup", "system", *words, "--edges", "planner->critic"]) == 0
    assert capsys.readouterr().err == ""  # the planner's pairs are there
    assert main(["train", "warmup", "system", *words, "--cache", "off", "--output", "other"]) == 0
    assert not (tmp_path / "other" / "training" / "pairs").exists()
    assert main(["train", "inner", "system", *words, "--cache-dtype", "bfloat16", "--resume"]) == 2
    assert "another dtype" in capsys.readouterr().err
    assert main(["train", "inner", "system", *words, "--data", "texts.jsonl"]) == 2
    assert capsys.readouterr().err == "recmas: error: give either --data FILE.jsonl or --texts FILE.jsonl|HUB_ID\n"


def test_a_command_that_ended_while_it_made_pairs_is_resumed(tmp_path, monkeypatch, capsys):
    """Refused before: nothing is written. Ended among the pairs: what is there already is not made again."""
    from recmas import SEQUENTIAL, RecursiveMAS
    from recmas.cli import main

    monkeypatch.chdir(tmp_path)
    agents = {role: tiny_agent("llama", role, 32) for role in SEQUENTIAL.roles}
    RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2).save_pretrained("system")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"fox {n} runs"}) + "\n" for n in range(4)))
    words = ["train", "inner", "system", "--texts", "texts.jsonl", "--steps", "2", "--batch-size", "2"]
    words += ["--output", "new"]
    assert main([*words, "--cache", "texts.jsonl"]) == 2
    assert "texts.jsonl: is a file, expected a folder for pairs" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    made = pair_cache.Shelf.add
    monkeypatch.setattr(pair_cache.Shelf, "add", lambda shelf, shard: made(shelf, shard) or 1 / 0)
    assert main(words) != 0
    monkeypatch.setattr(pair_cache.Shelf, "add", made)
    assert "texts to write" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    announced = [line for line in capsys.readouterr().err.splitlines() if "texts to write" in line]
    assert [line.partition(":")[0] for line in announced] == ["new/training/pairs/critic", "new/training/pairs/solver"]
