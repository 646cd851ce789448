"""`accelerate`: run the frozen linear layers of any model from packed weights, and its RMSNorms as one kernel each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recmas_kernels import rms_norm
from recmas_kernels.frozen import Panels, why_not_packed
from recmas_kernels.frozen_linear import FrozenLinear, freeze, thaw, why_not_frozen
from recmas_kernels.shared_linear import SharedLinear, share, unshare

if TYPE_CHECKING:
    from typing_extensions import Self


class Accelerated:
    """A model whose plain frozen linear layers are `FrozenLinear`, until `close`.

    Args:
        model: any module; changed in place.

    Attributes:
        packed: by name, the layers that changed.
        shared: by name, layers whose weight is not packed but read in place by few rows.
        norms: by name, the RMSNorms that run as one kernel.
        left: by name, why other linear layers stayed as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.packed: dict[str, FrozenLinear] = {}
        self.shared: dict[str, SharedLinear] = {}
        self.norms: dict[str, nn.Module] = {}
        self.left: dict[str, str] = {}
        owners = _owners(model)
        for name, part in model.named_modules():
            if not isinstance(part, nn.Linear):
                continue
            reason = why_not_frozen(part) or why_not_packed(part.weight)
            if reason is not None:
                self.left[name] = reason
            elif others := owners[part.weight.untyped_storage().data_ptr()] - {name}:
                self.shared[name] = share(part)
                self.left[name] = f"it shares its weight with {', '.join(sorted(others))}; few rows read it in place"
            else:
                self.packed[name] = freeze(part)

        for name, part in model.named_modules():
            found = rms_norm.recognised(part)
            if found is not None:
                rms_norm.serve(part, *found)
                self.norms[name] = part

    def close(self) -> None:
        """Make the layers plain again, with the weights that they have now."""
        for norm in self.norms.values():
            rms_norm.release(norm)
        self.norms.clear()
        for frozen in self.packed.values():
            thaw(frozen)
        self.packed.clear()
        for shared in self.shared.values():
            unshare(shared)
        self.shared.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        held = self._panels()
        plain = sum(panels.out_features * panels.in_features * panels.dtype.itemsize for panels in held)
        lines = [f"{len(held)} linear layers packed: {plain / 1e6:.1f} MB in {self.packed_bytes / 1e6:.1f} MB"]
        return "\n".join(lines + [f"{name or 'the model'} is left as it is: {why}" for name, why in self.left.items()])

    @property
    def elements(self) -> int:
        """Of all packed weights."""
        return sum(panels.out_features * panels.in_features for panels in self._panels())

    @property
    def packed_bytes(self) -> int:
        """Bytes of all panels."""
        return sum(panels.data.nbytes for panels in self._panels())

    def _panels(self) -> list[Panels]:
        return [frozen.panels for frozen in self.packed.values() if frozen.panels is not None]


def accelerate(model: nn.Module) -> Accelerated:
    """Make every plain frozen ``nn.Linear`` inside ``model`` a `FrozenLinear`, whose weight is packed.

    A packed weight is read once, in order, at the speed of memory, and in 16 bits where those hold a float32 weight
    exactly. It takes the place of the original, so that no weight exists twice; results stay the same within rounding.
    Left alone are layers that learn, subclasses, layers with hooks or a forward of their own, and weights that no
    CPU kernel reads. A weight that other modules share (a head tied to the embedding) is not packed, since nothing
    could be freed; few rows read it in place. State dicts, moves, casts and
    copies work on the model as it is; `Accelerated.close` or the end of a ``with`` block makes the layers plain again.

    RMSNorms, recognised by what they compute, run as one kernel where no gradient is asked for.

    Args:
        model: any module, on any device; only weights on the CPU are packed.

    Returns:
        What was done; ``str()`` of it says it in lines.

    Raises:
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    return Accelerated(model)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, as the model has them unpacked; one packed weight is unpacked at a time."""
    seen: set[int] = set()
    for prefix, part in model.named_modules():
        for name in part._parameters:
            held = getattr(part, name)
            if held is None or id(held) in seen:
                continue
            if part._parameters[name] is held:
                seen.add(id(held))
            yield f"{prefix}.{name}" if prefix else name, held
    yield from model.named_buffers()


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Names of the modules that hold a piece of each storage, by its address."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, part in model.named_modules():
        for held in (*part._parameters.values(), *part._buffers.values()):
            if held is not None and held.layout is torch.strided and held.device.type != "meta":
                owners[held.untyped_storage().data_ptr()].add(name)
    return owners
