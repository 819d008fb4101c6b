"""A head of your own beside the others: make perf ARGS="--provider examples/my_head.py:MyHead --losses cosface".

perf/providers/base.py says what the class needs. Its loss and gradients are checked against float64 first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class MyHead:
    """AM-Softmax (CosFace) in plain torch, with the margin 0.4 and the scale 64 of the suite."""

    name, losses, dtypes = "my-head", ("cosface",), ("float32", "bfloat16")

    def make(self, problem, x: Tensor, weight: Tensor, target: Tensor) -> None:
        self.x, self.weight, self.target = x, weight, target
        self.margins = 0.4 * F.one_hot(target, problem.classes)

    def step(self) -> Tensor:
        cosines = F.linear(F.normalize(self.x), F.normalize(self.weight)).float()
        return F.cross_entropy(64.0 * (cosines - self.margins), self.target)
