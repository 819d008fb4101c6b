"""What every margin is: a function of N numbers, the cosines (or products) of the samples with their own class."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from tritonmargin.margins.in_kernel import TRITON, RowFormula

GRADIENT = ("exact", "straight-through")
METHODS = ("target_logit", "bounded_cosine", "target_cosine")  # each of them can say what a margin is


@dataclass(frozen=True)
class TargetRows:
    """What a margin may look at: numbers per sample, none per class. All differentiable except `target`."""

    product: Tensor  # [N]  x'_i . w'_y, in float32 (float64 for float64 inputs), without the bias
    embedding_norm: Tensor  # [N]  |x_i|
    weight_norm: Tensor  # [N]  |w_y|
    scale: float | Tensor  # scalar or [N]; product = scale * cos
    target: Tensor  # [N]  int64 class numbers; ignored rows hold 0

    @property
    def cos(self) -> Tensor:  # [N]
        """Cosine between the embedding and its class's row; 0 where one of them is a zero row."""
        if isinstance(self.scale, Tensor):
            # A zero row has scale 0 and product 0. Dividing by 1 there keeps 0/0 out of the gradient too.
            return self.product / torch.where(self.scale > 0, self.scale, torch.ones_like(self.scale))
        return self.product / self.scale


def inside(function: Callable[[Tensor], Tensor], cos: Tensor) -> Tensor:
    """`function(cos)` with a slope that stays finite at cos = +-1.

    The value is exact on the closed interval [-1, 1]. The slope is the function's own on
    [-1 + eps, 1 - eps] (eps of the dtype) and stays what it is at that edge beyond it: sqrt(1 - cos^2) and arccos
    have an infinite slope at +-1, where the chain rule through the normalisation multiplies it by zero.
    """
    edge = 1.0 - torch.finfo(cos.dtype).eps
    near = cos + (cos.clamp(-edge, edge) - cos).detach()
    value = function(near)
    with torch.no_grad():
        correction = function(cos.clamp(-1.0, 1.0)) - value
    return value + correction


def straight_through(value: Tensor, cos: Tensor) -> Tensor:
    """`value` with d value / d cos = 1."""
    return value.detach() + (cos - cos.detach())


class Margin(nn.Module):
    """A margin: how a sample's own logit is lowered (or left alone) before the cross-entropy.

    With x' = s x/|x| if `unit_embeddings` else x, and w'_j = w_j/|w_j| if `unit_weight` else w_j, the logits are
    z_ij = x'_i . w'_j + b_j for every class j but the sample's own, whose logit is `target_logit(rows)` + b_y.

    Write your own by overriding one method, `target_cosine`, a function of the [N] cosines::

        class Halved(tm.Margin):
            def target_cosine(self, cos):
                return cos - 0.2 * (1 + cos)

    or `target_logit`, when it needs norms, labels or a state. Angles are in radians.

    Args:
        s: the scale of normalised embeddings, > 0. A Python number, because it bounds the logits and the class
           pass chooses its path by that bound without asking a device.

    Raises:
        ValueError: s is not a positive finite number.
    """

    unit_embeddings: bool = True
    unit_weight: bool = True
    gradient: str = "exact"  # or "straight-through": d t / d cos = scale, whatever the formula's slope
    options: ClassVar[dict[str, tuple[str, ...]]] = {}  # named choices and what they may be; shown by repr

    def __init__(self, s: float = 64.0) -> None:
        super().__init__()
        self.s = positive("s", s)
        self._schedules: dict[str, Callable[[int], float]] = {}
        self._values: dict[str, float] = {}  # of the numbers, for when a buffer has none: on the meta device

    def target_cosine(self, cos: Tensor) -> Tensor:  # [N] -> [N]
        """phi(cos): the cosine that the sample's own class is given instead of its true one."""
        raise NotImplementedError(f"{type(self).__name__} must override target_cosine or target_logit")

    def target_logit(self, rows: TargetRows) -> Tensor:  # [N]
        """t_i, the target's logit after the margin: scale * phi(cos)."""
        cos = rows.cos
        phi = self.bounded_cosine(cos)
        return rows.scale * (straight_through(phi, cos) if self.gradient == "straight-through" else phi)

    def bounded_cosine(self, cos: Tensor) -> Tensor:
        """`target_cosine` with a slope that stays finite at cos = +-1."""
        return inside(self.target_cosine, cos)

    def row_formula(self) -> RowFormula:
        """What `formula` gives where it can. A class that has one computes there what its methods compute."""
        raise NotImplementedError(f"{type(self).__name__} has no formula for kernels")

    @property
    def formula(self) -> RowFormula | None:
        """This margin as a function that kernels call; None where only the methods above say what it is.

        None too while torch.compile traces: it makes few kernels of the methods by itself.
        """
        if torch.compiler.is_compiling():
            return None
        own, dictionary = type(self), self.__dict__
        kind = kind_of(own)  # type: ignore[arg-type]
        if not TRITON or kind is Margin or not isinstance(dictionary.get("s"), float):
            return None
        for name in METHODS:  # of a subclass, or put on this object
            if getattr(own, name) is not getattr(kind, name) or name in dictionary:
                return None
        # A kernel gives the slope in cos and no other, and neither torch.func nor forward mode sees it.
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return None
        formula = self.row_formula()
        for number in formula.numbers:
            if number is None or number.requires_grad or number.ndim:
                return None
        return formula

    @property
    def logit_bound(self) -> float:
        """A number that |x'_i . w'_j| never exceeds; inf when nothing is known."""
        fixed = isinstance(self.s, float) and self.unit_embeddings and self.unit_weight
        return self.s if fixed else math.inf

    # -- numbers that change from step to step -------------------------------------------------------------------

    def number(self, name: str, value: float) -> None:
        """Register a margin number as a 0-dim float64 buffer: it changes at run time without a recompilation.

        It is not part of the state dict: a checkpoint loaded into another margin must not change that margin.
        """
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{type(self).__name__}: {name} must be a number, got {value!r}")
        self.check_number(name, float(value))
        self._values[name] = float(value)
        self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64), persistent=False)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.options:
            one_of(name, value, self.options[name])
        if isinstance(value, Real) and name in self.__dict__.get("_buffers", {}):
            self.check_number(name, float(value))
            if name in self._values:
                self._values[name] = float(value)
            self._buffers[name].fill_(float(value))  # type: ignore[union-attr]
        elif name == "s" and not isinstance(value, Tensor):
            super().__setattr__(name, positive("s", value))  # type: ignore[arg-type]
        else:
            super().__setattr__(name, value)  # type: ignore[arg-type]

    def check_number(self, name: str, value: float) -> None:
        """Raise ValueError if `value` cannot be the margin number `name`."""
        if not math.isfinite(value):
            raise ValueError(f"{type(self).__name__}: {name} must be a finite number, got {value}")

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # `.half()` must not round m = 0.35, nor `.to_empty()` forget it: numbers follow the device and nothing else.
        numbers = {name: self.get_buffer(name) for name in self._values}
        super()._apply(fn, recurse)
        for name, exact in numbers.items():
            device = self.get_buffer(name).device
            precise = torch.float32 if device.type == "mps" else exact.dtype
            if exact.is_meta:
                exact = torch.tensor(self._values[name], dtype=exact.dtype, device="cpu")
            self._buffers[name] = exact.to(device=device, dtype=precise)
        return self

    def with_schedule(self, **schedules: Callable[[int], float]) -> Margin:
        """Attach functions of the step number, e.g. `m=tm.WarmUp(0.0, 0.5, steps=2000)`; returns the margin."""
        for name in schedules:
            if name not in self._buffers:
                known = ", ".join(self._buffers) or "none"
                raise ValueError(f"{type(self).__name__} has no number {name!r} to schedule; it has: {known}")
        self._schedules.update(schedules)
        return self

    def schedule(self, step: int) -> None:
        """Set every scheduled number to its value at `step`. A function of the step only, so a resumed run agrees.

        Call it between steps. Where PyTorch computes the margin, a number that changes between forward and backward
        makes autograd raise; where kernels do, backward is that of the old number.
        """
        for name, function in self._schedules.items():
            setattr(self, name, float(function(step)))

    def extra_repr(self) -> str:
        buffers = {name: self.get_buffer(name) for name in self._values}
        numbers = [
            f"{name}={self._values[name] if buffer.is_meta else float(buffer):g}" for name, buffer in buffers.items()
        ]
        scale = [f"s={self.s:g}"] if self.unit_embeddings and not isinstance(self.s, Tensor) else []
        choices = [f"{name}={getattr(self, name)!r}" for name in self.options]
        return ", ".join(numbers + scale + choices)


@functools.cache
def kind_of(margin: type[Margin]) -> type[Margin]:
    """The class that wrote the formula for kernels that `margin` has."""
    return next(kind for kind in margin.__mro__ if "row_formula" in kind.__dict__)


def held(margin: Margin, *names: str) -> tuple[Tensor, ...]:
    """A margin's numbers. From its dictionary: attributes of a module take microseconds each."""
    return tuple([margin._buffers.get(name) for name in names])  # type: ignore[misc]


def positive(name: str, value: object) -> float:
    """`value` as a float, or ValueError unless it is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return float(value)


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """ValueError with the list of known names unless `value` is one of them."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
