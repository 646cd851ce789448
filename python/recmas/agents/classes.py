"""Which class of transformers a configuration's model is: a causal one, or one whose text part may be causal."""

from __future__ import annotations

from typing import Any

import transformers


def class_of(config: Any) -> Any:
    """What `from_pretrained` and `from_config` are called on, for a configuration of a checkpoint.

    Raises:
        ValueError: no class is known; or an encoder and a decoder, which answer nothing without each other.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} models are an encoder and a decoder; an agent is a decoder alone")
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    for name in config.architectures or ():  # a text part that was saved by itself has no entry of its own
        kind = getattr(transformers, name, None)
        if kind is not None and kind.config_class is type(config) and hasattr(kind, "generate"):
            return kind
    raise ValueError(f"transformers knows no causal language model of type {config.model_type}")


def described(config: Any) -> Any:
    """The model that a configuration describes, as random as its class makes it; the default device decides where."""
    kind = class_of(config)
    return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
