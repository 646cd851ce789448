"""The weights of a model some of which are packed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from recmas_kernels.frozen_linear import FrozenLinear


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, as the model has them unpacked; one packed weight is unpacked at a time.

    Args:
        model: any module; it stays packed.

    Yields:
        ``(name, tensor)`` as ``named_parameters`` and then ``named_buffers`` have them, each shared tensor once. Of a
        packed weight the tensor is a copy.

    Raises:
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    seen: set[int] = set()
    for prefix, part in model.named_modules():
        for name, held in part._parameters.items():
            if held is None or id(held) in seen:
                continue
            seen.add(id(held))
            weight = part.unpacked_weight() if isinstance(part, FrozenLinear) and name == "weight" else held
            assert weight is not None
            yield f"{prefix}.{name}" if prefix else name, weight
    yield from model.named_buffers()
