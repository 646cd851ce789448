"""`accelerate`: run the frozen linear layers of any model from packed weights, and its RMSNorms as one kernel each."""

from __future__ import annotations

from collections import defaultdict
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

from recmas_kernels import own_forward
from recmas_kernels.decoder.layer import LayerKernel
from recmas_kernels.decoder.model import ModelKernel
from recmas_kernels.decoder.proof import Proofs
from recmas_kernels.frozen import Panels, why_not_packed
from recmas_kernels.frozen_linear import FrozenLinear, freeze, thaw, why_not_frozen
from recmas_kernels.holders import held_outside
from recmas_kernels.rms_norm import NormKernel
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
        layers: by name, the decoder layers that run as two kernels, one position at a time.
        models: by name, the decoders whose layers run in one call, into a cache that makes room for a position.
        left: by name, why other linear layers stayed as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.packed: dict[str, FrozenLinear] = {}
        self.shared: dict[str, SharedLinear] = {}
        self.norms: dict[str, nn.Module] = {}
        self.layers: dict[str, nn.Module] = {}
        self.models: dict[str, nn.Module] = {}
        self.left: dict[str, str] = {}
        try:
            self._pack(model)
            self._serve(model)
        except BaseException:  # half a model would be nobody's to close
            self.close()
            raise

    def _pack(self, model: nn.Module) -> None:
        linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        owners, outside = _owners(model), held_outside(model, linears.values())
        for name, part in linears.items():
            if isinstance(part, FrozenLinear) and part.packed() is not None:
                self.packed[name] = freeze(part)
                continue
            reason = _why_not(part)
            if reason is not None:
                self.left[name] = reason
            elif others := owners[part.weight.untyped_storage().data_ptr()] - {name}:
                self.shared[name] = share(part)
                self.left[name] = f"it shares its weight with {', '.join(sorted(others))}; few rows read it in place"
            elif id(part.weight) in outside:
                self.left[name] = "a module outside of the model holds its weight, too, or may (gc.freeze)"
            else:
                self.packed[name] = freeze(part)

    def _serve(self, model: nn.Module) -> None:
        proofs = Proofs()
        served: set[str] = set()
        for kernel, names in (  # each kind of parts that the kind before it runs as kernels
            (NormKernel, self.norms),
            (lambda layer: LayerKernel(layer, proofs), self.layers),
            (ModelKernel, self.models),
        ):
            for name, part in model.named_modules():
                if name not in served and own_forward.serve(part, kernel):
                    names[name] = part
                    served.add(name)

    def close(self) -> None:
        """Make the layers plain again, with the weights that they have now; those that others accelerated stay."""
        for served in (self.models, self.layers, self.norms):
            while served:
                own_forward.release(served.popitem()[1])
        while self.packed:
            name, frozen = self.packed.popitem()
            try:
                thaw(frozen)
            except BaseException:  # no memory for the weight: it is still packed, and can be closed later
                self.packed[name] = frozen
                raise
        while self.shared:
            unshare(self.shared.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        held = self._panels()
        plain = sum(panels.out_features * panels.in_features * panels.dtype.itemsize for panels in held)
        lines = [
            f"{len(held)} linear layers packed: {plain / 1e6:.1f} MB in {self.packed_bytes / 1e6:.1f} MB",
            f"{len(self.norms)} norms run as one kernel, {len(self.layers)} decoder layers as two at one position"
            + (", in one call" if self.models else ""),
        ]
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
        found = (frozen.packed() for frozen in self.packed.values())
        return [panels for panels in found if panels is not None]


def accelerate(model: nn.Module) -> Accelerated:
    """Make every plain frozen ``nn.Linear`` inside ``model`` a `FrozenLinear`, whose weight is packed.

    A packed weight is read once, in order, at the speed of memory, and in 16 bits where those hold a float32 weight
    exactly. It takes the place of the original, so that no weight exists twice; results stay the same within rounding.
    Left alone are layers that learn, subclasses, layers with hooks or a forward of their own, and weights that no
    CPU kernel reads. A weight that other modules share (a head tied to the embedding) is not packed, since nothing
    could be freed; few rows read it in place. State dicts, moves, casts, copies, and weights that are replaced or set
    to learn work on the model as it is; see `FrozenLinear`. `Accelerated.close` or the end of a ``with`` block makes
    the layers plain again; a model that was accelerated several times is plain after as many.

    A packed weight's own parameter holds NaN, so whoever read the parameters of ``model.parameters()`` for their values
    reads `named_weights` or a state dict instead. Modules outside of ``model`` that hold the same parameter are found,
    and the layer is left alone. After ``gc.freeze``, which hides them, it is also left alone where anything unknown
    refers to its weight, such as a local variable. A tensor that only shares a weight's memory keeps that memory, and
    its values.

    RMSNorms, recognised by what they compute, run as one kernel where no gradient is asked for. Decoder layers of known
    classes that compute on random rows what the kernels do run as two, for one position of up to 16 rows. What such a
    layer names in its own file is compared at every call; functions that these call elsewhere must not change.

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


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Names of the modules that hold a piece of each storage, by its address."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, part in model.named_modules():
        for held in (*part._parameters.values(), *part._buffers.values()):
            if held is not None and held.layout is torch.strided and held.device.type != "meta":
                owners[held.untyped_storage().data_ptr()].add(name)
    return owners


def _why_not(linear: nn.Linear) -> str | None:
    """Why a linear layer is left alone, but for who else holds its weight."""
    reason = None if type(linear) is SharedLinear else why_not_frozen(linear)
    return reason or why_not_packed(linear.weight)
