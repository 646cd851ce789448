"""Tiny configurations of any model type, made by a table of field names instead of a list of types."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, HIDDEN, HEADS, HEAD, LAYERS = 320, 32, 4, 8, 4
_SIZES: dict[str, Any] = {
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size": VOCABULARY,
    "hidden_size d_model n_embd emb_dim backbone_hidden_size hidden_size_global": HIDDEN,
    "embedding_size input_embedding_size output_embedding_size": HIDDEN,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks": LAYERS,
    "encoder_layers num_encoder_layers depth num_global_layers": 1,
    "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads": HEADS,
    "decoder_attention_heads encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads": HEADS,
    "num_key_value_heads swa_num_key_value_heads": 2,
    "head_dim swa_head_dim global_head_dim kv_channels dim_head attention_head_size v_head_dim": HEAD,
    "qk_nope_head_dim qk_rope_head_dim d_rel rotary_dim index_head_dim linear_head_dim": HEAD,
    "linear_key_head_dim linear_value_head_dim query_pre_attn_scalar": HEAD,
    "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff": 48,
    "ffn_hidden_size feed_forward_size d_inner n_inner mlp_dim intermediate_size_mlp dense_intermediate_size": 48,
    "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size": 48,
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size": 48,
    "kv_lora_rank q_lora_rank o_lora_rank laurel_rank adapter_rank hc_lowrank": 16,
    "gated_norm_rank hidden_size_per_layer_input router_hidden_size": 8,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_topk moe_top_k moe_k": 2,
    "n_group topk_group zero_expert_num n_groups mamba_n_groups o_groups": 1,
    "sliding_window attention_chunk_size sliding_window_size window_size attention_window_size": 6,
    "local_attention keep_window_size rel_extent": 6,
    "max_position_embeddings n_positions max_seq_len n_ctx context_length": 256,
    "max_target_positions max_source_positions": 256,
    "index_n_heads num_kv_shared_layers linear_num_key_heads linear_num_heads": 2,
    "index_topk index_topk_blocks mamba_d_ssm": 64,
    "index_block_size linear_num_value_heads": 4,
    "mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads n_mamba_heads": 8,
    "mamba_d_head mamba_head_dim mamba_chunk_size chunk_size block_size": 8,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {name: value for names, value in _SIZES.items() for name in names.split()}
"""Values by the names that configurations use for them."""

_HYBRID = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD}
_SPECIAL: dict[str, dict[str, Any]] = {
    # latent attention has as many key heads as query heads
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear": {
        "num_key_value_heads": HEADS
    },
    "longcat_flash minicpm3 youtu dots3_note_text mistral4 mistral_large4_text": {"num_key_value_heads": HEADS},
    # positions in three dimensions
    "glm4v_text glm_ocr_text paddleocr_vl_text qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text hunyuan_vl_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}
    },
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [0, 1, 1]}},
    # layers of every kind among the first four
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "gemma4_text gemma4_unified_text": {"layer_types": _SLIDING, "global_head_dim": HEAD},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid kimi_linear": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "num_hidden_layers": 6, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    # a decoder as deep as its encoder
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart": {"encoder_layers": LAYERS},
    "prophetnet": {"num_encoder_layers": LAYERS},
    # fields of one type alone
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "layer_types": _SLIDING,
        "use_dsa": False,
        **{f"swa_{name}": value for name, value in _LATENT.items()},
        **{"swa_v_head_dim": HEAD, "swa_head_dim": 2 * HEAD},
        **{"swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS},
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"] * LAYERS,
        "adapter_in_dim": HIDDEN,
        "adapter_out_dim": HIDDEN,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 16},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": LAYERS,
        }
    },
    "gemma4_unified_vision": {"mm_embed_dim": HIDDEN, "mm_posemb_size": 8, "output_proj_dims": HIDDEN},
    "gemma4_unified_audio": {"audio_embed_dim": HIDDEN},
    "mamba2": {"num_heads": 8},
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
    "xlstm": {"hidden_size": 64, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
SPECIAL: dict[str, dict[str, Any]] = {}
"""By model type, fields that no common name decides."""
for _types, _fields in _SPECIAL.items():
    for _type in _types.split():
        SPECIAL[_type] = SPECIAL.get(_type, {}) | _fields


VARIANTS: dict[str, dict[str, Any]] = {
    "bert as a decoder": {"is_decoder": True},
    "falcon with ALiBi": {"alibi": True},
    "falcon_h1 with multipliers": {
        "lm_head_multiplier": 3.0,
        "embedding_multiplier": 2.0,
        "key_multiplier": 0.5,
        "attention_out_multiplier": 1.5,
        "ssm_in_multiplier": 1.5,
        "ssm_out_multiplier": 0.5,
    },
    "gpt_bigcode with keys for every head": {"multi_query": False},
    "gpt_neox in sequence": {"use_parallel_residual": False},
    "granite with multipliers": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "llama with YaRN": {
        "rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    },
    "llama with Llama 3's frequencies": {
        "rope_parameters": {
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
    "marian with scaled embeddings": {"scale_embedding": True},
    "opt with narrow embeddings": {"word_embed_proj_dim": 16},
    "phi3 with LongRoPE": {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0] * (HEAD // 2),
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 12,
        },
    },
    "qwen2 with sliding windows": {"use_sliding_window": True, "max_window_layers": 2},
    "roberta as a decoder": {"is_decoder": True},
}
"""Settings of a type that make another computation of it."""


def tiny_config(name: str) -> PreTrainedConfig:
    """A small configuration of a model type, or of one of `VARIANTS`, and of all its parts."""
    kind = CONFIG_MAPPING[name.partition(" ")[0]]
    return kind(**copy.deepcopy({**small(kind), **VARIANTS.get(name, {})}))  # they write into what they are given


def small(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Arguments that make a configuration of this class small."""
    chosen = {field.name: SIZES[field.name] for field in dataclasses.fields(kind) if field.name in SIZES}
    for name, part in (kind.sub_configs_defaults or {}).items():
        named = getattr(part, "model_type", None)
        inner = CONFIG_MAPPING[named] if named in CONFIG_MAPPING else getattr(part, "config_class", part)
        if dataclasses.is_dataclass(inner):
            chosen[name] = {"model_type": inner.model_type, **small(inner)}
    for name, value in SPECIAL.get(kind.model_type, {}).items():
        chosen[name] = {**chosen[name], **value} if name in (kind.sub_configs_defaults or {}) else value
    return chosen
