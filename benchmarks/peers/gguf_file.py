"""A transformers model as a GGUF file, for llama.cpp: the same weights in the same dtype, no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
DTYPES = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
HEADLESS = 32  # rows of the token table, and so of the tied head, where the body alone is wanted


def write_gguf(model: Any, path: Path, dtype: torch.dtype, *, head: bool = True) -> None:
    """Write ``model`` to ``path``.

    Args:
        model: a causal model of one of `ARCHITECTURES`, with its plain weights.
        path: of the file; replaced.
        dtype: of the matrices, one of `DTYPES`; vectors are float32, as llama.cpp wants them.
        head: False cuts the token table to `HEADLESS` rows and leaves the head out. llama.cpp computes logits for
            every hidden state that it returns, so this is how it can think in latents without a vocabulary.

    Raises:
        ValueError: another kind of model, of dtype, of rotation or of scores.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(f"model is of type {config.model_type!r}, expected one of {', '.join(ARCHITECTURES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, config, config.vocab_size if head else HEADLESS)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and (config.tie_word_embeddings or not head):
            continue
        if name == "model.embed_tokens.weight" and not head:
            weight = weight[:HEADLESS]
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ValueError(f"{name} has no place in a GGUF file of a {config.model_type} model")
        weight = _as_stored(architecture, name, weight.detach(), config)
        held = (weight.float() if weight.ndim == 1 else weight.to(dtype)).contiguous()
        writer.add_tensor(written, held.view(torch.uint8).numpy(), raw_dtype=DTYPES[held.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, config: Any, vocabulary: int) -> None:
    heads = config.num_attention_heads
    head_features = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_features)
    writer.add_value_length(head_features)
    writer.add_rope_dimension_count(head_features)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rotations = config.rope_parameters
    if "full_attention" in rotations:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(rotations["sliding_attention"]["rope_theta"])
        rotations = rotations["full_attention"]
    if rotations["rope_type"] != "default":
        raise ValueError(f"heads are turned by the rule {rotations['rope_type']!r}, expected 'default'")
    writer.add_rope_freq_base(rotations["rope_theta"])
    # A GGUF file has no place for these.
    if (scale := getattr(config, "query_pre_attn_scalar", head_features)) != head_features:
        raise ValueError(f"scores are scaled for {scale} features, expected those of a head, {head_features}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError("scores are capped, expected plain ones")
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)


def _as_stored(architecture: gguf.MODEL_ARCH, name: str, weight: Tensor, config: Any) -> Tensor:
    """``weight`` as the architecture stores it: Llama's rotary pairs side by side, Gemma's gains with their one."""
    if architecture is gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    if architecture is gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
        return weight.float() + 1
    return weight
