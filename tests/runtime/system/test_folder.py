"""A system's folder is replaced whole, whenever a save is cut short, and its contents are compared on loading."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from recmas import Agent, Pattern, RecursiveMAS
from recmas.config.system_json import FILE_NAME, read_spec
from recmas.system import folder as system_folder
from tests.runtime.killing import another_writer, killed_at, seen_at_calls
from tests.runtime.tiny import tiny_agent


def system(seed: int, agent: Agent | None = None, combine: str = "weighted") -> RecursiveMAS:
    """Two agents that share a model; a save writes agents, links and edge scores."""
    agent = agent or tiny_agent("llama", "one", 16, seed=seed)
    pattern = Pattern((("a", "b"), ("c",)), combine=combine)
    mas = RecursiveMAS.create(dict.fromkeys("abc", agent), pattern, rounds=1, latent_steps=1, seed=seed)
    with torch.no_grad():
        for score in mas.edge_scores.values():
            score.fill_(seed)
    return mas


def files(place: Path) -> dict[str, bytes]:
    found = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name != ".lock"}


def named(place: Path) -> dict[str, bytes]:
    """The files that a load reads: `system.json` and what it names. The same files are the same system, loaded once."""
    parts = system_folder._parts(read_spec(place))
    read = files(place).items()
    return {name: content for name, content in read if name == FILE_NAME or any(map(Path(name).is_relative_to, parts))}


def weights(mas: RecursiveMAS) -> list[float]:
    """Numbers that distinguish two systems in each of their parts."""
    links = [*mas.inner_links.values(), *mas.outer_links.values()]
    sums = [link.proj1.weight.double().sum().item() for link in links]
    sums += [score.item() for score in mas.edge_scores.values()]
    return [*sums, mas.agents["a"].model.get_input_embeddings().weight.double().sum().item()]


@pytest.mark.parametrize(
    ("moved", "again"), [(False, True), (True, False)], ids=["before the call, second names", "after it, first names"]
)
def test_a_save_killed_at_any_call_leaves_the_old_system_or_the_new_one(tmp_path, moved, again):
    """One save, each of whose states on the disk is what a process killed there would leave."""
    old, new = system(1), system(2)
    place = tmp_path / "s"
    old.save_pretrained(place)
    if again:
        old.save_pretrained(place)
    (place / "notes.txt").write_text("mine")
    known = {"old": weights(old), "new": weights(new)}
    seen, states = [], []

    def look():
        contents = named(place)
        if contents not in seen:
            shutil.copytree(place, tmp_path / f"state-{len(seen)}")
            seen.append(contents)
        states.append(seen.index(contents))

    with seen_at_calls(look, moved):
        new.save_pretrained(place)
    told = []
    for number in range(len(seen)):
        loaded = weights(RecursiveMAS.from_pretrained(tmp_path / f"state-{number}"))
        told.append("old" if loaded == known["old"] else "new" if loaded == known["new"] else "mixed")
    found = [told[number] for number in states]
    assert found == ["old"] * found.count("old") + ["new"] * found.count("new")
    assert found.count("old") > 30
    assert found.count("new") > 3


def test_links_whose_names_would_be_equal_are_each_kept(tmp_path):
    """From "a-b" to "c" and from "a" to "b-c"; the third save finds names taken that the second has left."""
    pattern = Pattern((("a-b", "a"), ("c", "b-c"), ("d",)))
    agents = dict.fromkeys(pattern.roles, tiny_agent("llama", "everybody"))
    for seed in range(3):
        mas = RecursiveMAS.create(agents, pattern, rounds=1, seed=seed)
        mas.save_pretrained(tmp_path / "s")
        assert weights(RecursiveMAS.from_pretrained(tmp_path / "s")) == weights(mas)
        assert len(list((tmp_path / "s" / "links").iterdir())) == len(mas.inner_links) + len(mas.outer_links)


def test_the_next_save_removes_what_a_killed_one_left(tmp_path):
    place = tmp_path / "s"
    old = system(1)
    old.save_pretrained(place)
    whole = {name.replace(".2", "") for name in files(place)}
    for stop in (20, 40, 60):
        assert killed_at(stop, True, lambda: system(2).save_pretrained(place))
    assert len(files(place)) > len(whole)
    old.save_pretrained(place)
    assert {name.replace(".2", "") for name in files(place)} == whole
    assert len(files(place)) == len(whole)


def test_a_first_save_killed_at_any_call_leaves_nothing_or_the_system(tmp_path):
    mas, place, found = system(1), tmp_path / "seen", []

    def look():
        found.append(place.exists())
        assert not place.exists() or weights(RecursiveMAS.from_pretrained(place)) == weights(mas)

    with seen_at_calls(look, moved=True):
        mas.save_pretrained(place)
    assert found.count(False) > 30
    shutil.rmtree(place)
    for stop in range(1, 1000, 9):
        if not killed_at(stop, True, lambda: mas.save_pretrained(tmp_path / "s")):
            break
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
    assert stop > 30
    assert [path.name for path in tmp_path.iterdir()] == ["s"]  # each try swept what the one before it had left


def test_a_failed_save_leaves_the_old_system_and_nothing_else(tmp_path, monkeypatch):
    place = tmp_path / "s"
    system(1).save_pretrained(place)
    before, fsync, left = files(place), os.fsync, 0

    def full(handle):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    for left in (1, 7, 20):  # noqa: B007
        with pytest.raises(OSError, match=f"No space left on device: '{place}") as raised:
            system(2).save_pretrained(place)
        assert raised.value.errno == errno.ENOSPC
        assert files(place) == before


def test_a_full_disk_names_the_folder_whoever_writes(tmp_path, monkeypatch):
    """Tokenizers and safetensors write by themselves; of a full disk they tell in exceptions of their own."""

    def fail(agent, place):
        raise Exception("No space left on device (os error 28)")

    system(1).save_pretrained(tmp_path / "s")
    monkeypatch.setattr(Agent, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"s/agents/a\.2: cannot be written: No space left"):
        system(2).save_pretrained(tmp_path / "s")


def test_everything_is_on_the_disk_before_system_json_is_in_place(tmp_path, monkeypatch):
    place = tmp_path / "s"
    system(1).save_pretrained(place)
    synced, fsync, replace = set(), os.fsync, os.replace

    def committed(source, target):
        if Path(target).name == FILE_NAME:
            named = system_folder._parts(read_spec_of(source))
            parts = [place / name for name in named]
            for path in [
                place,
                place / "links",
                place / "agents",
                *parts,
                *(p for part in parts for p in part.rglob("*")),
            ]:
                assert path.stat().st_ino in synced, path
            assert os.stat(source).st_ino in synced
        replace(source, target)

    def read_spec_of(path):
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        shutil.copy(path, copy / FILE_NAME)
        return read_spec(copy)

    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", committed)
    system(2).save_pretrained(place)
    assert weights(RecursiveMAS.from_pretrained(place)) == weights(system(2))
    assert place.stat().st_ino in synced


def test_agents_that_a_system_was_loaded_with_stay_where_they_are(tmp_path):
    place = tmp_path / "s"
    system(1).save_pretrained(place)
    loaded = RecursiveMAS.from_pretrained(place)
    for _ in range(3):
        loaded.save_pretrained(place)
        spec = read_spec(place)
        assert {agent.model for agent in spec.agents.values()} == {"agents/a"}
        assert any(name.startswith("agents/a/") for name in spec.sha256)
    assert weights(RecursiveMAS.from_pretrained(place)) == weights(loaded)


def test_an_agent_whose_folder_is_gone_is_written_from_memory(tmp_path):
    system(1).save_pretrained(tmp_path / "s")
    loaded = RecursiveMAS.from_pretrained(tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    loaded.save_pretrained(tmp_path / "t")
    assert weights(RecursiveMAS.from_pretrained(tmp_path / "t")) == weights(loaded)


def test_files_of_others_in_the_folder_stay(tmp_path):
    place = tmp_path / "s"
    system(1).save_pretrained(place)
    (place / "links" / "mine").mkdir()
    (place / "links" / "mine" / "notes.txt").write_text("precious")
    system(2).save_pretrained(place)
    assert (place / "links" / "mine" / "notes.txt").read_text() == "precious"


def test_a_second_writer_is_refused(tmp_path):
    place = tmp_path / "s"
    system(1).save_pretrained(place)
    before = files(place)
    with another_writer(place), pytest.raises(ValueError, match="s: another process is writing there"):
        system(2).save_pretrained(place)
    assert files(place) == before
    system(2).save_pretrained(place)


@pytest.mark.parametrize("name", ["links/a/model.safetensors", "links/b-c/config.json", "links/edge_scores.safetensors",
                                  "agents/a/config.json", "agents/a/tokenizer.json"])  # fmt: skip
def test_a_flipped_bit_is_refused_and_names_its_file(tmp_path, name):
    system(1).save_pretrained(tmp_path / "s")
    path = tmp_path / "s" / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"s/{name}: is damaged or was changed, its sha256 is not the one in system"):
        RecursiveMAS.from_pretrained(tmp_path / "s")
    path.unlink()
    with pytest.raises(
        ValueError, match=rf"s/{name}: (no such file, but system\.json has its sha256|cannot be read: .*No such file)"
    ):
        RecursiveMAS.from_pretrained(tmp_path / "s")


def test_a_system_without_checksums_loads(tmp_path):
    mas = system(1)
    mas.save_pretrained(tmp_path / "s")
    path = tmp_path / "s" / FILE_NAME
    content = json.loads(path.read_text())
    assert all(len(digest) == 64 for digest in content.pop("sha256").values())
    assert content.pop("edge_scores") == "links/edge_scores.safetensors"
    path.write_text(json.dumps(content))
    loaded = RecursiveMAS.from_pretrained(tmp_path / "s")
    assert weights(loaded) == weights(mas)
    loaded.save_pretrained(tmp_path / "s")
    assert "agents/a/config.json" not in read_spec(tmp_path / "s").sha256  # nobody has compared it
    assert "links/a.2/config.json" in read_spec(tmp_path / "s").sha256


def test_a_damaged_system_json_is_not_replaced(tmp_path):
    system(1).save_pretrained(tmp_path / "s")
    (tmp_path / "s" / FILE_NAME).write_text("{")
    before = files(tmp_path / "s")
    with pytest.raises(ValueError, match="system.json: cannot be read as JSON"):
        system(2).save_pretrained(tmp_path / "s")
    assert files(tmp_path / "s") == before


def test_saving_into_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not a system; nothing was written"):
        system(1).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("kind", ["links", "agents"])
def test_saving_through_a_link_that_leads_out_is_refused(tmp_path, kind):
    system(1).save_pretrained(tmp_path / "s")
    shutil.move(tmp_path / "s" / kind, tmp_path / "elsewhere")
    (tmp_path / "s" / kind).symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{kind} leads out of .* by a symbolic link"):
        system(2).save_pretrained(tmp_path / "s")
    assert files(tmp_path / "elsewhere") == before
