"""Folders of systems that were not made in good faith, each by what it changes of a good one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Break = Callable[[Path], object]

MODEL, LINK = "agents/planner", "links/planner"
DEEP = "[" * 200_000
HUGE = 1 << 40


def settings(edit: Callable[[dict[str, Any]], object]) -> Break:
    """A change of ``system.json``, which keeps no checksums."""

    def change(folder: Path) -> None:
        path = folder / "system.json"
        content = json.loads(path.read_text())
        del content["sha256"]
        edit(content)
        path.write_text(json.dumps(content))

    return change


unchecked = settings(lambda content: None)


def write(name: str, content: str | bytes) -> Break:
    def change(folder: Path) -> None:
        unchecked(folder)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edit(name: str, **values: Any) -> Break:
    """Other values in a JSON file."""

    def change(folder: Path) -> None:
        unchecked(folder)
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def replace(name: str, make: Callable[[Path], object]) -> Break:
    """Something else in the place of a file or folder."""

    def change(folder: Path) -> None:
        unchecked(folder)
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def led_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its name may be too long otherwise
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def header(described: Any, claimed: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file; its header may claim another length than its own."""
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"model.embed_tokens.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def all_agents(**values: Any) -> Break:
    return settings(lambda content: [agent.update(values) for agent in content["agents"].values()])


def many_files(folder: Path) -> None:
    unchecked(folder)
    for number in range(20_000):
        (folder / MODEL / str(number)).touch()


def many_roles(count: int) -> Break:
    def change(content: dict[str, Any]) -> None:
        roles = [f"r{number}" for number in range(count)]
        agent = content["agents"]["planner"]
        content["pattern"]["stages"] = [*([role] for role in roles), ["solver"]]
        content["agents"] |= dict.fromkeys(roles, agent)

    return settings(change)


def prompt(text: str) -> Break:
    return settings(lambda content: content["agents"]["solver"].update(prompt={"later": text}))


def chat(template: str) -> Break:
    """A chat template, in the folder of the agent that has one."""

    def both(folder: Path) -> None:
        all_agents(chat=True)(folder)
        (folder / MODEL / "chat_template.jinja").write_text(template)

    return both


SETTINGS: dict[str, Break] = {
    "no JSON": write("system.json", "{"),
    "nested lists": write("system.json", DEEP),
    "NaN": write("system.json", '{"format": NaN}'),
    "a number beyond all": write("system.json", '{"format": 1e999}'),
    "a number of 100,000 digits": write("system.json", '{"format": ' + "9" * 100_000 + "}"),
    "a file of 32 MiB": write("system.json", " " * (32 << 20)),
    "no UTF-8": write("system.json", b"\xff\xfe{}"),
    "a list": write("system.json", "[1, 2]"),
    "a FIFO": replace("system.json", os.mkfifo),
    "a device without end": replace("system.json", led_to("/dev/zero")),
    "a socket": replace("system.json", a_socket),
    "a link to itself": replace("system.json", led_to("system.json")),
    "a key that clears the screen": settings(lambda content: content.update({"\x1b[2J\r\n\u202e": 1})),
    "a key of a megabyte": settings(lambda content: content.update({"k" * (1 << 20): 1})),
    "a thousand million rounds": settings(lambda content: content.update(defaults={"rounds": 10**9})),
    "a thousand million steps": settings(lambda content: content.update(defaults={"latent_steps": 10**9})),
    "as many tokens": all_agents(decoding={"max_new_tokens": 10**9}),
    "temperatures beyond float32": all_agents(decoding={"temperature": 1e-320}),
    "a thousand roles": many_roles(1000),
    "a role that is a path": settings(lambda content: content["pattern"].update(stages=[["../../x"], ["solver"]])),
    "a template of openings": prompt("{{" * (1 << 19)),
    "a template of slots": prompt("{{from:planner}}" * (1 << 16)),
    "a template of two megabytes": prompt("x" * (2 << 20)),
    "a prompt of a megabyte": prompt("fox {{from:critic}} " * (1 << 15)),
    "a model without a name": all_agents(model=""),
    "a model with a NUL in its name": all_agents(model="a\0b"),
    "a model of the hub": all_agents(model="somebody/model"),
}
OUTSIDE: dict[str, Break] = {
    "a model somewhere else": all_agents(model="/usr/lib"),
    "a model above": all_agents(model="../../../../usr/lib"),
    "a link above": settings(lambda content: content["agents"]["planner"].update(inner_link="links/../../../x")),
    "a link somewhere else": settings(lambda content: content["outer_links"].update({"planner->critic": "/etc"})),
    "scores somewhere else": settings(
        lambda content: (content.update(edge_scores="/etc/passwd"), content["pattern"].update(combine="weighted"))
    ),
    "a model's folder that is a link": replace(MODEL, led_to("/usr/lib")),
    "weights that are a link": replace(f"{MODEL}/model.safetensors", led_to("/etc/passwd")),
    "a tokenizer that is a link": replace(f"{MODEL}/tokenizer.json", led_to("/etc/passwd")),
    "a link's weights that are a link": replace(f"{LINK}/model.safetensors", led_to("/etc/passwd")),
    "checksums of a file above": settings(lambda content: content.update(sha256={f"{LINK}/../../../x": "0"})),
}
MODELS: dict[str, Break] = {
    "more layers than weights": edit(f"{MODEL}/config.json", num_hidden_layers=1 << 30),
    "a vocabulary of a million millions": edit(f"{MODEL}/config.json", vocab_size=HUGE),
    "a width of a million millions": edit(f"{MODEL}/config.json", hidden_size=HUGE),
    "a width of a million": edit(f"{MODEL}/config.json", hidden_size=1 << 20),
    "as many heads": edit(f"{MODEL}/config.json", num_attention_heads=HUGE),
    "heads as wide": edit(f"{MODEL}/config.json", head_dim=HUGE),
    "a negative width": edit(f"{MODEL}/config.json", hidden_size=-16),
    "no heads": edit(f"{MODEL}/config.json", num_attention_heads=0),
    "an unknown model": edit(f"{MODEL}/config.json", model_type="sandcastle", architectures=["Sandcastle"]),
    "code of its own": edit(
        f"{MODEL}/config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    ),
    "a configuration that is a list": write(f"{MODEL}/config.json", "[]"),
    "a nested configuration": write(f"{MODEL}/config.json", DEEP),
    "a configuration that is a FIFO": replace(f"{MODEL}/config.json", os.mkfifo),
    "numbers that are texts": edit(f"{MODEL}/config.json", hidden_size="16", num_hidden_layers="3"),
    "pickled weights": replace(
        f"{MODEL}/model.safetensors", lambda path: path.with_name("pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    ),
    "weights that are a FIFO": replace(f"{MODEL}/model.safetensors", os.mkfifo),
    "weights that are a device": replace(f"{MODEL}/model.safetensors", led_to("/dev/zero")),
    "an empty file of weights": write(f"{MODEL}/model.safetensors", b""),
    "a header of 90 MB that is not there": write(f"{MODEL}/model.safetensors", header({}, 90_000_000)),
    "a header of 2^63 bytes": write(f"{MODEL}/model.safetensors", header({}, 2**63)),
    "a nested header": write(f"{MODEL}/model.safetensors", header(DEEP.encode())),
    "a tensor that is not there": write(f"{MODEL}/model.safetensors", header(tensor([1 << 30], [0, 4 << 30]))),
    "a tensor behind the end": write(f"{MODEL}/model.safetensors", header(tensor([1], [HUGE, HUGE + 4]), data=b"1234")),
    "a tensor of negative size": write(f"{MODEL}/model.safetensors", header(tensor([-1], [0, 4]), data=b"1234")),
    "a tensor larger than its bytes": write(f"{MODEL}/model.safetensors", header(tensor([HUGE], [0, 4]), data=b"1234")),
    "a tensor of an unknown type": write(f"{MODEL}/model.safetensors", header(tensor([1], [0, 4], "F1"), data=b"1234")),
    "shards above": write(
        f"{MODEL}/model.safetensors.index.json", json.dumps({"weight_map": {"x": "../../../../etc/passwd"}})
    ),
    "shards that are numbers": write(f"{MODEL}/model.safetensors.index.json", '{"weight_map": {"x": 3}}'),
    "20,000 files": many_files,
    "a tokenizer that is no JSON": write(f"{MODEL}/tokenizer.json", "{"),
    "a nested tokenizer": write(f"{MODEL}/tokenizer.json", DEEP),
    "a tokenizer that is a FIFO": replace(f"{MODEL}/tokenizer.json", os.mkfifo),
    "no tokenizer": replace(f"{MODEL}/tokenizer.json", lambda path: None),
    "an adapter": replace(
        f"{MODEL}/config.json", lambda path: path.with_name("adapter_config.json").write_text('{"peft_type": "LORA"}')
    ),
}
LINKS: dict[str, Break] = {
    "a link of 2^40 features": edit(f"{LINK}/config.json", in_features=HUGE, hidden_features=HUGE, out_features=HUGE),
    "a link with eps NaN": lambda folder: write(
        f"{LINK}/config.json", (folder / LINK / "config.json").read_text().replace("1e-05", "NaN")
    )(folder),
    "a nested configuration of a link": write(f"{LINK}/config.json", DEEP),
    "a link's configuration that is a FIFO": replace(f"{LINK}/config.json", os.mkfifo),
    "a link's weights that are a FIFO": replace(f"{LINK}/model.safetensors", os.mkfifo),
    "a link's weights without end": replace(f"{LINK}/model.safetensors", led_to("/dev/zero")),
    "a link's weights cut short": lambda folder: write(
        f"{LINK}/model.safetensors", (folder / LINK / "model.safetensors").read_bytes()[:-4]
    )(folder),
    "a link's weights that were changed": lambda folder: (folder / LINK / "model.safetensors").write_bytes(
        (folder / LINK / "model.safetensors").read_bytes()[:-4] + b"1234"
    ),
    "no link": replace(LINK, lambda path: None),
    "a link that is a file": replace(LINK, lambda path: path.write_text("x")),
}
CHATS: dict[str, Break] = {
    "a chat template that never ends": chat(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a chat template of ten gigabytes": chat("{{ 'a' * 10 ** 10 }}"),
    "a chat template that doubles": chat(
        "{% set n = namespace(t='a') %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}"
    ),
    "a chat template that leaves jinja": chat("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a chat template that calls itself": chat("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "a chat template of brackets": chat("{{ " + "(" * 50_000),
    "a chat template that is none": chat("{% for %}"),
    "a chat template that writes a slot twice": chat("{{ messages[0].content }}{{ messages[0].content }}"),
}
HOSTILE = {
    f"{kind}: {name}": change
    for kind, table in (("system", SETTINGS), ("outside", OUTSIDE), ("model", MODELS), ("link", LINKS), ("chat", CHATS))
    for name, change in table.items()
}
