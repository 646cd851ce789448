"""`FrozenLinear`, the drop-in for an `nn.Linear` that never learns."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn

from recmas_kernels import checks, frozen
from recmas_kernels.frozen import Panels
from recmas_kernels.replaced import has_functions

NOT_EXPORTED = "a packed layer cannot be exported: its panels fit this processor; unpack it first"
_PLAIN_FORWARD = nn.Linear.forward


class FrozenLinear(nn.Linear):
    """A frozen `nn.Linear` whose weight exists once: packed, where the CPU kernels can serve it, else as it is.

    Same results within rounding, same state dict, bit by bit; there is a gradient of the input. While the weight is
    packed, its parameter keeps its shape and dtype and holds NaN, in a few bytes. The values come back for whoever asks
    for them. ``state_dict``, copies and pickles get their own, the layer stays packed, and what is written into those
    does not reach it. Reading ``weight`` makes the layer plain for good, since what was read may be written; so does
    ``state_dict(keep_vars=True)``, and a weight or bias that is set to learn. After ``load_state_dict``, a move or a
    cast the weight is packed again where it can be. Another weight that is put in its place, for a call or for good, is
    used as it is.

    Copies and pickles are not packed. Exporting a packed layer raises RuntimeError: panels fit one processor.
    ``RECMAS_CHECK=1`` finds what is written into a packed weight's parameter.

    Args:
        weight: ``[out_features, in_features]``; not packed yet.
        bias: ``[out_features]``, or None.

    Raises:
        TypeError: weight or bias is no tensor.
        ValueError: one has another shape.

    Attributes:
        panels: the packed weight; None while the weight is as it is.
    """

    panels: Panels | None = None
    _packs: bool = False  # also where it could not be packed, as in float64
    _held: tuple[nn.Parameter, ...] = ()  # the parameter that stands for the panels
    _owners: int = 1  # who wants a FrozenLinear here; see `freeze`

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        checks.expect_matrix("weight", weight)
        if bias is not None:
            checks.expect_tensor("bias", bias)
            checks.expect_shape("bias", bias, weight.shape[0])
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", nn.Parameter(weight.detach(), requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FrozenLinear:
        """Packed, where the kernels can serve it; ``linear`` is left as it is.

        Raises:
            TypeError: anything but an ``nn.Linear`` itself.
            ValueError: it learns, or carries more than its weight and bias (hooks, parametrizations).
        """
        reason = why_not_frozen(linear)
        if reason is not None:
            kind = ValueError if type(linear) is nn.Linear else TypeError
            raise kind(f"linear cannot become a FrozenLinear: {reason}")
        made = cls(linear.weight, linear.bias)
        made.pack()
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        panels = FrozenLinear.packed(self)  # who kept this method may call it when the layer is plain again
        if panels is None:
            _expect_values(self, self._parameters.get("weight"))
            return nn.Linear.forward(self, x)
        if nn.Linear.forward is not _PLAIN_FORWARD:  # somebody replaced it, for every layer
            return nn.Linear.forward(self, x)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return torch.compiler.disable(_learning)(self, x)  # not before, since it imports the compiler
        if isinstance(x, torch.fx.Proxy):  # a symbolic trace names the weight
            self.unpack()
            return super().forward(x)
        if torch.compiler.is_exporting():
            raise RuntimeError(NOT_EXPORTED)
        if not torch.compiler.is_compiling():
            frozen.expect_unwritten(weight)
        return frozen.frozen_linear(x, panels, bias)

    def packed(self) -> Panels | None:
        """The panels, if they are the weight now: they are not where another one was put in its place."""
        panels: Panels | None = self.__dict__.get("panels")
        weight = self._parameters.get("weight")
        return panels if panels is not None and weight is self._held[0] and frozen.is_stand_in(weight) else None

    def pack(self) -> bool:
        """Keep the weight as panels alone; whether that could be done."""
        weight = self._parameters.get("weight")
        self._packs = True
        if self.packed() is None and weight is not None and frozen.why_not_packed(weight) is None:
            self.panels, self._held = frozen.pack(weight), (weight,)
            weight.data = frozen.stand_in(weight)
        return self.packed() is not None

    def unpack(self) -> None:
        """Have the weight in its parameter again, or leave the one that took its place."""
        panels = self.packed()
        if panels is not None:
            with frozen.for_later():
                self._held[0].data = panels.weight()
        self.panels, self._held, self._packs = None, (), False

    def unpacked_weight(self) -> Tensor | None:
        """The weight, without unpacking the layer: a new tensor if it is packed."""
        panels = self.packed()
        return self._parameters.get("weight") if panels is None else panels.weight()

    def explain(self, x: Tensor) -> str:
        """Who would serve a call on ``x``; see `recmas_kernels.explain`."""
        panels = self.packed()
        if panels is not None:
            return frozen.explain(x, panels)
        return f"  plain torch: the weight is not packed: {frozen.why_not_packed(self.weight) or 'unpack() was called'}"

    def extra_repr(self) -> str:
        panels = self.packed()
        kept = "plain" if panels is None else f"packed in {str(panels.stored).removeprefix('torch.')}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and self.panels is not None:
            self.panels, self._held, self._packs = None, (), False
        super().register_parameter(name, param)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name != "weight":
            return found
        panels = self.packed()
        if panels is None:
            _expect_values(self, found)
            return found
        if torch.compiler.is_exporting():
            raise RuntimeError(NOT_EXPORTED)
        if torch.compiler.is_compiling():  # it may not write the parameter
            return panels.weight()
        self.unpack()
        return found

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            self.unpack()
        super().__delattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in super().__getstate__().items() if key not in OF_PACKING}
        if (panels := self.packed()) is not None:
            weight = nn.Parameter(panels.weight(), self._held[0].requires_grad)
            if (child := get_spawning_popen()) is not None:  # it opens the weight's shared memory when it has started
                child.__dict__.setdefault("unpacked", []).append(weight)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        packs = self._packs
        self.unpack()
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        self._packs = packs
        if packs and weight is not None and not (weight.device.type == "cpu" and weight.is_shared()):
            self.pack()  # unless it was moved into memory that other processes read and write
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if keep_vars:
            self.unpack()  # whoever asks for the parameters themselves may write them
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (panels := self.packed()) is not None:
            destination[f"{prefix}weight"] = panels.weight()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        packs, before = self._packs, self._parameters.get("weight")
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)
        if packs and self._parameters.get("weight") is before:  # not one that the caller may hold, too
            self.pack()


def _expect_values(linear: nn.Linear, weight: Any) -> None:
    """Raise RuntimeError if a transform or an export wraps what stands for a packed weight."""
    if linear.__dict__.get("panels") is not None and isinstance(weight, Tensor) and frozen.is_stand_in(weight):
        raise RuntimeError("weight is packed, and what stands for it has no values: unpack the layer first")


def _learning(linear: FrozenLinear, x: Tensor) -> Tensor:
    """A call with the weight or the bias set to learn."""
    linear.unpack()
    return nn.Linear.forward(linear, x)


OF_PACKING = frozenset({"panels", "_packs", "_held", "_owners"})
"""Attributes of a `FrozenLinear` that say how its weight is kept."""


def freeze(linear: nn.Linear) -> FrozenLinear:
    """Make an ``nn.Linear`` a packed `FrozenLinear` in its place, for everyone who holds it, until as many `thaw`."""
    if isinstance(linear, FrozenLinear):
        linear._owners += 1
    else:
        linear.__class__ = FrozenLinear
    assert isinstance(linear, FrozenLinear)
    linear.pack()
    return linear


def thaw(linear: FrozenLinear) -> None:
    """Undo one `freeze`: the last makes it an ``nn.Linear`` again, with the weight that it has now."""
    if linear._owners > 1:
        linear._owners -= 1
        return
    linear.unpack()
    for name in OF_PACKING:
        linear.__dict__.pop(name, None)
    if type(linear) is FrozenLinear:  # else somebody made a class of their own from it, which is plain without panels
        linear.__class__ = nn.Linear  # type: ignore[assignment]


def why_not_frozen(linear: nn.Module) -> str | None:
    """What a `FrozenLinear` in its place would lose; None if nothing."""
    if type(linear) not in (nn.Linear, FrozenLinear):
        return f"it is a {type(linear).__module__}.{type(linear).__qualname__}"
    if "forward" in linear.__dict__:
        return "it has a forward of its own"
    if any(hooks for key, hooks in linear.__dict__.items() if key.endswith("_hooks")):
        return "it has hooks"
    if linear._modules or linear._buffers or linear._parameters.keys() != {"weight", "bias"}:
        return "it holds more than a weight and a bias"
    if any(parameter is not None and parameter.requires_grad for parameter in linear._parameters.values()):
        return "it learns"
    if has_functions(bias := linear._parameters["bias"]):
        return f"its bias is a {type(bias).__qualname__}"
    return None
