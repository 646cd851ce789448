"""Streaming: pieces join to the text, whatever bytes the tokens cut it into, and come while it is written."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from recmas import DISTILLATION, SEQUENTIAL, Agent, RecursiveMAS
from recmas.agents.detokenizer import Detokenizer, text_of
from recmas.cli import main
from tests.runtime.tiny import tiny_agent, tiny_model, tiny_tokenizer

TEXTS = ["the quick brown fox", "naïve café — 日本語 🦊👩‍👩‍👧 ok", "  two  spaces , and . cleanup 's n't ", "", "🦊"]


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def sentencepiece():
    """A tokenizer of the Llama 2 kind: spaces as U+2581, bytes for what it lacks, the first space stripped."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "▁a",
        "fox",
        "▁fox",
        "s",
        ".",
    ]
    backend = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pieces(decode, ids):
    stream = Detokenizer(decode)
    return [*(stream.add([token]) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for row in (ids, [*ids, 2], [1, *ids, 5, *ids], ids[:-1]):
        found = pieces(decoder(tokenizer), row)
        assert "".join(found) == decoder(tokenizer)(row)
        assert not any("\ufffd" in piece for piece in found[:-1])


def test_characters_come_when_their_last_byte_does():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a🦊b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    assert pieces(decoder(tokenizer), ids) == ["a", "", "", "", "🦊", "b", ""]
    assert pieces(decoder(tokenizer), ids[:3]) == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize(
    "words",
    [
        ["▁the", "▁fox", "s", "."],
        ["▁", "▁", "▁a", "▁", "fox"],
        ["▁a", "</s>", "▁a", "▁"],
        ["<s>", "▁a", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "▁fox"],
        ["<0xF0>", "<0x9F>", "▁a"],
        ["▁", "</s>", "▁", "▁fox"],
        [
            "<0xF0>",
            "<0x9F>",
            "<0xA6>",
            "<0x8A>",
            "<0xF0>",
            "▁a",
        ],  # the whole row at once would lose the first character
    ],
)
def test_pieces_join_where_the_first_space_is_stripped(words):
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(words)
    decode = decoder(tokenizer)
    assert "".join(pieces(decode, ids)) == text_of(ids, decode)
    assert (text_of(ids, decode) == decode(ids)) is (words[4:5] != ["<0xF0>"])


def test_a_message_is_the_text_that_its_pieces_join_to(monkeypatch):
    """As it is where agents are served, so that whoever reads it reads the same."""
    agent = Agent(tiny_model("llama"), sentencepiece(), name="one")
    mas = RecursiveMAS.create(dict.fromkeys(DISTILLATION.roles, agent), DISTILLATION, rounds=1, latent_steps=1)
    ids = agent.tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "<0xF0>", "▁a"])
    monkeypatch.setattr(Agent, "decode", lambda *_, **__: [ids])
    sent = []
    mas.answer(["a"], mode="text", max_new_tokens=1, on_message=lambda _, message: sent.append(message) or message)
    assert sent == [[text_of(ids, agent.text)]]
    assert sent != [[agent.text(ids)]]


@pytest.fixture(scope="module")
def mas():
    agents = {
        "planner": tiny_agent("qwen3", "planner", 32, 1),
        "critic": tiny_agent("llama", "critic", 40, 2),
        "solver": tiny_agent("qwen2", "solver", 24, 3),
    }
    return RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2, seed=0)


ROWS = ["fox", "what is the answer to everything?", "the lazy dog"]


@pytest.mark.parametrize("mode", ["latent", "text"])
def test_every_row_of_a_batch_is_told_piece_by_piece(mas, mode):
    arguments = {"max_new_tokens": 12, "temperature": 0.9, "batch_size": 2, "mode": mode}
    told = {index: [] for index in range(3)}
    answers = mas.answer(ROWS, on_text=lambda row, piece: told[row].append(piece), **arguments)
    assert answers == mas.answer(ROWS, **arguments)
    assert ["".join(told[index]) for index in range(3)] == [answer.text for answer in answers]
    assert all(len(told[index]) > 1 for index in range(3))


def test_the_iterator_gives_text_as_it_is_written_and_ends_with_the_answer(mas, monkeypatch):
    expected = mas.answer(["fox"], max_new_tokens=12, temperature=0.9)[0]
    solver, steps = mas.agents["solver"], []
    write = solver.write

    def counted(*arguments, **options):
        for grown in write(*arguments, **options):
            steps.append(grown)
            yield grown

    monkeypatch.setattr(solver, "write", counted)
    ended = []

    def followed():
        ended.append((yield from mas.stream("fox", max_new_tokens=12, temperature=0.9)))

    stream = followed()
    assert steps == []
    text = next(stream)
    assert 0 < len(steps) < 12
    assert text + "".join(stream) == expected.text
    assert ended == [expected]


def test_wrong_streams_are_refused_at_once(mas):
    with pytest.raises(ValueError, match="mode: 'telepathy' is not one of"):
        mas.stream("fox", mode="telepathy")
    with pytest.raises(ValueError, match="row 0: no field 'question'"):
        mas.stream({"q": "fox"})
    with pytest.raises(TypeError, match="batch_size"):
        mas.stream("fox", batch_size=1)


def test_command_line(mas, tmp_path, monkeypatch, capsys):
    mas.save_pretrained(tmp_path / "system")
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "what is the answer?"}\n{"messages": [{"role": "user", "content": "fox"}]}\n'
    )
    monkeypatch.chdir(tmp_path)
    command = ["run", "system", "--questions", "rows.jsonl", "--max-new-tokens", "6", "--temperature", "0.9"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--stream", "--tools", "python", "--unsafe", "--output", "answers.jsonl"]) == 0
    streamed = capsys.readouterr().out
    assert streamed.rpartition(" s\n")[0].rsplit(",", 1)[0] == plain.rpartition(" s\n")[0].rsplit(",", 1)[0]
    assert '"question": "fox"' in (tmp_path / "answers.jsonl").read_text().splitlines()[1]
    for wrong, message in (
        (["--stream", "--json"], "--stream prints text as it is written; it cannot be had with --json"),
        (["--tools", "perl"], "--tools: unknown tool 'perl'; there is python"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
