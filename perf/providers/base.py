"""What a competitor has to say for itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from perf.problem import MOMENTUM, Problem, Tensors

STEP, WHOLE = "forward+backward", "whole step"
# What is timed. "forward" records for a backward that does not come; "frozen W" is forward and backward without dW;
# "whole step" is forward, backward and the update of W by SGD with momentum.
MODES = ("no-grad", "forward", STEP, "frozen W", WHOLE)


class Gradients(NamedTuple):
    """What is compared with float64."""

    loss: Tensor  # []
    x: Tensor  # [N, D]
    weight: Tensor  # [C, D], dense
    class_ids: Tensor | None  # the classes that took part; None: all


class Provider(ABC):
    """One implementation. `prepare` once, then for every step `reset` and `run` a mode."""

    name: ClassVar[str]  # in CSVs and on the command line
    title: ClassVar[str]  # in tables
    losses: ClassVar[tuple[str, ...]] = ()  # () for what has no loss
    work: ClassVar[str] = "all classes"  # only equal work is compared; "sampled" walks a tenth of the classes
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    modes: ClassVar[tuple[str, ...]] = MODES
    dense_gradient: ClassVar[bool] = True  # whether a step makes C x D numbers of it
    compiles: ClassVar[bool] = False  # whether its first step of a size takes long
    weight_is_transposed: ClassVar[bool] = False  # [D, C]; `weight_gradient` is [C, D] all the same
    options: ClassVar[dict[str, Any]] = {}  # and their defaults: `name:option=value` on the command line

    def __init__(self, **options: Any) -> None:
        self.chosen = {**self.options, **options}

    def supports(self, problem: Problem) -> str | None:
        """Why not, or None if it can run."""
        if self.losses and problem.loss not in self.losses:
            return f"no {problem.loss}"
        return None if problem.dtype in self.dtypes else f"no {problem.dtype}"

    def gradient_bytes(self, mode: str) -> int:
        """Of the gradient of W that a step leaves in this process."""
        return self.problem.weight_bytes if self.dense_gradient and mode in (STEP, WHOLE) else 0

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        """Make what does not belong to a step."""
        self.problem = problem
        self.x, self.weight, self.target, self.momentum, _ = tensors
        self.optimizer: torch.optim.Optimizer | None = None

    @abstractmethod
    def forward(self) -> Tensor:
        """The loss."""

    def run(self, mode: str) -> Tensor:
        """One step as `mode` says; the loss."""
        with torch.no_grad() if mode == "no-grad" else nullcontext():
            loss = self.forward()
        if mode in (STEP, "frozen W", WHOLE):
            loss.backward()
            loss = loss.detach()
        if mode == WHOLE:
            self.update()
        return loss

    def update(self) -> None:
        """W by its gradient. The learning rate is 0, so that every round meets the same W; the work is the same."""
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD([self.weight], lr=0.0, momentum=MOMENTUM)
            if self.momentum is not None:
                self.optimizer.state[self.weight]["momentum_buffer"] = self.momentum
        self.optimizer.step()

    def reset(self, mode: str) -> None:
        """Before a step and not part of it: no gradients, and the weight frozen or not."""
        self.x.grad = self.weight.grad = None
        self.weight.requires_grad_(mode != "frozen W")

    def gradients(self) -> Gradients:
        """Of one step, as they come."""
        mode = STEP if STEP in self.modes else WHOLE
        self.reset(mode)
        loss = self.run(mode)
        assert self.x.grad is not None
        return Gradients(loss, self.x.grad, self.weight_gradient(), self.class_ids())

    def weight_gradient(self) -> Tensor:
        """Of the last step, [C, D]."""
        grad = self.weight.grad
        assert grad is not None
        return grad.to_dense() if grad.is_sparse else grad

    def class_ids(self) -> Tensor | None:
        """The classes of the last step, None for all."""
        return None

    def close(self) -> None:  # noqa: B027  most have nothing to do
        """Let go of processes."""
