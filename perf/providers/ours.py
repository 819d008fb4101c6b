"""tritonmargin."""

from typing import ClassVar

import torch
from torch import Tensor, nn

import tritonmargin as tm
from perf.providers.base import GRAPH, STEP, WHOLE, WHOLE_GRAPH, Provider
from perf.suite.problem import LOSSES, MOMENTUM, SAMPLE_RATE, Problem, Tensors, margin_of

COMMON = {"chunk_bytes": None, "retain": 0.0}


class Ours(Provider):
    """The functions as they come. `retain`: the part of the logits retained; `chunk_bytes`: as in the functions."""

    name, title, losses = "ours", "tritonmargin", LOSSES
    options: ClassVar = COMMON

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        self.margin = margin_of(problem.loss)
        logits = problem.n * problem.classes * problem.torch_dtype.itemsize
        self.how = {"chunk_bytes": self.chosen["chunk_bytes"], "retain_bytes": int(self.chosen["retain"] * logits)}

    def forward(self) -> Tensor:
        return tm.margin_cross_entropy(self.x, self.weight, self.target, self.margin, **self.how)


class Retaining(Ours):
    """All logits retained from forward to backward: N x C once, in the compute dtype."""

    name, title = "ours-retain", "tritonmargin, all logits retained"
    modes = (STEP, WHOLE, GRAPH, WHOLE_GRAPH)
    options: ClassVar = {**COMMON, "retain": 1.0}


class Head(Provider):
    """The module, with its rows updated in backward."""

    losses = LOSSES
    dense_gradient = False

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        rate = float(self.chosen.get("rate", 1.0))
        how = {"sample_rate": rate, "sparse_grad": rate < 1.0}
        with torch.device("meta"):  # no second weight
            self.head = tm.MarginSoftmaxLoss(problem.d, problem.classes, margin_of(problem.loss), **how)
        self.head.margin.to_empty(device=problem.device)
        self.weight = self.head.weight = nn.Parameter(tensors.weight.detach())
        if self.head.sampler is not None:
            self.head.sampler = torch.tensor([self.head.seed, 0], device=problem.device)
        self.head.mark_rows()
        # The state in the weight's dtype, as torch.optim.SGD has it.
        self.rows = tm.optim.RowSGD([self.weight], lr=0.0, momentum=MOMENTUM, state_dtype=problem.torch_dtype)
        if tensors.momentum is not None:
            self.rows.state[self.weight] = {"step": torch.tensor(0), "momentum_buffer": tensors.momentum}
        self.in_backward = False

    def forward(self) -> Tensor:
        return self.head(self.x, self.target)

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
    modes = (WHOLE, WHOLE_GRAPH)

    def checked_step(self) -> Tensor:
        """The update by one step of SGD with lr = 1 is the gradient; on a copy, as W is shared."""
        own = self.weight.detach().clone().requires_grad_()
        self.prepare(self.problem, Tensors(self.x, own, self.target))
        self.rows.param_groups[0].update(lr=1.0, momentum=0.0)
        self.before = own.detach().clone()
        return super().checked_step()

    def weight_gradient(self) -> Tensor:
        return self.before - self.weight.detach()


class Sampled(Head):
    """Partial FC: a tenth of the classes, other ones every step, their rows updated in backward."""

    name, title, work = "ours-sampled", "tritonmargin, a tenth of the classes", "sampled"
    modes = ("forward", STEP, WHOLE, WHOLE_GRAPH)
    options: ClassVar = {"rate": SAMPLE_RATE}

    def gradient_bytes(self, mode: str) -> int:
        rows = round(self.chosen["rate"] * self.problem.classes)
        return rows * self.weight[:1].nbytes if mode == STEP else 0

    def class_ids(self) -> Tensor | None:
        return self.weight.grad.coalesce().indices()[0]
