"""What people do instead of training links: fine-tuning of one agent's own weights, whole or by LoRA (peft)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from recmas.agents.agent import Agent
from recmas.training.pairs import Utterance

RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 1e-4


class FineTuning:
    """Steps on the same prompts and texts again and again: AdamW, gradients clipped at 1.

    Args:
        agent: whose model is copied; its linear layers are the library's, not packed.
        said: what it reads and should say.
        rank: of LoRA in every projection of every layer; None trains all weights.
    """

    def __init__(self, agent: Agent, said: Sequence[Utterance], rank: int | None) -> None:
        agent.unpack()
        self.model: nn.Module = copy.deepcopy(agent.model).requires_grad_(rank is None)
        if rank is not None:
            self.model = get_peft_model(
                self.model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=PROJECTIONS)
            )
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        rows = [[*one.prompt, *one.said] for one in said]
        width = max(map(len, rows))
        self.ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        self.mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        self.counted = torch.tensor(
            [
                [0] * len(one.prompt) + [1] * len(one.said) + [0] * (width - len(one.prompt) - len(one.said))
                for one in said
            ],
            dtype=torch.bool,
        )

    def loss(self) -> torch.Tensor:
        """Mean cross entropy of what is said; the head sees the positions that predict it alone."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = base.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).last_hidden_state
        predicts = self.counted.roll(-1, dims=1)
        return F.cross_entropy(base.lm_head(hidden[predicts]), self.ids[self.counted])

    def steps(self, count: int) -> float:
        """So many steps by a new optimiser, whose moments so count as memory; the first loss."""
        optimizer = torch.optim.AdamW(self.trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        first = None
        for _ in range(count):
            loss = self.loss()
            loss.backward()
            first = loss.item() if first is None else first
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert first is not None
        return first
