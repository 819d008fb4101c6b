"""pytorch-metric-learning."""

import math

import torch
from torch import Tensor

from perf.providers.base import Provider
from perf.suite.problem import MARGINS, SCALE, Problem, Tensors


class MetricLearning(Provider):
    name, title, losses = "pml", "pytorch-metric-learning", ("arcface", "cosface")
    weight_is_transposed, package = True, "pytorch_metric_learning"

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss

        super().prepare(problem, tensors)
        m = MARGINS[problem.loss]
        kind, margin = (ArcFaceLoss, math.degrees(m)) if problem.loss == "arcface" else (CosFaceLoss, m)
        with torch.device("meta"):
            self.head = kind(problem.classes, problem.d, margin=margin, scale=SCALE)
        # [D, C], its own layout, so a copy.
        self.weight = self.head.W = torch.nn.Parameter(tensors.weight.detach().t().contiguous())
        self.momentum = None if tensors.momentum is None else tensors.momentum.view(problem.d, problem.classes)

    def forward(self) -> Tensor:
        return self.head(self.x, self.target)

    def weight_gradient(self) -> Tensor:
        return super().weight_gradient().t()
