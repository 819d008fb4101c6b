"""pytorch-metric-learning's ArcFaceLoss."""

from __future__ import annotations

import math

import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from torch import Tensor

from perf.problem import MARGIN, SCALE, Problem, Tensors
from perf.providers.base import Provider


class MetricLearning(Provider):
    name, title = "pml", "pytorch-metric-learning ArcFaceLoss"
    logits_copies = 6

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        self.head = ArcFaceLoss(problem.classes, problem.d, margin=math.degrees(MARGIN), scale=SCALE)
        self.head.to(problem.device, problem.torch_dtype)
        with torch.no_grad():
            self.head.W.copy_(tensors.weight.t())  # [D, C], its own layout
        self.weight = self.head.W

    def forward(self) -> Tensor:
        return self.head(self.x, self.target)


PROVIDERS = (MetricLearning,)
