"""tritonmargin."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import tritonmargin as tm
from perf.problem import LOSSES, MOMENTUM, SAMPLE_RATE, Problem, Tensors, margin_of
from perf.providers.base import STEP, WHOLE, Provider

COMMON = {"chunk_bytes": None, "retain": 0.0}


class Ours(Provider):
    """The functions as they come. `retain`: the part of the logits that is kept; `chunk_bytes`: as in the functions."""

    name, title, losses = "ours", "tritonmargin", LOSSES
    options: ClassVar = COMMON

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        self.margin = margin_of(problem.loss)
        logits = problem.n * problem.classes * problem.itemsize
        self.how: dict[str, Any] = {
            "chunk_bytes": self.chosen["chunk_bytes"], "retain_bytes": int(self.chosen["retain"] * logits),
        }  # fmt: skip

    def forward(self) -> Tensor:
        loss = tm.margin_cross_entropy(self.x, self.weight, self.target, self.margin, **self.how)
        assert isinstance(loss, Tensor)
        return loss


class Retaining(Ours):
    """Everything kept from forward to backward: N x C once, in the compute dtype."""

    name, title = "ours-retain", "tritonmargin, all logits retained"
    modes = (STEP, WHOLE)
    options: ClassVar = {**COMMON, "retain": 1.0}


class WithoutKernels(Ours):
    """The torch backend on a GPU: what the Triton kernels have to be faster than."""

    name, title = "ours-torch", "tritonmargin, torch backend"

    def supports(self, problem: Problem) -> str | None:
        if problem.device == "cpu":
            return "on a CPU ours is that"
        return super().supports(problem)

    def forward(self) -> Tensor:
        with tm.use_backend("torch"):
            return super().forward()


class Compiled(Ours):
    """The functions under torch.compile: the small operations around the kernels become a few."""

    name, title = "ours-compiled", "tritonmargin, torch.compile"
    compiles = True

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        torch.compiler.reset()
        self.compiled = torch.compile(tm.margin_cross_entropy)

    def forward(self) -> Tensor:
        loss = self.compiled(self.x, self.weight, self.target, self.margin, **self.how)
        assert isinstance(loss, Tensor)
        return loss


class Head(Provider):
    """The module, with its rows updated in backward."""

    losses = LOSSES
    dense_gradient = False

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        rate = self.sample_rate
        self.head = head_of(problem, tensors.weight, sample_rate=rate, sparse_grad=rate < 1.0)
        self.weight = self.head.weight
        # The state in the weight's dtype, as torch.optim.SGD has it.
        self.rows = tm.optim.RowSGD([self.weight], lr=0.0, momentum=MOMENTUM, state_dtype=problem.torch_dtype)
        if tensors.momentum is not None:
            self.rows.state[self.weight] = {"step": torch.tensor(0), "momentum_buffer": tensors.momentum}
        self.in_backward = False

    @property
    def sample_rate(self) -> float:
        return float(self.chosen.get("rate", 1.0))

    def forward(self) -> Tensor:
        loss = self.head(self.x, self.target)
        assert isinstance(loss, Tensor)
        return loss

    def reset(self, mode: str) -> None:
        if mode == WHOLE and not self.in_backward:
            self.head.update_in_backward(self.rows)
            self.in_backward = True
        super().reset(mode)

    def update(self) -> None:
        self.rows.step()


class InBackward(Head):
    """The update of a chunk's rows as soon as their gradient is there: the C x D gradient never exists."""

    name, title = "ours-in-backward", "tritonmargin, W updated in backward"
    modes = (WHOLE,)

    def gradients(self) -> Any:
        """The update by one step of SGD with lr = 1 is the gradient; on a copy, as W is shared."""
        own = self.weight.detach().clone().requires_grad_()
        self.prepare(self.problem, Tensors(self.x, own, self.target))
        self.rows.param_groups[0].update(lr=1.0, momentum=0.0)
        self.before = own.detach().clone()
        return super().gradients()

    def weight_gradient(self) -> Tensor:
        return self.before - self.weight.detach()


class Sampled(Head):
    """Partial FC: a tenth of the classes, other ones every step, their rows updated in backward."""

    name, title, work = "ours-sampled", "tritonmargin, a tenth of the classes", "sampled"
    modes = ("forward", STEP, WHOLE)
    options: ClassVar = {"rate": SAMPLE_RATE}

    def supports(self, problem: Problem) -> str | None:
        if self.sample_rate * problem.classes <= problem.n:
            return "the batch has as many classes as the sample"
        return super().supports(problem)

    def gradient_bytes(self, mode: str) -> int:
        rows = round(self.sample_rate * self.problem.classes)
        return rows * self.weight[:1].nbytes if mode == STEP else 0

    def class_ids(self) -> Tensor | None:
        grad = self.weight.grad
        assert grad is not None
        return grad.coalesce().indices()[0]


def head_of(problem: Problem, weight: Tensor, **options: Any) -> tm.MarginSoftmaxLoss:
    """A head around rows that exist."""
    with torch.device("meta"):  # no second weight
        head = tm.MarginSoftmaxLoss(problem.d, problem.classes, margin_of(problem.loss), **options)
    head.margin.to_empty(device=problem.device)
    head.weight = nn.Parameter(weight.detach())
    if head.sampler is not None:
        head.sampler = torch.tensor([head.seed, 0], device=problem.device)
    head.mark_rows()
    return head


PROVIDERS = (Ours, Retaining, WithoutKernels, Compiled, InBackward, Sampled)
