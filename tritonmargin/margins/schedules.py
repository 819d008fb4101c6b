"""Functions of the step number for `Margin.with_schedule`. Small picklable objects, so a head can be saved."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tritonmargin.arguments import check_number


@dataclass(frozen=True)
class WarmUp:
    """Linear from `start` at step 0 to `stop` at step `steps`, constant afterwards.

    The usual warm-up of a margin (0 -> m): large angular margins from the first step can keep a fresh network from
    converging at all.

    Raises:
        TypeError, ValueError: start, stop or steps is not a finite number, or steps < 0.
    """

    start: float
    stop: float
    steps: int

    def __post_init__(self) -> None:
        check_finite(self)
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")

    def __call__(self, step: int) -> float:
        check_number("step", step, "a finite number")
        if step >= self.steps:
            return self.stop
        return self.start + (self.stop - self.start) * max(step, 0) / self.steps


@dataclass(frozen=True)
class Annealing:
    """lambda = max(minimum, base (1 + gamma step)^(-power)): the annealing of L-Softmax and SphereFace.

    Published settings: SphereFace base 1000, gamma 0.12, power 1, minimum 5 (the defaults here);
    L-Softmax base 1000, gamma 2.5e-5, power 35, minimum 0.

    Raises:
        TypeError, ValueError: one of the four is not a finite number >= 0.
    """

    base: float = 1000.0
    gamma: float = 0.12
    power: float = 1.0
    minimum: float = 5.0

    def __post_init__(self) -> None:
        check_finite(self)
        if min(self.base, self.gamma, self.power, self.minimum) < 0:
            raise ValueError(f"base, gamma, power and minimum must be >= 0, got {self}")

    def __call__(self, step: int) -> float:
        check_number("step", step, "a finite number")
        return max(self.minimum, self.base * (1.0 + self.gamma * max(step, 0)) ** (-self.power))


def check_finite(schedule: WarmUp | Annealing) -> None:
    for field in fields(schedule):
        name, value = f"{type(schedule).__name__}: {field.name}", getattr(schedule, field.name)
        check_number(name, value, "a finite number")
