"""Tiny configurations of any model type, made by one table of field names instead of a list of types."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 320
HIDDEN, HEADS, HEAD = 32, 4, 8
LAYERS = 4

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "backbone_hidden_size"), HIDDEN),
    **dict.fromkeys(("hidden_size_global", "embedding_size", "input_embedding_size", "output_embedding_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "depth", "num_global_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "kv_channels", "dim_head"), HEAD),
    **dict.fromkeys(("attention_head_size", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "d_rel"), HEAD),
    **dict.fromkeys(("rotary_dim", "index_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim", "decoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "dim_ff", "ffn_hidden_size", "feed_forward_size", "d_inner", "n_inner"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "mlp_dim"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("gated_norm_rank",), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "router_hidden_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "zero_expert_num", "n_groups", "mamba_n_groups", "o_groups"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "sliding_window_size", "window_size"), 6),
    **dict.fromkeys(("attention_window_size", "local_attention", "keep_window_size", "rel_extent"), 6),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 256),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 256),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("index_topk", "index_topk_blocks"), 64),
    "index_block_size": 4,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 8),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HEAD),
    "num_kv_shared_layers": 2,
    "query_pre_attn_scalar": HEAD,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Values by the names that configurations use for them."""

MLA = {"num_key_value_heads": HEADS}
TWO = {"num_hidden_layers": 2}
SWA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": HEAD,
    "v_head_dim": HEAD,
    "head_dim": 2 * HEAD,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"), MLA),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu"), MLA),
    **dict.fromkeys(("dots3_note_text",), MLA),
    "bailing_hybrid": {**MLA, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    **{key: {"attn_layer_period": 2, "attn_layer_offset": 1} for key in ("jamba", "zamba")},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kimi_linear": {**MLA, "layer_types": ["linear_attention", "full_attention"] * 2},
    **{
        key: {"encoder_layers": LAYERS}
        for key in (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
        )
    },
    "prophetnet": {"num_encoder_layers": LAYERS},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            key: {"rope_type": "default", "rope_theta": 10000.0} for key in ("sliding_attention", "full_attention")
        },
    },
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {**MLA, "layer_types": ["sliding_attention", "full_attention"] * 2, "use_dsa": False}
    | {f"swa_{name}": value for name, value in SWA.items()},
    "dots3_note_vision": {"mlp_layer_types": ["dense"] * LAYERS, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_audio": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 16},
    **{
        key: {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": HEAD}
        for key in ("gemma4_text", "gemma4_unified_text")
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "gemma4_unified_vision": {"mm_embed_dim": HIDDEN, "mm_posemb_size": 8, "output_proj_dims": HIDDEN},
    "gemma4_unified_audio": {"audio_embed_dim": HIDDEN},
    "moshi": {"audio_vocab_size": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 1,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (16, 16),
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 64},
    "xlstm": {"hidden_size": 64, "num_heads": 4, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "num_hidden_layers": 6, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""By model type, fields that no common name decides."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small configuration of a model type; every kind of layer that its default has is kept."""
    return CONFIG_MAPPING[model_type](**small(CONFIG_MAPPING[model_type]))


def small(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments that make a configuration of this class small."""
    chosen = {field.name: SIZES[field.name] for field in dataclasses.fields(kind) if field.name in SIZES}
    for name, part in (kind.sub_configs_defaults or {}).items():
        named = getattr(part, "model_type", None)
        inner = CONFIG_MAPPING[named] if named in CONFIG_MAPPING else getattr(part, "config_class", part)
        if dataclasses.is_dataclass(inner):
            chosen[name] = {"model_type": inner.model_type, **small(inner)}
    return chosen | SPECIAL.get(kind.model_type, {})
