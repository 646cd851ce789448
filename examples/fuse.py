"""Put fused kernels under the links of a model of your own: same parameters, same results within rounding."""

from __future__ import annotations

import torch
from torch import nn

from recmas_kernels import FusedRecursiveLink, RecursiveLink, alignment_loss, explain, fuse, use_backend


class TwoAgents(nn.Module):
    """What a project might hold: an inner link of one model and an outer link to the next, both eager."""

    def __init__(self, width: int, target_width: int) -> None:
        super().__init__()
        self.inner = RecursiveLink.inner(width)
        self.outer = RecursiveLink.outer(width, target_width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(hidden))


def main() -> None:
    torch.manual_seed(0)
    model = TwoAgents(256, 384)
    hidden = torch.randn(4, 16, 256)
    eager = model(hidden)

    names = list(model.state_dict())
    fuse(model)
    assert isinstance(model.inner, FusedRecursiveLink)
    assert list(model.state_dict()) == names
    fused = model(hidden)
    print(f"largest difference: {(fused - eager).abs().max():.1e} of values up to {eager.abs().max():.1f}")
    torch.testing.assert_close(fused, eager)

    # Training: the loss gathers its target rows from the frozen table of embeddings by token id.
    table, ids = torch.randn(1000, 384), torch.randint(1000, (4, 16))
    loss = alignment_loss(model(hidden), table, token_ids=ids)
    loss.backward()
    print(f"alignment loss {loss.item():.3f}, gradient of W1 {tuple(model.inner.proj1.weight.grad.shape)}")

    print(explain(model.inner, hidden))  # which kernel serves this call, and why not the others
    with use_backend("reference"):  # the same mathematics in plain torch
        torch.testing.assert_close(model(hidden), eager)


if __name__ == "__main__":
    main()
