"""Which part of a causal language model is its decoder body, and the model's own way from there to logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recmas.engine.decoder_call import accepted


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part that turns input embeddings into final-norm hidden states: a text decoder without a head.

    Raises:
        ValueError: no part of the model takes input embeddings.
    """
    for part in _parts(model):
        if part is not model and isinstance(part, PreTrainedModel) and "inputs_embeds" in accepted(type(part).forward):
            deeper = _headless(part)
            if deeper is not None and _has_embeddings(deeper) and _has_embeddings(model):
                return deeper
    raise ValueError(f"no part of {type(model).__name__} turns input embeddings into hidden states")


def _parts(model: PreTrainedModel) -> Iterator[nn.Module]:
    yield model.get_decoder()
    yield model.base_model
    yield from model.modules()


def _has_embeddings(part: PreTrainedModel) -> bool:
    try:
        return part.get_input_embeddings() is not None
    except NotImplementedError:
        return False


def _headless(part: PreTrainedModel) -> PreTrainedModel | None:
    """`part`, or what is inside it where it has a head of its own."""
    if not hasattr(part, "lm_head"):
        return part
    inner: Any = part.get_decoder()
    return inner if inner is not part and isinstance(inner, PreTrainedModel) else None


class OwnLogits:
    """A model's own forward from its body's hidden states on: factors, caps and transforms included, none guessed.

    Every call runs on a copy of the model's outermost modules as they are then, all others shared, in which the body,
    or a part around it, hands on what it is given.

    Args:
        model: a causal language model.
        path: names of the modules from the model to the part that is replaced.
        kind: what that part returns.
    """

    def __init__(self, model: PreTrainedModel, path: str, kind: type) -> None:
        self._model, self._path, self._kind = model, path.split("."), kind

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of final-norm hidden states ``[..., d]``."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        head = _replaced(self._model, self._path, self._kind)
        forward = type(head).forward  # a forward patched onto the model is bound to the model, body and all
        logits: Tensor = forward(head, inputs_embeds=flat, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


class _HandsOn(nn.Module):
    """Stands where a part was; what else the model asks of it, multipliers or a tied table, is the part's own."""

    def __init__(self, part: nn.Module, kind: type) -> None:
        super().__init__()
        self._part, self._kind = (part,), kind  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        if name in ("_part", "_kind") or name in self.__dict__:
            return super().__getattr__(name)
        return getattr(self._part[0], name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return self._kind(last_hidden_state=inputs_embeds)


def _replaced(module: nn.Module, path: list[str], kind: type) -> nn.Module:
    made: nn.Module = object.__new__(type(module))  # copy.copy takes ten times as long
    name, *rest = path
    part = getattr(module, name)
    parts = {**module._modules, name: _replaced(part, rest, kind) if rest else _HandsOn(part, kind)}
    made.__dict__.update({**module.__dict__, "_modules": parts})
    return made


class Recorded:
    """One forward of a model over token ids, and what the parts around its body returned.

    Args:
        model: a causal language model.
        body: its body.
        ids: int64 ``[B, T]``.

    Attributes:
        states: final-norm hidden states ``[B, T, d]`` of the body.
        logits: the model's own.
        outputs: by path, the outermost first: what the parts returned that hand on the body's states.
    """

    def __init__(self, model: PreTrainedModel, body: PreTrainedModel, ids: Tensor) -> None:
        paths = {part: path for path, part in model.named_modules()}
        around = [part for part in model.modules() if part is not model and _holds(part, body)]
        seen: dict[nn.Module, Any] = {}
        hooks = [part.register_forward_hook(lambda part, _, output: seen.update({part: output})) for part in around]
        try:
            with torch.no_grad():
                self.logits: Tensor = model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        if body not in seen:
            raise ValueError(f"its forward does not run {type(body).__name__}")
        self.states: Tensor = seen[body].last_hidden_state
        self.outputs = {
            paths[part]: seen[part]
            for part in around
            if torch.is_tensor(states := getattr(seen.get(part), "last_hidden_state", None)) and states is self.states
        }


def _holds(part: nn.Module, body: nn.Module) -> bool:
    return any(inner is body for inner in part.modules())
