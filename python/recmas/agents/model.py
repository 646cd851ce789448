"""One frozen language model with its tokenizer: what it is, and its forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recmas.agents.body import OwnLogits, body_of
from recmas.agents.required import required
from recmas.engine.continuation import positions_of
from recmas.engine.decoder_call import DecoderCall
from recmas.engine.messages import Prompt
from recmas.engine.prefill import forward_groups


class PromptTooLongError(ValueError):
    """Prompts of a batch do not fit into the model's context; the message is about the longest.

    Attributes:
        row: the longest one's place in the batch.
        problems: what is to be said of each that does not fit, by place.
    """

    def __init__(self, problems: Mapping[int, str], row: int) -> None:
        super().__init__(problems[row])
        self.row, self.problems = row, dict(problems)


class FrozenModel:
    """A frozen transformers causal language model with its tokenizer.

    Args:
        model: a transformers model with an LM head; it is frozen and put into eval mode.
        tokenizer: its tokenizer.
        name: begins error messages (the role).

    Attributes:
        decoder: the body that turns input embeddings into final-norm hidden states.

    Raises:
        ValueError: a model that does not prove what every agent needs (`recmas.agents.required`); one line that says
            which proof failed. Weights on the meta device prove nothing; the first forward does then.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.name = tokenizer, name
        try:
            self.decoder: PreTrainedModel = body_of(model)
        except ValueError as error:
            raise ValueError(f"agent {name!r}: a {model.config.model_type} model is refused: {error}") from None
        self._config = model.config.get_text_config(decoder=True)
        self._scale = 1.0  # that the body, not its embedding module, puts on embeddings
        self._own_logits: OwnLogits | None = None
        if self.device.type != "meta":
            self._own_logits = self._proved()

    @property
    def hidden_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def context_length(self) -> int | None:
        """Positions the model was made for; None where its configuration does not say."""
        return getattr(self._config, "max_position_embeddings", None)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text: of the generation configuration and of the tokenizer."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured.reshape(-1).tolist() if isinstance(configured, Tensor) else configured
        ids = list(ids) if isinstance(ids, Iterable) else [ids]
        return frozenset(int(token) for token in [*ids, self.tokenizer.eos_token_id] if token is not None)

    @property
    def pad_id(self) -> int:
        """Fills padding, which nothing ever attends to: any token that the model knows does."""
        wanted = (self.tokenizer.pad_token_id, min(self.eos_ids, default=None), 0)
        return next(token for token in wanted if token is not None and token < self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """Embeddings of the input table."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def embed_scale(self) -> float:
        """Factor that the model puts on its table's rows (Gemma: about sqrt(d)), as it rounds it."""
        module = self.model.get_input_embeddings()
        scale = getattr(module, "embed_scale", 1.0)
        own = scale.to(module.weight.dtype).item() if isinstance(scale, Tensor) else float(scale)
        return own * self._scale

    def embedding_rms(self) -> float:
        """Root mean square of an input embedding's entries, scale included."""
        weight = self.model.get_input_embeddings().weight
        norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)).item()
        return norm / math.sqrt(weight.numel()) * self.embed_scale

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings ``[B, T, d]`` of token ids ``[B, T]``, through the model's own embedding module, scaled."""
        embeds: Tensor = self.model.get_input_embeddings()(ids)
        return embeds if self._scale == 1.0 else self._scale * embeds

    def hidden(self, prompt: Prompt, targets: Tensor, target_mask: Tensor, begun: DynamicCache | None = None) -> Tensor:
        """Hidden states at the positions that PREDICT each target token: one teacher-forced forward.

        Args:
            prompt: the batch of prompts.
            targets: int64 ``[B, L]``, right padded.
            target_mask: int64 ``[B, L]``.
            begun: holds the prompt's first columns, but not its last, already, and is appended to; None reads it all.

        Returns:
            ``[B, L, d]`` after the final norm; the first is that of the last prompt position. Keeps gradients.
        """
        if begun is None and (groups := forward_groups(self.decoder, prompt.mask, target_mask)):
            parts = [self.hidden(prompt.select(rows.tolist()), targets[rows], target_mask[rows]) for rows in groups]
            order = torch.cat(groups).argsort()
            return torch.cat(parts)[order]
        length = targets.shape[1]
        mask = torch.cat([prompt.mask, target_mask[:, : max(length - 1, 0)].to(prompt.mask.dtype)], dim=1)
        held = 0 if begun is None else begun.get_seq_length()
        said = self.embed(targets[:, : max(length - 1, 0)]).to(prompt.embeds.dtype)
        embeds = torch.cat([prompt.embeds[:, held:], said], dim=1)
        self.check_context(mask.sum(dim=1).tolist())
        states = DecoderCall(self.decoder)(embeds, mask, positions_of(mask)[:, held:], begun)
        first = prompt.mask.shape[1] - 1 - held
        return states[:, first : first + length]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of final-norm hidden states ``[..., d]``, by the model's own forward."""
        if self._own_logits is None:
            self._own_logits = self._proved()
        return self._own_logits(hidden)

    def check_context(self, lengths: Sequence[int], room: int = 0) -> None:
        """Raise PromptTooLongError if not all prompts of so many positions fit.

        Args:
            lengths: of a batch.
            room: latent steps that are fed back after them.
        """
        context, longest = self.context_length, max(lengths, default=0)
        if context is not None and longest + room > context:
            added = f" and {room} latent steps" if room else ""
            problems = {
                row: f"agent {self.name!r}: a prompt of {length} positions{added} exceeds its context of {context}"
                for row, length in enumerate(lengths)
                if length + room > context
            }
            raise PromptTooLongError(problems, lengths.index(longest))

    def _proved(self) -> OwnLogits:
        found = required(self.model, self.decoder)
        if found.refusal:
            kind = self.decoder.config.model_type
            raise ValueError(f"agent {self.name!r}: a {kind} model is refused: {found.refusal}")
        self._scale = found.embed_scale
        return OwnLogits(self.model, found.path, found.kind)
