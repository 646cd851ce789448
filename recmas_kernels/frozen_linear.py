"""`FrozenLinear`, the drop-in for an `nn.Linear` that never learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from recmas_kernels import frozen
from recmas_kernels.frozen import Panels


class FrozenLinear(nn.Linear):
    """A frozen `nn.Linear` whose weight exists once: packed, where the CPU kernels can serve it, else as it is.

    Same results within rounding, same state dict: ``weight`` comes back from the panels bit by bit, for ``state_dict``,
    ``load_state_dict``, moves and casts, copies and pickles. Copies and pickles are not packed; after a move or cast
    the weight is packed again where it can be. There is a gradient of the input, none of the weight or the bias.

    While it is packed, ``weight`` is a new tensor at each access: what is written into it is lost, and
    ``RECMAS_CHECK=1`` makes the next call raise RuntimeError then.

    Args:
        weight: ``[out_features, in_features]``; not packed yet.
        bias: ``[out_features]``, or None.

    Attributes:
        panels: the packed weight; None while the weight is as it is.
    """

    panels: Panels | None = None
    _plain: tuple[nn.Parameter, ...] = ()  # the weight's parameter, empty while it is packed; in no module's eyes
    _shown: tuple[Tensor, ...] = ()  # under RECMAS_CHECK=1, the unpacked weight that somebody may write into

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
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
        panels = self.panels
        if panels is None:
            return super().forward(x)
        if self._shown:
            frozen.expect_unwritten(self._shown[0], panels)
        return frozen.frozen_linear(x, panels, self._parameters["bias"])

    def pack(self) -> bool:
        """Keep the weight as panels alone; whether that could be done."""
        weight = self._parameters["weight"]
        if weight is not None and frozen.why_not_packed(weight) is None:
            self.panels = frozen.pack(weight)
            weight.data = weight.data.new_empty(0)
            self._plain, self._shown = (weight,), ()
            self._parameters["weight"] = None
        return self.panels is not None

    def unpack(self) -> None:
        """Have the weight as a parameter again."""
        if self.panels is not None:
            (weight,) = self._plain
            weight.data = self.panels.weight()
            self._parameters["weight"] = weight
            self.panels, self._plain, self._shown = None, (), ()

    def explain(self, x: Tensor) -> str:
        """Who would serve a call on ``x``; see `recmas_kernels.explain`."""
        if self.panels is not None:
            return frozen.explain(x, self.panels)
        return f"  plain torch: the weight is not packed: {frozen.why_not_packed(self.weight) or 'unpack() was called'}"

    def extra_repr(self) -> str:
        kept = "plain" if self.panels is None else f"packed in {str(self.panels.stored).removeprefix('torch.')}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if found is not None or name != "weight" or self.panels is None:
            return found
        shown = nn.Parameter(self.panels.weight(), requires_grad=False)
        if frozen.checks_writes():
            self._shown = (shown.detach(),)
        return shown

    def __getstate__(self) -> dict[str, Any]:
        if self.panels is None:
            return self.__dict__
        plain = {key: value for key, value in self.__dict__.items() if key not in ("panels", "_plain", "_shown")}
        return {**plain, "_parameters": {**self._parameters, "weight": self.weight}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        packed = self.panels is not None
        self.unpack()
        super()._apply(fn, recurse)
        if packed:
            self.pack()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.panels is not None:
            destination[f"{prefix}weight"] = self.panels.weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        packed = self.panels is not None
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)
        if packed:
            self.pack()


def freeze(linear: nn.Linear) -> FrozenLinear:
    """Make an ``nn.Linear`` a packed `FrozenLinear` in its place, for everyone who holds it."""
    linear.__class__ = FrozenLinear
    assert isinstance(linear, FrozenLinear)
    linear.pack()
    return linear


def thaw(linear: FrozenLinear) -> None:
    """Make it an ``nn.Linear`` again, with the weight that it has now."""
    linear.unpack()
    for name in ("panels", "_plain", "_shown"):
        linear.__dict__.pop(name, None)
    linear.__class__ = nn.Linear  # type: ignore[assignment]


def why_not_frozen(linear: nn.Module) -> str | None:
    """What a `FrozenLinear` in its place would lose; None if nothing."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__module__}.{type(linear).__qualname__}"
    if "forward" in linear.__dict__:
        return "it has a forward of its own"
    if any(hooks for key, hooks in linear.__dict__.items() if key.endswith("_hooks")):
        return "it has hooks"
    if linear._modules or linear._buffers or linear._parameters.keys() != {"weight", "bias"}:
        return "it holds more than a weight and a bias"
    if any(parameter is not None and parameter.requires_grad for parameter in linear._parameters.values()):
        return "it learns"
    return None
