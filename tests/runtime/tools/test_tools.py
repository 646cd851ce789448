"""Tools in the final text: what a call does to its own row, to its neighbours, and to the machine."""

from __future__ import annotations

import os
import pickle
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from recmas import DELIBERATION, RecursiveMAS
from recmas.agents.sampling import Sampler
from recmas.sandbox import SANDBOXES, reasons
from recmas.tools import Caller, PythonTool, Toolbox
from tests.runtime.agents.test_decoding import one
from tests.runtime.tiny import prompts, tiny_agent


class Echo:
    """Returns what it was given, backwards, and remembers it."""

    def __init__(self, name="echo"):
        self.name, self.given = name, []

    def run(self, text):
        self.given.append(text)
        return text[::-1]


def reply_after(agent, row, count, ids):
    """A reply that gives one row `ids` after its `count`-th token."""
    seen = []

    def reply(at, token, room):
        if at != row:
            return []
        seen.append(token)
        return ids[:room] if len(seen) == count else []

    return reply


def drained(steps, batch):
    rows = [[] for _ in range(batch)]
    for grown in steps:
        for row, tokens in grown.items():
            rows[row] += tokens
    return rows


def test_a_row_goes_on_as_if_it_had_been_prompted_so(agent):
    """After a reply: the tokens of a fresh greedy decoding whose prompt ends with all that the row then held."""
    batch, rows = prompts(agent, (7, 2, 5))
    ids = [40, 41, 42, 43, 44, 45, 46]
    free = agent.decode(batch, 8)
    told = drained(agent.write(batch, 8, reply=reply_after(agent, 1, 3, ids)), 3)
    assert told[0] == free[0]
    assert told[2] == free[2]
    assert told[1][:10] == free[1][:3] + ids
    assert len(told[1]) == 8 + len(ids) or told[1][-1] in agent.eos_ids
    again = torch.cat([rows[1], agent.embed(torch.tensor([told[1][:10]]))], dim=1)
    assert told[1][10:] == agent.decode(one(again), 5)[0]


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_sampled_rows_with_replies_do_not_depend_on_their_neighbours(family):
    agent = tiny_agent(family)
    batch, rows = prompts(agent, (7, 2, 5))
    write = partial(agent.write, max_new_tokens=12, temperature=0.9, top_p=0.95, seed=3)
    together = drained(write(batch, reply=reply_after(agent, 1, 3, [40] * 9)), 3)
    alone = drained(write(one(rows[1]), rows=[1], reply=reply_after(agent, 0, 3, [40] * 9)), 1)
    assert alone == [together[1]]
    free = agent.decode(batch, 12, 0.9, 0.95, 3)
    assert [together[0], together[2]] == [free[0], free[2]]


def test_a_reply_is_cut_to_the_context():
    agent = tiny_agent("llama")
    agent.model.config.max_position_embeddings = 20
    agent.model.generation_config.eos_token_id = None
    agent.tokenizer.eos_token = None
    batch, _ = prompts(agent, (10, 4))
    told = drained(agent.write(batch, 50, reply=reply_after(agent, 0, 2, [40] * 100)), 2)
    assert [len(row) for row in told] == [11, 17]
    assert told[0][2:] == [40] * 9


def spoken(agent, toolbox, text, room=1000):
    """What a caller replies to a row that writes `text`."""
    caller = Caller(toolbox, 1, agent.text, agent.literal)
    ids = agent.tokenizer(text, add_special_tokens=False)["input_ids"]
    return caller, [agent.text(heard) for token in ids if (heard := caller(0, token, room))]


def test_calls_are_found_in_the_text_and_results_follow():
    agent, echo = tiny_agent("llama"), Echo()
    text = "I use <echo> tags. <echo>abc</echo> and <other>x</other> then <echo>\nd é\n</echo> end"
    caller, results = spoken(agent, Toolbox([echo]), text)
    assert echo.given == ["abc", "\nd é\n"]
    assert results == [" <result> cba </result>", " <result> é d </result>"]
    assert [(call.name, call.text, call.result) for call in caller.calls[0]] == [
        ("echo", "abc", "cba"),
        ("echo", "\nd é\n", "\né d\n"),
    ]


def test_calls_and_results_are_bounded_and_failures_are_told():
    agent = tiny_agent("llama")

    class Broken:
        name = "broken"

        def run(self, text):
            raise OSError("no\nluck")

    toolbox = Toolbox([Echo(), Broken()], max_calls=3, max_output=40)
    text = f"<echo>{'a' * 50}</echo><broken></broken><echo>1</echo><echo>2</echo><echo>3</echo>"
    caller, results = spoken(agent, toolbox, text)
    assert [call.result for call in caller.calls[0]] == [
        "a" * 34 + "\n[cut]",
        "error: OSError: no luck",
        "1",
        "error: no more than 3 calls",
        "error: no more than 3 calls",
    ]
    assert toolbox.tools["echo"].given == ["a" * 50, "1"]
    assert len(results) == 5
    assert spoken(agent, toolbox, "<echo>x</echo>", room=0)[1] == []


def test_results_hold_no_special_tokens():
    agent = tiny_agent("llama")
    caller = Caller(Toolbox([Echo()]), 1, agent.text, agent.literal)
    ids = agent.tokenizer("<echo>>soe<</echo>", add_special_tokens=False)["input_ids"]
    heard = [caller(0, token, 1000) for token in ids][-1]
    assert not agent.eos_ids & set(heard)
    assert agent.text(heard) == " <result> <eos> </result>"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("python", "tools: 'python', expected a list of tools"),
        (Echo(), "expected a list of tools"),
        ([object()], "is not a tool with a name"),
        ([Echo("a b")], "is not a tool with a name"),
        ([Echo(), Echo()], "two are called 'echo'"),
    ],
)
def test_bad_tools_are_refused(tools, message):
    with pytest.raises(ValueError, match=message):
        Toolbox(tools)


def test_bad_bounds_are_refused():
    with pytest.raises(ValueError, match="max_calls: -1 is negative"):
        Toolbox([], max_calls=-1)
    with pytest.raises(ValueError, match="max_output: 2 is less than"):
        Toolbox([], max_output=2)
    with pytest.raises(ValueError, match="seconds: 0 is not positive"):
        PythonTool(seconds=0)

    class Number:
        name = "number"

        def run(self, text):
            return 3

    with pytest.raises(TypeError, match="'number' returned int, expected str"):
        Toolbox([Number()]).call("number", "", 0)


@pytest.fixture(scope="module")
def mas():
    agents = {"reflector": tiny_agent("qwen3", seed=1), "toolcaller": tiny_agent("llama", seed=2)}
    return RecursiveMAS.create(agents, DELIBERATION, rounds=2, latent_steps=2, seed=0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_with_tools(mas, monkeypatch, temperature):
    """A row made to write a call reads the result and goes on by itself; the other row is as ever."""
    agent, echo = mas.agents["toolcaller"], Echo()
    script = agent.tokenizer("<echo>fox</echo>", add_special_tokens=False)["input_ids"]
    rows = ["what is the answer to everything?", "the lazy dog"]
    arguments = {"max_new_tokens": len(script) + 6, "temperature": temperature}

    class Scripted(Sampler):
        """Draws as ever, but gives row 0 of the run the script's tokens as long as there are any."""

        def __init__(self, temperature, top_p, seed, rows):
            super().__init__(temperature, top_p, seed, rows)
            self.row = list(rows).index(0) if 0 in rows else -1
            self.left = list(script)

        def draw(self, drawing, steps=1):
            self.drawing = drawing
            return super().draw(drawing, steps)

        def choose(self, logits, uniform):
            tokens = super().choose(logits, uniform)
            if self.row in self.drawing and self.left:
                tokens[self.row] = self.left.pop(0)
            return tokens

    plain = mas.answer(rows, **arguments)
    monkeypatch.setattr("recmas.agents.decoding.Sampler", Scripted)
    together = mas.answer(rows, tools=[echo], **arguments)
    alone = mas.answer(rows, tools=[echo], batch_size=1, **arguments)
    assert together == alone
    result = agent.literal(" <result> xof </result>")
    called, other = together
    assert called.tokens[: len(script) + len(result)] == script + result
    assert called.text.startswith("<echo>fox</echo> <result> xof </result>")
    assert called.text_tokens["toolcaller"] == len(called.tokens) - len(result) > len(script)
    assert [(call.name, call.text, call.result) for call in called.tool_calls] == [("echo", "fox", "xof")]
    assert other == plain[1]
    silent = mas.answer(rows, **arguments)[0]
    assert silent.text.startswith("<echo>fox</echo>")
    assert silent.tool_calls == []
    assert "<result>" not in silent.text


def test_tools_that_are_not_called_change_nothing(mas):
    rows = ["fox", "the lazy dog"]
    for temperature in (0.0, 0.8):
        arguments = {"max_new_tokens": 12, "temperature": temperature}
        plain = mas.answer(rows, **arguments)
        assert mas.answer(rows, tools=[PythonTool(sandbox="none")], **arguments) == plain


# The python tool. Its own limits are generous here and far from what each program does, so that a busy machine passes.
# What its sandbox keeps in is in tests/runtime/sandbox.


@pytest.fixture(params=SANDBOXES)
def sandbox(request):
    if request.param != "none" and (reason := reasons()[request.param]) is not None:
        pytest.skip(f"{request.param} does not work here: {reason}")
    return request.param


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("print(1)\nprint(2)", "1\n2"),
        (" 6 * 7 ", "42"),
        ("x = math.factorial(5)\nx", "120"),
        ("math = 3\nmath", "3"),
        ("", "(no output)"),
        ("print('é')", "é"),
        ("import sys; sys.exit(3)", "[exit_code] 3"),
        ("import os; dict(os.environ).keys() - {'LC_CTYPE', 'PWD'}", "set()"),
        ("import os; os.listdir()", "[]"),
        ("input()", '[stderr]\nTraceback (most recent call last):\n  File "<call>", line 1, in <module>'),
        ("\nprint(1)\n1 / 0\n", "1\n[stderr]\nTraceback"),
        ("1 +", "[stderr]\n  File"),
        ("bytearray(1 << 33)", "MemoryError\n[exit_code] 1"),
        ("print('x' * (1 << 24))", "[Errno 27] File too large"),
    ],
)
def test_python(program, result, sandbox):
    told = PythonTool(seconds=60, memory=1 << 30, file_size=1 << 20, sandbox=sandbox).run(program)
    assert told == result if "\n" not in result and "Errno" not in result and result != "1\n2" else result in told


def test_python_writes_where_it_may(sandbox):
    told = PythonTool(seconds=60, file_size=1 << 20, sandbox=sandbox).run("open('big', 'wb').write(bytes(1 << 24))")
    assert ("[Errno 13] Permission denied" if sandbox == "landlock" else "[Errno 27] File too large") in told


def test_python_is_stopped_with_all_it_started():
    """Without a sandbox, too: what stays in the group of the process."""
    program = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']).pid, flush=True)\n"
    )
    for rest, end in (("", ""), ("time.sleep(60)", "[stopped] after 2 s")):
        told = PythonTool(seconds=60 if not rest else 2, sandbox="none").run(program + rest)
        started, _, said = told.partition("\n")
        assert said == end
        deadline = time.monotonic() + 30
        while running(int(started)):
            assert time.monotonic() < deadline, "what it started lives on"
            time.sleep(0.01)


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_python_processor_time_is_bounded(sandbox):
    told = PythonTool(seconds=1, sandbox=sandbox).run("while True: pass")
    assert told in ("[stopped] after 1 s", f"[exit_code] {128 + signal.SIGKILL}")


def test_python_leaves_no_folder_behind(tmp_path, monkeypatch, sandbox):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = PythonTool(seconds=60, sandbox=sandbox).run("import os; os.getcwd()")
    assert told.startswith("/tmp" if sandbox == "bubblewrap" else str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_tool_that_was_sent_needs_its_sandbox_where_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = PythonTool()
    sent = pickle.dumps(tool)
    assert pickle.loads(sent).sandbox == tool.sandbox

    def choose(sandbox: str) -> str:
        raise ValueError(f"sandbox: {sandbox} does not work here: another machine")

    monkeypatch.setattr("recmas.tools.python.choose", choose)
    with pytest.raises(ValueError, match=f"sandbox: {tool.sandbox} does not work here: another machine"):
        pickle.loads(sent)
