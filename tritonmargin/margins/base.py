"""What every margin is: a function of N numbers, the cosines (or products) of the samples with their own class."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from tritonmargin.arguments import check_name
from tritonmargin.margins.numbers import Numbers, as_float

GRADIENT = ("exact", "straight-through")
FLAGS = ("unit_embeddings", "unit_weight")
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


class RowFormula(NamedTuple):
    """A margin for a kernel. Whoever launches it has to look whether the numbers are on the kernel's device."""

    function: Any = None  # the Triton function, of formulas.py; None: phi is cos
    numbers: tuple[Tensor, ...] = ()  # 0-dim, what they hold may change from launch to launch
    options: tuple[Any, ...] = ()  # constants of the compilation


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


class Margin(Numbers):
    """A margin: how a sample's own logit is lowered (or left alone) before the cross-entropy.

    With x' = s x/|x| if `unit_embeddings` else x, and w'_j = w_j/|w_j| if `unit_weight` else w_j, the logits are
    z_ij = x'_i . w'_j + b_j for every class j but the sample's own, whose logit is `target_logit(rows)` + b_y.

    Write your own by overriding one method, `target_cosine`, a function of the [N] cosines::

        class Halved(tm.Margin):
            def target_cosine(self, cos):
                return cos - 0.2 * (1 + cos)

    or `target_logit`, when it needs norms, labels or a state. Angles are in radians.

    Args:
        s: the scale of normalised embeddings, a finite number > 0.

    Raises:
        ValueError: s is not a positive finite number; also when it, or another number, is set later.
    """

    unit_embeddings: bool = True
    unit_weight: bool = True
    gradient: str = "exact"  # or "straight-through": d t / d cos = scale, whatever the formula's slope
    options: ClassVar[dict[str, tuple[str, ...]]] = {}  # named choices and what they may be; shown by repr
    s: float

    def __init__(self, s: float | Tensor = 64.0) -> None:
        super().__init__()
        for name in ("gradient", *FLAGS):
            self.check_choice(name, getattr(self, name))
        self._schedules: dict[str, Callable[[int], float]] = {}
        self.number("s", s)

    def target_cosine(self, cos: Tensor) -> Tensor:  # [N] -> [N]
        """phi(cos): the cosine that the sample's own class is given instead of its true one."""
        raise NotImplementedError(f"{type(self).__name__} must override target_cosine or target_logit")

    def target_logit(self, rows: TargetRows) -> Tensor:  # [N]
        """t_i, the target's logit after the margin: scale * phi(cos)."""
        cos = rows.cos
        phi = one_each(self, "bounded_cosine", self.bounded_cosine(cos), cos)
        return rows.scale * (straight_through(phi, cos) if self.gradient == "straight-through" else phi)

    def bounded_cosine(self, cos: Tensor) -> Tensor:
        """`target_cosine` with a slope that stays finite at cos = +-1."""
        return inside(lambda near: one_each(self, "target_cosine", self.target_cosine(near), near), cos)

    def row_formula(self, device: torch.device) -> RowFormula:
        """What `formula` gives where it can. A class that has one computes there what its methods compute."""
        raise NotImplementedError(f"{type(self).__name__} has no formula for kernels")

    def formula(self, device: torch.device) -> RowFormula | None:
        """This margin as a function that kernels on `device` call; None where only the methods say what it is.

        None too while torch.compile traces: it makes few kernels of the methods by itself.
        """
        if torch.compiler.is_compiling():
            return None
        own, dictionary = type(self), self.__dict__
        kind = kind_of(own)  # type: ignore[arg-type]
        if kind is Margin or not isinstance(dictionary.get("s"), float):
            return None
        for name in METHODS:  # of a subclass, or put on this object
            if getattr(own, name) is not getattr(kind, name) or name in dictionary:
                return None
        # A kernel gives the slope in cos and no other, and neither torch.func nor forward mode sees it.
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return None
        formula = self.row_formula(device)
        for number in formula.numbers:
            if number.requires_grad or number.ndim or number.device != device:
                return None
        return formula

    def scale_on(self, device: torch.device) -> float | Tensor:
        """s as a loss takes it: a tensor where it is learned, and under torch.compile; else the number itself."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return self.tensor("s", device)
        return self.s

    @property
    def logit_bound(self) -> float:
        """A number that |x'_i . w'_j| never exceeds; inf when nothing is known.

        Under torch.compile a power of two, at least 64: not every change of s is a reason to compile again.
        """
        if self._held["s"] is None or not (self.unit_embeddings and self.unit_weight):
            return math.inf
        return 2.0**self._bound_exponent if torch.compiler.is_compiling() else self.s

    # -- numbers and choices -------------------------------------------------------------------------------------

    def _checked(self, name: str, value: object) -> float:
        return positive("s", value) if name == "s" else super()._checked(name, value)

    def _fill(self, name: str, value: float) -> None:
        super()._fill(name, value)
        if name == "s":
            self._bound_exponent = min(max(6, math.ceil(math.log2(self.s))), 1023)  # s <= 2^this

    def __setattr__(self, name: str, value: Any) -> None:
        self.check_choice(name, value)
        super().__setattr__(name, value)

    def check_choice(self, name: str, value: object) -> None:
        """ValueError or TypeError if `name` is a choice or a flag, and `value` none of its values."""
        if name in self.options or name == "gradient":
            check_name(name, value, self.options.get(name, GRADIENT))
        elif name in FLAGS and not isinstance(value, bool):
            raise TypeError(f"{type(self).__name__}: {name} must be True or False, got {value!r}")

    @property
    def number_names(self) -> list[str]:
        """Of the numbers, as `repr` shows them."""
        return [name for name in self._held if name != "s"] + ["s"] * self.unit_embeddings

    def with_schedule(self, **schedules: Callable[[int], float]) -> Self:
        """Attach functions of the step number, e.g. `m=tm.WarmUp(0.0, 0.5, steps=2000)`; returns the margin.

        Raises:
            ValueError: the margin has no such number.
            TypeError: a schedule that cannot be called.
        """
        for name, function in schedules.items():
            if name not in self.number_names:
                known = ", ".join(self.number_names) or "none"
                raise ValueError(f"{type(self).__name__} has no number {name!r} to schedule; it has: {known}")
            if not callable(function):
                raise TypeError(f"{type(self).__name__}: the schedule of {name} must be callable, got {function!r}")
        self._schedules.update(schedules)
        return self

    def schedule(self, step: int) -> None:
        """Set every scheduled number to its value at `step`. A function of the step only, so a resumed run agrees.

        Call it between steps. Where PyTorch computes the margin, a number that changes between forward and backward
        makes autograd raise; where kernels do, backward is that of the old number.

        Raises:
            TypeError, ValueError: step is not a number, or a schedule's value cannot be set; then none is.
        """
        number = as_float(step)
        if number is None or not math.isfinite(number):
            raise TypeError(f"step must be a finite number, got {step!r}")
        values = {name: self._settable(name, function(step)) for name, function in self._schedules.items()}
        for name, value in values.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        numbers = [(name, getattr(self, name)) for name in self.number_names]
        shown = [f"{name}=learned" if isinstance(value, Tensor) else f"{name}={value:g}" for name, value in numbers]
        return ", ".join([*shown, *(f"{name}={getattr(self, name)!r}" for name in self.options)])


def logit_of(margin: Margin, rows: TargetRows) -> Tensor:
    """`margin.target_logit(rows)`, or an error that names the margin if it is no [N] tensor of real numbers."""
    return one_each(margin, "target_logit", margin.target_logit(rows), rows.product)


def one_each(margin: Margin, method: str, found: object, given: Tensor) -> Tensor:
    """`found`, if it is one floating-point number for each of `given`."""
    if isinstance(found, Tensor) and found.is_floating_point() and found.shape == given.shape:
        return found
    name = f"{type(margin).__name__}.{method}"
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} must return a tensor of shape [N], got {type(found).__name__}")
    if not found.is_floating_point():
        raise TypeError(f"{name} must return a floating-point tensor, got {found.dtype} of shape {list(found.shape)}")
    raise ValueError(
        f"{name} must return one number a sample, shape [N] = {list(given.shape)}, got shape {list(found.shape)} of "
        f"{found.dtype}"
    )


@functools.cache
def kind_of(margin: type[Margin]) -> type[Margin]:
    """The class that wrote the formula for kernels that `margin` has."""
    return next(kind for kind in margin.__mro__ if "row_formula" in kind.__dict__)


def positive(name: str, value: object) -> float:
    """`value` as a float, or ValueError unless it is a finite number > 0."""
    found = as_float(value)
    if found is None or not math.isfinite(found) or found <= 0:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return found
