"""What a competitor is: a subclass of `Provider`, or a small class of your own in any file (examples/my_head.py).

Yours has a `name` without ':' and ',', `losses` (perf.suite.problem.margin_of has their numbers), and where it likes
`dtypes` (else float32, bfloat16, float16) and a `title` for tables. `make(problem, x, weight, target)` is called once a
size and keeps these tensors; `step()` is the forward pass and returns the loss, a scalar. x [N, D] and weight [C, D]
are leaves that record gradients, target [N] is int64. The suite calls backward, sets the gradients to None between
steps, and checks loss and gradients against float64 first, like everyone's.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from perf.suite.problem import MOMENTUM, SAMPLE_RATE, Problem, Tensors

STEP, WHOLE = "forward+backward", "whole step"
GRAPH, WHOLE_GRAPH = "forward+backward, CUDA graph", "whole step, CUDA graph"
GRAPHS = {GRAPH: STEP, WHOLE_GRAPH: WHOLE}  # on a GPU: the step is captured once and replayed
# What is timed. "forward" records for a backward that does not come; "frozen W" is forward and backward without dW;
# "whole step" is forward, backward and the update of W by SGD with momentum.
MODES = ("no-grad", "forward", STEP, "frozen W", WHOLE, *GRAPHS)


class Provider(ABC):
    """One implementation. `prepare` once, then for every step `reset` and `run` a mode."""

    name: ClassVar[str]  # in CSVs and on the command line
    title: ClassVar[str]  # in tables
    losses: ClassVar[tuple[str, ...]] = ()  # () for what has no loss
    work: ClassVar[str] = "all classes"  # only equal work is compared; "sampled" takes a tenth of the classes
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16", "tf32")
    modes: ClassVar[tuple[str, ...]] = MODES
    dense_gradient: ClassVar[bool] = True  # whether a step makes C x D numbers of it
    compiles: ClassVar[bool] = False  # whether its first step of a size takes long
    weight_is_transposed: ClassVar[bool] = False  # [D, C]; `weight_gradient()` is [C, D] all the same
    options: ClassVar[dict[str, Any]] = {}  # and their defaults: `name:option=value` on the command line
    package: ClassVar[str] = ""  # that has to be installed
    source: ClassVar[str] = ""  # file.py:Class of a head of your own

    def __init__(self, **options: Any) -> None:
        self.chosen = {**self.options, **options}

    @classmethod
    def missing(cls) -> str:
        """What it needs and is not there, in words."""
        return f"{cls.package} is not installed" if cls.package and find_spec(cls.package) is None else ""

    def supports(self, problem: Problem) -> str:
        """Why not, or nothing if it can run; a plan asks only for the losses, dtypes and modes that it has."""
        if self.work == "sampled" and self.chosen.get("rate", SAMPLE_RATE) * problem.classes <= problem.n:
            return "the batch has as many classes as the sample"
        return self.missing()

    def gradient_bytes(self, mode: str) -> int:
        """Of the gradient of W that a step leaves in this process."""
        return self.problem.weight_bytes if self.dense_gradient and mode in (STEP, WHOLE) else 0

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        """Make what does not belong to a step."""
        self.problem = problem
        self.x, self.weight, self.target, self.momentum = tensors
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

    def checked_step(self) -> Tensor:
        """One step, to be compared with float64; its loss. The gradients stay."""
        mode = STEP if STEP in self.modes else WHOLE
        self.reset(mode)
        return self.run(mode)

    def weight_gradient(self) -> Tensor:
        """Of the last step, [C, D], dense."""
        grad = self.weight.grad
        return grad.to_dense() if grad.is_sparse else grad

    def class_ids(self) -> Tensor | None:
        """The classes of the last step, None for all."""
        return None


class OwnHead(Provider):
    """Somebody's own class, as above, in the terms of the suite; `kind` is that class."""

    kind: ClassVar[type]

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        self.head = self.kind()
        self.head.make(problem, self.x, self.weight, self.target)

    def forward(self) -> Tensor:
        loss = self.head.step()
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{self.name}: step() must return the loss, a scalar tensor, and returned {got}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(f"{self.name}: its loss has no gradient; compute it from the x and weight given to make()")
        return loss

    def weight_gradient(self) -> Tensor:
        if self.x.grad is None or self.weight.grad is None:
            raise ValueError(f"{self.name}: x or weight got no gradient; use the tensors given to make(), not copies")
        return self.weight.grad
