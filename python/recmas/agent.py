"""One frozen language model: reads a prompt, thinks in latents, or writes text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recmas.cache import Reader, positions_of, read
from recmas.decoding import Reply, write
from recmas.rollout import Rollouts
from recmas.spec import DTYPES
from recmas.splice import Latents, Prompt


class PromptTooLongError(ValueError):
    """A prompt does not fit into the model's context; `row` is its place in the batch."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class Agent:
    """A frozen transformers causal language model with its tokenizer.

    Args:
        model: a transformers model with an LM head; it is frozen and put into eval mode.
        tokenizer: its tokenizer.
        name: begins error messages (the role).
        source: hub id or folder the model came from; None if it was built in memory.
        compile: run the latent rollout's step through `torch.compile`, where the model can run at fixed shapes.

    Attributes:
        rollouts: how rollouts are run, and why the latest was not captured (`recmas.rollout`).

    Raises:
        ValueError: a model whose logits this class cannot compute from hidden states.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, source: str | None = None, compile: bool = False
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.name, self.source = tokenizer, name, source
        self.decoder: PreTrainedModel = model.get_decoder()
        self.rollouts = Rollouts(compiled=compile)
        self._config = model.config.get_text_config(decoder=True)
        self._logits_factor = _logits_factor(self._config, name)
        self._softcap: float | None = getattr(self._config, "final_logit_softcapping", None)
        if model.get_output_embeddings() is None:
            raise ValueError(f"agent {name!r}: {type(model).__name__} has no LM head")

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        *,
        name: str | None = None,
    ) -> Agent:
        """Load a model and its tokenizer from a folder, or from the hub where no such folder exists.

        A RecursiveLink may stand beside the model, as in the reference implementation's releases: it is left alone.

        Raises:
            ValueError: an unknown dtype, a folder that is a PEFT adapter or cannot be loaded, or an unknown hub id;
                one line.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = os.fspath(path_or_id)
        name = name or Path(source).name
        if isinstance(dtype, str) and dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        folder = Path(source)
        if folder.is_dir():
            if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
                raise ValueError(f"agent {name!r}: {source} is a PEFT adapter; merge it into its base model first")
        elif folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise ValueError(f"agent {name!r}: no such folder: {source}")
        wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=wanted, trust_remote_code=trust_remote_code, **_past_links(source)
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers, safetensors, tokenizers and the hub each raise their own
            if not trust_remote_code and "trust_remote_code" in str(error):
                raise ValueError(
                    f"agent {name!r}: {source} needs code of its own to be run; if you trust it, allow that with "
                    "--trust-remote-code (trust_remote_code=True)"
                ) from error
            where = source if folder.is_dir() else f"{source} (no such folder, so a model on the hub)"
            raise ValueError(f"agent {name!r}: cannot load {where}: {_first_line(error)}") from error
        return cls(model.to(device), tokenizer, name=name, source=source)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model (safetensors) and tokenizer into `folder`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def to(self, *args: Any, **kwargs: Any) -> Agent:
        self.rollouts.forget()
        self.model.to(*args, **kwargs)
        return self

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
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(token for token in [*ids, self.tokenizer.eos_token_id] if token is not None)

    @property
    def pad_id(self) -> int:
        """Fills padding, which nothing ever attends to."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.eos_ids, default=0)

    @property
    def embed_scale(self) -> float:
        """Factor the input embedding module puts on its table's rows (Gemma: about sqrt(d)), as it rounds it."""
        module = self.model.get_input_embeddings()
        scale = getattr(module, "embed_scale", 1.0)
        return scale.to(module.weight.dtype).item() if isinstance(scale, Tensor) else float(scale)

    def embedding_rms(self) -> float:
        """Root mean square of an input embedding's entries, scale included."""
        weight = self.model.get_input_embeddings().weight
        norm = torch.linalg.vector_norm(weight, dtype=torch.float32).item()
        return norm / math.sqrt(weight.numel()) * self.embed_scale

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings ``[B, T, d]`` of token ids ``[B, T]``, through the model's own embedding module."""
        return self.model.get_input_embeddings()(ids)

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
        length = targets.shape[1]
        mask = torch.cat([prompt.mask, target_mask[:, : max(length - 1, 0)].to(prompt.mask.dtype)], dim=1)
        embeds = torch.cat([prompt.embeds, self.embed(targets[:, : max(length - 1, 0)]).to(prompt.embeds.dtype)], dim=1)
        self.check_context(mask.sum(dim=1).tolist())
        held = 0 if begun is None else begun.get_seq_length()
        output = self.decoder(
            inputs_embeds=embeds[:, held:],
            attention_mask=mask,
            position_ids=positions_of(mask)[:, held:],
            past_key_values=begun,
            use_cache=begun is not None,
        )
        first = prompt.mask.shape[1] - 1 - held
        return output.last_hidden_state[:, first : first + length]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., vocabulary]`` of final-norm hidden states ``[..., d]``, with the model's own scale and cap."""
        logits = self.model.get_output_embeddings()(hidden) * self._logits_factor
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def think(self, prompt: Prompt, steps: int, link: Callable[[Tensor], Tensor], *, reader: Reader = read) -> Latents:
        """The latent rollout: hidden states fed back through the inner link; no vocabulary, no sampling.

        h_1 is the hidden state of the last prompt position after the final norm, ``e_k = link(h_k)`` the next input;
        the last e is not fed back. Only the decoder body runs, on a cache.

        Args:
            prompt: the batch of prompts.
            steps: m >= 0; 0 gives empty latents.
            link: the agent's inner link, ``[B, d] -> [B, d]``.
            reader: reads the prompt (`recmas.prefix` reuses what earlier prompts left).

        Returns:
            e_1..e_m, ``[B, m, d]`` in the link's dtype.

        Raises:
            ValueError: a prompt that does not leave room for the steps in the model's context.
        """
        if steps == 0:
            return Latents(prompt.embeds.new_zeros(prompt.embeds.shape[0], 0, prompt.embeds.shape[2]))
        self.check_context(prompt.mask.sum(dim=1).tolist(), steps - 1)
        past, hidden = reader(self.decoder, prompt, steps - 1, None)
        return Latents(self.rollouts(past, hidden, steps, link))

    def write(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        *,
        rows: Sequence[int] | None = None,
        reply: Reply | None = None,
        reader: Reader = read,
    ) -> Iterator[dict[int, list[int]]]:
        """Write text step by step: after each, the token ids by which rows of the batch grew.

        A row stops at an end-of-text token, at `max_new_tokens` or at the end of the model's context. Its random stream
        depends on (seed, row number) alone, so its neighbours do not change it.

        Args:
            prompt: the batch of prompts.
            max_new_tokens: most tokens that a row writes.
            temperature: 0 is greedy.
            top_p: nucleus, in (0, 1].
            seed: one or more integers.
            rows: number of each row in the run; None counts from 0.
            reply: what a row reads after a token that it wrote (`recmas.decoding.Reply`); such ids are part of the
                row, and do not count as written.
            reader: as for `think`.

        Raises:
            ValueError: a prompt beyond the model's context, at once.
        """
        self.check_context(prompt.mask.sum(dim=1).tolist())
        seeds = [seed] if isinstance(seed, int) else seed
        numbers = range(prompt.embeds.shape[0]) if rows is None else rows
        return write(self, prompt, max_new_tokens, temperature, top_p, seeds, numbers, reply, reader)

    def decode(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        *,
        rows: Sequence[int] | None = None,
        reader: Reader = read,
    ) -> list[list[int]]:
        """`write` to its end: token ids per row, the end-of-text token included where one was written."""
        written: list[list[int]] = [[] for _ in range(prompt.embeds.shape[0])]
        for grown in self.write(prompt, max_new_tokens, temperature, top_p, seed, rows=rows, reader=reader):
            for row, tokens in grown.items():
                written[row] += tokens
        return written

    def text(self, tokens: Sequence[int]) -> str:
        """Decoded tokens without special ones, as written: no spaces are tidied away."""
        decoded = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)

    def literal(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a special token, whatever it spells."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def check_context(self, lengths: Sequence[int], room: int = 0) -> None:
        """Raise PromptTooLongError for the longest of prompts of so many positions if it does not fit.

        Args:
            lengths: of a batch.
            room: latent steps that are fed back after them.
        """
        longest = max(lengths, default=0)
        if self.context_length is not None and longest + room > self.context_length:
            used = f"{longest} positions" + (f" and {room} latent steps" if room else "")
            told = f"agent {self.name!r}: a prompt of {used} exceeds its context of {self.context_length}"
            raise PromptTooLongError(told, lengths.index(longest))


def _logits_factor(config: Any, name: str) -> float:
    """The factor between LM head and logits, for the families known to have one."""
    family = str(config.model_type)
    if (factor := getattr(config, "logit_scale", None)) is not None and family.startswith("cohere"):
        return float(factor)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        if not family.startswith("granite"):
            raise ValueError(f"agent {name!r}: how a {family} model scales its logits is not known here")
        return 1.0 / float(divisor)
    return 1.0


def _past_links(source: str) -> dict[str, Any]:
    """Options that keep transformers, where PEFT is installed, from taking a link beside a model for a PEFT adapter."""
    from transformers.utils import find_adapter_config_file

    path = find_adapter_config_file(source)
    if path is None:
        return {}
    described = json.loads(Path(path).read_text(encoding="utf-8"))
    if "adapter_type" not in described or "peft_type" in described:
        return {}
    return {"adapter_kwargs": {"subfolder": "no-peft-adapter"}}  # where it looks for one and finds none


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
