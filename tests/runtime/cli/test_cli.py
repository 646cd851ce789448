"""The command line: what it does with good input (in this process) and with bad input (as a process of its own)."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import torch

from recmas import SEQUENTIAL, AnswerOptions, RecursiveMAS, __version__
from recmas.cli import common, main
from recmas.cli.init import read_pattern
from recmas.config.system_json import read_spec
from recmas.devices.failure import DeviceError
from recmas.system import folder
from recmas.training import alignment
from tests.runtime.commands import recmas
from tests.runtime.tiny import tiny_agent, tiny_link

ROWS = [
    {"question": "what is it?", "answer": "x", "targets": {"planner": "fox", "critic": "dog", "solver": "lazy"}},
    {"question": "fox", "answer": "y", "targets": {"planner": "the fox", "critic": "dog", "solver": "lazy dog"}},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a system and questions; copied where a test breaks them."""
    folder = tmp_path_factory.mktemp("cli")
    agents = {
        "planner": tiny_agent("qwen3", "planner", 32, 1),
        "critic": tiny_agent("llama", "critic", 40, 2),
        "solver": tiny_agent("qwen2", "solver", 24, 3),
    }
    mas = RecursiveMAS.create(agents, SEQUENTIAL, rounds=2, latent_steps=2, seed=0)
    mas.save_pretrained(folder / "system")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def broken(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(folder, message, *arguments):
    """The command, in a process of its own, exits with 2 after exactly one line on stderr that holds the message."""
    one_line(message, *recmas(folder, *arguments)[:3])


def one_line(message, status, out, err):
    assert status == 2
    assert out == ""
    assert err.startswith("recmas: error: ")
    assert err.count("\n") == 1
    assert message in err


RUN = ("run", "system", "--questions", "rows.jsonl")


def unchecked(folder):
    """Contents may be changed without being told so before anything else is."""
    path = folder / "system" / "system.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))


def inner_link(system, role):
    """The weights of a role's inner link, wherever the latest save has put them."""
    return (system / read_spec(system).agents[role].inner_link / "model.safetensors").read_bytes()


def outer_link(system, source, target):
    return (system / read_spec(system).outer_links[source, target] / "model.safetensors").read_bytes()


def test_a_fresh_interpreter_refuses_in_one_line(broken):
    """What importing and ending print would show here, and in no process that was forked."""
    arguments = [*RUN, "--latent-steps", "poet=2"]
    done = subprocess.run([sys.executable, "-m", "recmas", *arguments], cwd=broken, capture_output=True, text=True)
    one_line("latent_steps: unknown role 'poet'; the pattern has", done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_looked_for_in_what_a_command_imports(monkeypatch, collects):
    was, at_exit = gc.isenabled(), []
    monkeypatch.setattr("atexit.register", at_exit.append)
    (gc.enable if collects else gc.disable)()
    try:
        with common._nothing_collected():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
        assert at_exit == [gc.freeze]
    finally:
        (gc.enable if was else gc.disable)()


def test_missing_system(broken):
    refused(broken, "nowhere/system.json: no such file; nowhere is not a system", "run", "nowhere", "--question", "fox")


def test_truncated_safetensors(broken):
    unchecked(broken)
    path = broken / "system" / "links" / "planner-critic" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(broken, "outer link planner->critic: system/links/planner-critic/model.safetensors is truncated", *RUN)


def test_truncated_model(broken):
    path = broken / "system" / "agents" / "critic" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(broken, "system/agents/critic/model.safetensors: is truncated or no safetensors file", *RUN)


def test_wrong_link_width(broken):
    unchecked(broken)
    shutil.rmtree(broken / "system" / "links" / "critic")
    tiny_link(tiny_agent("llama", "x", 16)).save_pretrained(broken / "system" / "links" / "critic")
    refused(broken, "system: inner link of 'critic' maps 16 to 16 features, the models need 40 to 40", *RUN)


def test_unknown_role(broken):
    path = broken / "system" / "system.json"
    path.write_text(path.read_text().replace("{{from:critic}}", "{{from:poet}}"))
    refused(broken, "agent 'solver', round 1: template", *RUN)


def test_broken_third_line(broken):
    with (broken / "rows.jsonl").open("a") as file:
        file.write('{"question": \n')
    refused(broken, "rows.jsonl, line 3: not valid JSON", *RUN)


def test_empty_file(broken):
    (broken / "rows.jsonl").write_text("\n")
    refused(broken, "rows.jsonl: holds no rows", *RUN)


def test_a_prompt_beyond_the_context_names_its_row(broken):
    row = {"question": "fox " * 300}
    with (broken / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    message = "row 2: agent 'planner': a prompt of "
    refused(broken, message, *RUN, "--output", "answers.jsonl")
    assert not (broken / "answers.jsonl").exists()


def test_a_slot_that_the_chat_template_drops(broken):
    unchecked(broken)
    template = broken / "system" / "agents" / "critic" / "chat_template.jinja"
    template.write_text("{% for message in messages %}{{ message.content[:5] }}{% endfor %}")
    refused(broken, "agent 'critic': the chat template drops or changes what the user says", *RUN)


def test_a_tokenizer_without_chat_template(broken):
    unchecked(broken)
    (broken / "system" / "agents" / "critic" / "chat_template.jinja").unlink()
    refused(broken, "system: agent 'critic': the tokenizer has no chat template; set chat to false", *RUN)


def test_a_peft_adapter_in_the_place_of_a_model(broken):
    unchecked(broken)
    folder = broken / "system" / "agents" / "critic"
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(broken, "agent 'critic': system/agents/critic is a PEFT adapter; merge it into its base model first", *RUN)


def test_negative_rounds(broken):
    refused(broken, "--rounds: must be at least 1, got -1", *RUN, "--rounds", "-1")


def test_unknown_backend(broken):
    refused(broken, "'abacus'", *RUN, "--backend", "abacus")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("turbo", "unknown backend 'turbo': expected one of auto, reference, cpu, cuda, triton"),
        ("cuda", "backend 'cuda' cannot serve link_fwd on cpu"),
    ],
)
def test_the_environment_names_a_backend_unless_the_option_does(made, monkeypatch, capsys, name, message):
    monkeypatch.chdir(made)
    monkeypatch.setenv("RECMAS_BACKEND", name)
    arguments = [*RUN, "--rounds", "1", "--latent-steps", "1", "--max-new-tokens", "1"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("recmas: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert main([*arguments, "--backend", "reference"]) == 0


def test_missing_model_folder(broken):
    shutil.rmtree(broken / "system" / "agents" / "critic")
    refused(broken, "agents.critic.model: no such folder: system/agents/critic", *RUN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "required: COMMAND, one of init, run, serve, eval, audit, tune, train, lab, convert, inspect, check, info",
        ),
        (["train"], "required: STAGE, one of inner, warmup, outer"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "required: SYSTEM"),
        (["train", "inner"], "required: SYSTEM"),
        (["train", "outer"], "required: SYSTEM, --data"),
        (["train", "inner", "system"], "give either --data FILE.jsonl or --texts FILE.jsonl|HUB_ID"),
        (["run", "system", "--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
        (["run", "system", "--rounds", "two"], "--rounds: must be an integer or auto, got 'two'"),
        (["run", "system", "--max-new-tokens", "-2"], "--max-new-tokens: must be at least 0, got -2"),
        (["run", "system", "--mode", "telepathy"], "'telepathy'"),
        (["run", "system", "--latent-steps", "planner=x"], "--latent-steps"),
        (["run", "system"], "give either --questions FILE.jsonl or --question TEXT"),
        (["run", "system", "--question", "x", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "system", "--question", "x", "--device", "gpu"], "device: 'gpu' cannot be used here: "),
        (["run", "system", "--question", "x", "--device", "cuda:99"], "device: 'cuda:99' cannot be used here: "),
        (["run", "system", "--question", "x", "--device", "poet=cpu"], "device: unknown role 'poet'; the pattern has"),
        (["run", "system", "--question", "x", "--device", "solver=tpu"], "device: 'tpu' cannot be used here: "),
        (
            ["run", "system", "--question", "x", "--device", "solver=cpu,cpu"],
            "invalid DEVICE or ROLE=DEVICE,... value: 'solver=cpu,cpu'",
        ),
        (["run", "system", "--question", "x", "--backend", "triton"], "triton"),
        (
            ["run", "system", "--questions", "nowhere.jsonl"],
            "error: nowhere.jsonl: no such file; expected a JSONL file",
        ),
        (["run", "system", "--questions", "system"], "error: system: is a folder; expected a JSONL file"),
        (["eval", "system", "--data", "nowhere.jsonl"], "error: nowhere.jsonl: no such file; expected a JSONL file"),
        (["run", "rows.jsonl", "--question", "x"], "rows.jsonl: is a file, expected the folder of a system"),
        (["run", "system", "--config", "system/links/planner/model.safetensors"], "--config: not UTF-8 text"),
        ([*RUN, "--output", "system"], "--output: system is a folder, expected the name of a JSONL file"),
        (["eval", "system", "--data", "rows.jsonl", "--output", "system"], "--output: system is a folder"),
        ([*RUN, "--output", "rows.jsonl/new/x"], "rows.jsonl is a file, expected a folder to write x into"),
        (["init", "new", "--models", "planner"], "ROLE=VALUE"),
        (["init", "new", "--models", "poet=x"], "unknown role 'poet'; the pattern has planner, critic, solver"),
        (["init", "new", "--models", "planner=x", "--pattern", "circle"], "'circle' is neither one of sequential"),
        (["init", "system", "--models", "planner=x"], "system: exists already; nothing was written"),
    ],
)
def test_other_mistakes_are_one_line(made, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(made)
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    one_line(message, status, *capsys.readouterr())


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"recmas {__version__}\n"


def test_an_interrupt_is_told_in_one_line_however_early(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("recmas.cli.CommandLineParser", interrupted)
    assert main(RUN) == 130
    assert capsys.readouterr().err == "recmas: interrupted\n"


def test_traceback_on_request(capsys):
    assert main(["--traceback", "run", "nowhere", "--question", "fox"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("recmas: error: nowhere/system.json: no such file")


@pytest.mark.parametrize("error", [TypeError, RuntimeError, KeyError, AssertionError])
def test_mistakes_of_our_own_are_called_so(made, monkeypatch, capsys, error):
    def fail(*arguments, **options):
        raise error("oops")

    monkeypatch.chdir(made)
    monkeypatch.setattr(RecursiveMAS, "answer", fail)
    assert main(RUN) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"recmas: internal error: {error.__name__}: ")
    assert err.endswith("; recmas --traceback COMMAND shows where it arose\n")
    assert err.count("\n") == 1
    assert main(["--traceback", *RUN]) == 1
    assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


@pytest.mark.parametrize("error", [torch.AcceleratorError, DeviceError])
def test_a_device_that_fails_is_no_mistake_of_our_own(made, monkeypatch, capsys, error):
    def fail(*arguments, **options):
        raise error("CUDA error: unspecified launch failure\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1")

    monkeypatch.chdir(made)
    monkeypatch.setattr(RecursiveMAS, "answer", fail)
    assert main(RUN) == 2
    assert capsys.readouterr().err == "recmas: error: CUDA error: unspecified launch failure\n"


def help_without_torch(folder, *arguments):
    """The help of a command, which must not have loaded torch."""
    code = "import sys; from recmas.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *arguments, "--help"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.stdout.endswith("False\n")
    return done


@pytest.mark.parametrize("command", ["run", "eval", "train inner", "train warmup", "train outer"])
def test_help_of_a_command_is_quick(tmp_path, command):
    assert "--rounds" in help_without_torch(tmp_path, *command.split()).stdout


def test_help_is_quick_and_lists_every_command(tmp_path):
    done = help_without_torch(tmp_path)
    for command in ("init", "run", "eval", "train", "inspect", "check", "info"):
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize(
    "command", ["init", "run", "eval", "inspect", "check", "train inner", "train warmup", "train outer"]
)
def test_help_explains_every_option(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "<function" not in out
    assert "<class" not in out


def test_run(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made)
    output = tmp_path / "deep" / "answers.jsonl"
    options = ["--max-new-tokens", "3", "--latent-steps", "planner=1,solver=3"]
    assert main([*RUN, *options, "--output", str(output), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert printed["answers"] == written
    assert [record["index"] for record in written] == [0, 1]
    assert written[0]["latent_steps"] == {"planner": 2, "critic": 4, "solver": 3}
    answers = RecursiveMAS.from_pretrained("system").answer(
        ROWS, max_new_tokens=3, latent_steps={"planner": 1, "solver": 3}
    )
    assert [record["text"] for record in written] == [answer.text for answer in answers]
    assert printed["reading"] == {stage: asdict(how) for stage, how in answers.reading.items()}
    assert any(how["computed"] < how["positions"] for how in printed["reading"].values())
    assert main([*RUN, *options, "--no-prefix-reuse", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["answers"] == written
    assert all(how["computed"] == how["positions"] for how in whole["reading"].values())


def test_run_from_a_configuration_file(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made)
    config = tmp_path / "run.yaml"
    config.write_text("questions: rows.jsonl\nlatent_steps: {planner: 1}\nrounds: 1\nmax_new_tokens: 2\nmode: text\n")
    assert main(["run", "system", "--config", str(config), "--mode", "latent"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("0: ")
    told = r"2 answers, \d+ prompt positions \(0 reused\), 6 latent steps, 4 text tokens"
    assert re.match(told, out.splitlines()[-1])


def test_init_then_train_then_eval(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models = ",".join(f"{role}={made / 'system' / 'agents' / role}" for role in SEQUENTIAL.roles)
    rows = str(made / "rows.jsonl")
    assert main(["init", "new", "--models", models, "--rounds", "2", "--latent-steps", "2"]) == 0
    fresh = outer_link(tmp_path / "new", "planner", "critic")
    settings = ["--data", rows, "--steps", "2", "--batch-size", "2"]
    assert main(["train", "inner", "new", *settings, "--roles", "planner,critic"]) == 0
    assert main(["train", "warmup", "new", *settings, "--edges", "planner->critic", "--output", "warm"]) == 0
    capsys.readouterr()
    assert main(["train", "outer", "warm", *settings, "--rounds", "1,2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["results"]["outer links"]["steps"] == 2
    assert outer_link(tmp_path / "new", "planner", "critic") == fresh
    assert outer_link(tmp_path / "warm", "planner", "critic") != fresh
    assert main(["eval", "warm", "--data", rows, "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["questions"] == 2


@pytest.mark.parametrize("failing", ["training", "saving"])
def test_a_training_that_failed_halfway_goes_on_and_ends_as_if_it_had_not(made, tmp_path, monkeypatch, capsys, failing):
    monkeypatch.chdir(tmp_path)
    words = ["train", "inner", str(made / "system"), "--data", str(made / "rows.jsonl"), "--steps", "2"]
    words += ["--batch-size", "2", "--json"]
    assert main([*words, "--output", "whole"]) == 0
    calls, owner = [], alignment if failing == "training" else folder
    name = "train_in_turn" if failing == "training" else "write_spec"
    real = getattr(owner, name)

    def second_fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, second_fails)
        assert main([*words, "--output", "cut"]) == 2
    fresh = inner_link(made / "system", "planner")
    assert inner_link(tmp_path / "cut", "planner") == fresh
    capsys.readouterr()
    assert main([*words, "--output", "cut"]) == 2
    assert "cut holds a system already; go on with its training (--resume)" in capsys.readouterr().err
    assert main([*words, "--output", "cut", "--resume"]) == 0
    for role in SEQUENTIAL.roles:
        assert inner_link(tmp_path / "cut", role) == inner_link(tmp_path / "whole", role) != fresh


def test_inspect(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert main(["inspect", "system", "--question", "fox", "--rounds", "1", "--nearest", "2"]) == 0
    out = capsys.readouterr().out
    assert "stages: planner > critic > solver" in out
    assert "link planner->critic: 32 > 80 > 40" in out
    assert out.count("nearest") == 4
    assert main(["inspect", "system", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"stages", "agents", "links"}


def test_stages_on_the_command_line():
    assert read_pattern("a,b>c", "mean", "all").stages == (("a", "b"), ("c",))
    assert read_pattern("sequential", "slots", "stage") == SEQUENTIAL
    with pytest.raises(ValueError, match="combine: 'best'"):
        read_pattern("a>b", "best", "stage")


def test_init_writes_what_was_asked_for(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = str(made / "system" / "agents" / "solver")
    arguments = ["--pattern", "a,b>c", "--combine", "weighted", "--models", f"a={one},b={one},c={one}", "--rounds", "1"]
    assert main(["init", "new", *arguments]) == 0
    spec = read_spec("new")
    assert spec.pattern.combine == "weighted"
    assert set(spec.outer_links) == {("a", "c"), ("b", "c")}
    assert spec.defaults.rounds == 1


@pytest.mark.parametrize(
    "command", ["init", "run", "eval", "train inner", "train outer", "lab eval", "inspect", "check", "info"]
)
def test_help_names_a_default_once_and_none_where_there_is_none(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    options = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    assert len(options) > 3
    for option in options:
        assert option.count("(default: ") + option.count(", default: ") <= 1, option
        assert "default: null" not in option
        assert "default: False" not in option


def test_every_answer_option_is_an_option_of_run(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    page = capsys.readouterr().out
    for field in fields(AnswerOptions):
        if field.name != "trace":  # recmas inspect traces
            assert re.search(rf"--(no-)?{field.name.replace('_', '-')}\b", page), field.name
