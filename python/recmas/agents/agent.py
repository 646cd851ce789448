"""`Agent`: a frozen language model that reads a prompt and thinks in latents, or writes text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import recmas_kernels
from recmas.agents.decoding import Reply, write
from recmas.agents.loading import load_model
from recmas.agents.model import FrozenModel
from recmas.agents.sampling import RowName
from recmas.engine.latent_rollout import rollout
from recmas.engine.messages import Latents, Prompt
from recmas.engine.prefill import Prefill, prefill_all
from recmas.engine.stepper import Stepper
from recmas.prompts.vocabulary import check_ids
from recmas_kernels import packed


class Agent(FrozenModel):
    """A `FrozenModel` at work: latent rollouts and decoding.

    Args:
        model: a transformers model with an LM head; it is frozen and put into eval mode.
        tokenizer: its tokenizer.
        name: begins error messages (the role).
        source: hub id or folder the model came from; None if it was built in memory.
        compile: run the decoder's step through `torch.compile`, latents and tokens alike, where the model can run at
            fixed shapes.
        accelerate: on the CPU, run the model's frozen linear layers from packed weights (`recmas_kernels.accelerate`);
            the model is changed in place.

    Attributes:
        accelerated: which layers are packed, and why others are not; None if nothing was asked for, or not on the CPU.
        stepper: how single positions are run, and why the latest were not captured (`recmas.engine.stepper`).

    Raises:
        ValueError: a model whose logits this class cannot compute from hidden states.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        source: str | None = None,
        compile: bool = False,
        accelerate: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, name=name)
        # Absolute, so that it means the same folder elsewhere, too, and never a model of that name on the hub.
        self.source = os.path.abspath(source) if source is not None and Path(source).is_dir() else source
        packs = accelerate and self.device.type == "cpu"
        self.accelerated = recmas_kernels.accelerate(self.model) if packs else None
        self.stepper = Stepper(compiled=compile)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        *,
        name: str | None = None,
        compile: bool = False,
        accelerate: bool = True,
        root: Path | None = None,
        offline: bool = False,
    ) -> Agent:
        """Load a model and its tokenizer from a folder, or from the hub where no such folder exists.

        ``FILE.gguf``, and ``FOLDER-OR-ID:FILE.gguf``, are read through transformers, which makes plain weights of it.
        Of a model of text and images, the text part is the agent. A RecursiveLink may stand beside the model, as in the
        reference implementation's releases: it is left alone.

        Args:
            path_or_id: folder or hub id.
            dtype: "auto" is the checkpoint's.
            device: where the model is to be.
            trust_remote_code: for transformers.
            name: begins error messages.
            compile: as for `Agent`.
            accelerate: as for `Agent`.
            root: a folder that holds the model's and that nobody vouches for: nothing outside of it is read, and
                nothing is allocated that its files do not hold (`recmas.agents.model_folder`).
            offline: never ask the hub.

        Raises:
            ValueError: an unknown dtype, a folder that is a PEFT adapter or cannot be loaded, an unknown hub id, an
                encoder with a decoder, or a model that does not prove what an agent needs; one line.
        """
        source = os.fspath(path_or_id)
        name = name or Path(source).name
        model, tokenizer = load_model(source, dtype, device, trust_remote_code, name, root, offline)
        return cls(model, tokenizer, name=name, source=source, compile=compile, accelerate=accelerate)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model (safetensors) and tokenizer into `folder`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def to(self, *args: Any, **kwargs: Any) -> Agent:
        self.stepper.forget()
        self.model.to(*args, **kwargs)
        return self

    def unpack(self) -> None:
        """Give the model its plain linear layers back, if they are packed."""
        if self.accelerated is not None:
            self.accelerated.close()
            self.accelerated = None

    def think(
        self,
        prompt: Prompt,
        steps: int,
        link: Callable[[Tensor], Tensor],
        *,
        prefill: Prefill = prefill_all,
        weights_stay: bool = True,
    ) -> Latents:
        """The latent rollout: hidden states fed back through the inner link; no vocabulary, no sampling.

        h_1 is the hidden state of the last prompt position after the final norm, ``e_k = link(h_k)`` the next input;
        the last e is not fed back. Only the decoder body runs, on a cache.

        Args:
            prompt: the batch of prompts.
            steps: m >= 0; 0 gives empty latents.
            link: the agent's inner link, ``[B, d] -> [B, d]``.
            prefill: reads the prompt (`recmas.engine.prefix_reuse` resumes from a cached prefix).
            weights_stay: False where model and link are on this device for this call only (offload): no CUDA graph is
                captured then.

        Returns:
            e_1..e_m, ``[B, m, d]`` in the link's dtype.

        Raises:
            ValueError: a prompt that does not leave room for the steps in the model's context.
        """
        if steps == 0:
            return Latents(prompt.embeds.new_zeros(prompt.embeds.shape[0], 0, prompt.embeds.shape[2]))
        self.check_context(prompt.mask.sum(dim=1).tolist(), steps - 1)
        past, hidden = prefill(self.decoder, prompt, steps - 1, None)
        with packed(link) if weights_stay and isinstance(link, torch.nn.Module) else nullcontext():
            return Latents(rollout(past, hidden, steps, link, self.stepper, weights_stay=weights_stay))

    def write(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        *,
        rows: Sequence[RowName] | None = None,
        reply: Reply | None = None,
        prefill: Prefill = prefill_all,
        weights_stay: bool = True,
    ) -> Iterator[dict[int, list[int]]]:
        """Write text step by step: after each, the token ids by which rows of the batch grew.

        A row stops at an end-of-text token, at `max_new_tokens` or at the end of the model's context. Its random stream
        depends on (seed, name of the row) alone, so its neighbours do not change it.

        Args:
            prompt: the batch of prompts.
            max_new_tokens: most tokens that a row writes.
            temperature: 0 is greedy.
            top_p: nucleus, in (0, 1].
            seed: one or more integers.
            rows: name of each row in the run, usually its number; None counts from 0.
            reply: what a row reads after a token that it wrote (`recmas.agents.decoding.Reply`); such ids are part of
                the row, and do not count as written.
            prefill: as for `think`.
            weights_stay: as for `think`.

        Raises:
            ValueError: a prompt beyond the model's context, at once.
        """
        self.check_context(prompt.mask.sum(dim=1).tolist())
        seeds = [seed] if isinstance(seed, int) else seed
        numbers: Sequence[RowName] = range(prompt.embeds.shape[0]) if rows is None else rows
        return write(
            self,
            prompt,
            max_new_tokens,
            temperature,
            top_p,
            seeds,
            numbers,
            reply,
            prefill,
            stepper=self.stepper,
            weights_stay=weights_stay,
        )

    def decode(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        *,
        rows: Sequence[RowName] | None = None,
        prefill: Prefill = prefill_all,
        weights_stay: bool = True,
    ) -> list[list[int]]:
        """`write` to its end: token ids per row, the end-of-text token included where one was written."""
        written: list[list[int]] = [[] for _ in range(prompt.embeds.shape[0])]
        for grown in self.write(
            prompt, max_new_tokens, temperature, top_p, seed, rows=rows, prefill=prefill, weights_stay=weights_stay
        ):
            for row, tokens in grown.items():
                written[row] += tokens
        return written

    def text(self, tokens: Sequence[int]) -> str:
        """Decoded tokens without special ones, as written: no spaces are tidied away."""
        decoded = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)

    def literal(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a special token, whatever it spells.

        Raises:
            ValueError: the tokenizer has tokens that the model does not know, and the text holds one.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        check_ids(ids, self.vocabulary, self.tokenizer, f"agent {self.name!r}")
        return ids
