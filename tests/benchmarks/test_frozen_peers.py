"""What the peers of an agent's steps are given and compared with; neither compiled code nor llama.cpp runs here."""

from __future__ import annotations

import hashlib
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.harness import checkpoints, machine
from benchmarks.harness.models import cast
from benchmarks.harness.time_bound import TimeBound, Unmeasured
from benchmarks.peers import llama
from benchmarks.peers.llama import LlamaSequences, llama_python
from benchmarks.suites.cpu import frozen_steps, test_bench_frozen
from benchmarks.suites.cpu.frozen_cases import COLUMNS, PROMPT, TINY, Case
from benchmarks.suites.cpu.frozen_steps import Llama, Made, Steps
from recmas.engine.fixed_shapes import FixedShapeContinuation
from recmas_kernels.testing import relative_error
from tests.benchmarks.fake_clock import FakeClock

gguf = pytest.importorskip("gguf", reason="llama.cpp is given GGUF files, which the gguf package writes")
from benchmarks.peers.gguf_file import HEADLESS, write_gguf  # noqa: E402

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0,
}


def random_model(kind: str, **changes: Any) -> Any:
    """Every parameter random, gains and biases, too: a fresh model's ones and zeros hide what is forgotten."""
    config = CONFIG_MAPPING[kind](**{**SHAPE, **(GEMMA if kind == "gemma3_text" else {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2)
    return cast(cast(model, torch.bfloat16), torch.float32).requires_grad_(False)


def read_again(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen2", {}),
    ],
)
def test_a_gguf_file_holds_the_model(kind: str, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = random_model(kind, **changes), torch.arange(40)[None] % 90
    write_gguf(model, tmp_path / "model.gguf", dtype)
    again = read_again(tmp_path / "model.gguf")
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_a_gguf_file_holds_gemma(tmp_path: Path) -> None:
    """Weights as the other library reads them, which knows neither windows by layer nor their frequencies."""
    model, path = random_model("gemma3_text", final_logit_softcapping=30.0), tmp_path / "model.gguf"
    write_gguf(model, path, torch.float32)
    again = read_again(path).state_dict()
    for name, weight in model.state_dict().items():  # gains are stored plus one, which rounds
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-6)
    fields = gguf.GGUFReader(path).fields
    assert fields["gemma3.attention.sliding_window_pattern"].contents() == [True, False]
    assert fields["gemma3.attention.sliding_window"].contents() == 8
    assert fields["gemma3.rope.freq_base"].contents() == 1e6
    assert fields["gemma3.rope.freq_base_swa"].contents() == 1e4
    assert fields["gemma3.final_logit_softcapping"].contents() == 30.0


def test_a_gguf_file_holds_biases_and_the_width_of_heads(tmp_path: Path) -> None:
    """The other library reads neither of them back."""
    model, path = random_model("llama", mlp_bias=True, head_dim=6), tmp_path / "model.gguf"
    write_gguf(model, path, torch.float32)
    reader = gguf.GGUFReader(path)
    assert reader.fields["llama.attention.key_length"].contents() == 6
    assert reader.fields["llama.rope.dimension_count"].contents() == 6
    held = {tensor.name: tensor.data for tensor in reader.tensors}
    for index, layer in enumerate(model.model.layers):
        assert (held[f"blk.{index}.ffn_up.bias"] == layer.mlp.up_proj.bias.numpy()).all()


def test_a_gguf_file_without_a_head_holds_the_same_body(tmp_path: Path) -> None:
    model = random_model("llama")
    write_gguf(model, tmp_path / "whole.gguf", torch.bfloat16)
    write_gguf(model, tmp_path / "body.gguf", torch.bfloat16, head=False)
    whole, body = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("whole.gguf", "body.gguf")
    )
    assert whole.keys() - body.keys() == {"output.weight"}
    for name, tensor in body.items():
        rows = HEADLESS if name == "token_embd.weight" else len(tensor.data)
        assert len(tensor.data) == rows
        assert (tensor.data == whole[name].data[:rows]).all()


@pytest.mark.parametrize(
    ("kind", "changes", "dtype", "problem"),
    [
        ("gpt_neox", {}, torch.float32, "model is of type 'gpt_neox', expected one of llama, qwen2, gemma3_text"),
        ("llama", {}, torch.float16, r"dtype is torch.float16, expected one of torch.float32, torch.bfloat16"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            torch.float32,
            "heads are turned by the rule 'linear', expected 'default'",
        ),
        (
            "gemma3_text",
            {"query_pre_attn_scalar": 8},
            torch.float32,
            "scores are scaled for 8 features, expected those of a head, 16",
        ),
    ],
)
def test_models_that_a_gguf_file_cannot_hold(
    kind: str, changes: dict[str, Any], dtype: torch.dtype, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        write_gguf(random_model(kind, **changes), tmp_path / "model.gguf", dtype)


def test_checkpoints_come_from_a_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(checkpoints.SWITCH, raising=False)
    assert checkpoints.checkpoints() == []
    monkeypatch.setenv(checkpoints.SWITCH, str(tmp_path))
    with pytest.raises(ValueError, match=f"^RECMAS_BENCH_MODELS={tmp_path} holds none of qwen, smollm2, gemma with"):
        checkpoints.checkpoints()
    random_model("qwen2").bfloat16().save_pretrained(tmp_path / "qwen")
    (found,) = checkpoints.checkpoints()
    assert found.name == "qwen2-2x32-V96"
    assert found.model().dtype is torch.float32
    assert found.sha256 == hashlib.sha256((tmp_path / "qwen/model.safetensors").read_bytes()).hexdigest()


def test_llama_is_no_peer_unless_named_nor_where_a_processor_is_imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.Device, "imitated", None)
    monkeypatch.delenv(llama.SWITCH, raising=False)
    assert llama_python() is None
    monkeypatch.setenv(llama.SWITCH, "python")
    assert llama_python() == "python"
    monkeypatch.setattr(machine.Device, "imitated", "avx2")
    assert llama_python() is None


@pytest.mark.parametrize(
    ("python", "problem"),
    [("no-such-python", "does not run"), (sys.executable, "ended with exit code 1; see standard error$")],
)
def test_an_interpreter_without_llama_is_named(python: str, problem: str, tmp_path: Path) -> None:
    """The second one finds no model, if it has the binding."""
    with pytest.raises(RuntimeError, match=f"{python}.*{problem}"):
        LlamaSequences(python, tmp_path / "none.gguf", "think", 1, 64, torch.float32)


@pytest.fixture
def made() -> Any:
    found = Made().of(TINY)
    yield found
    found.close()


@pytest.mark.skipif(llama_python() is None, reason="RECMAS_BENCH_LLAMA names no interpreter with llama-cpp-python")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("op", ["think", "write"])
@torch.no_grad()
def test_llama_computes_what_the_model_computes(op: str, kind: str, tmp_path: Path) -> None:
    random_model(kind).bfloat16().save_pretrained(tmp_path)
    case, python = Case(checkpoints.Checkpoint(tmp_path), torch.float32, op, 2), llama_python()
    made = Made().of(case.shape)
    agent, tokens = made.agent(torch.float32, False), torch.tensor([1, 2])
    allowed = test_bench_frozen.GELU_TABLE if kind == "gemma3_text" else test_bench_frozen.EQUAL
    assert python is not None
    with closing(LlamaSequences(python, made.file(case), op, 2, COLUMNS, torch.float32)) as sequences:
        steps = Llama(sequences, agent, case)
        assert relative_error(steps.after(tokens), Steps(agent, case).after(tokens).double()) < allowed
        for _ in range((COLUMNS - PROMPT - 1) // frozen_steps.STEPS):
            steps()
        with pytest.raises(RuntimeError, match="ended with exit code 1"):
            steps()
    made.close()


@torch.no_grad()
def test_a_compiled_step_takes_over_a_batch_and_ends_with_its_columns(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for op in ("think", "write"):  # the second takes over what was compiled for the first
        case, tokens = Case(TINY, torch.float32, op, 2), torch.tensor([1, 2])
        plain, compiled = Steps(made.agent(torch.float32, False), case), made.compiled(case)
        assert isinstance(compiled, Steps)
        assert isinstance(compiled.feed.__self__._fixed, FixedShapeContinuation)
        for _ in range(3):
            assert relative_error(compiled.after(tokens), plain.after(tokens).double()) < 1e-6
    for _ in range(COLUMNS - PROMPT - 3):
        compiled.after(tokens)
    with pytest.raises(ValueError, match=f"^all {COLUMNS} columns are in use$"):
        compiled.after(tokens)


@torch.no_grad()
def test_what_compiles_too_long_is_not_compiled_for_other_rows(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rows = FakeClock(), []

    class SlowToCompile:
        def __init__(self, agent: Any, past: Any, columns: int) -> None:
            rows.append(len(past.mask))
            clock.takes(200.0)

    monkeypatch.setattr(frozen_steps, "CompiledSteps", SlowToCompile)
    monkeypatch.setattr(frozen_steps, "COMPILE_BOUND", TimeBound(call_seconds=180, now=clock))
    found = [made.compiled(Case(TINY, torch.float32, "think", batch)) for batch in (1, 4)]
    late = Unmeasured("over its bound of 180 s, compiling for 1 rows: it took 200 s")
    assert found == [late, late]
    assert rows == [1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("op", ["think", "write"])
def test_the_work_of_a_step_is_each_weight_once(op: str, tied: bool, tmp_path: Path) -> None:
    random_model("llama", tie_word_embeddings=tied).bfloat16().save_pretrained(tmp_path)
    case = Case(checkpoints.Checkpoint(tmp_path), torch.bfloat16, op, 3)
    work = test_bench_frozen._work(Made().of(case.shape).agent(torch.bfloat16, True), case)
    elements = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + (96 * 32 if op == "write" else 0)
    assert work.flops == 2 * 3 * elements * frozen_steps.STEPS
    # Panels are as wide as vectors.
    assert 2 * elements * frozen_steps.STEPS <= work.bytes_min < 4 * elements * frozen_steps.STEPS


def test_a_cast_leaves_the_frequencies_of_the_heads_alone() -> None:
    model = random_model("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    assert cast(model, torch.bfloat16).lm_head.weight.dtype is torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
