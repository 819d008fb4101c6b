"""tritonmargin."""

from __future__ import annotations

from torch import Tensor

import tritonmargin as tm
from perf.problem import MARGIN, SCALE, Problem, Tensors
from perf.providers.base import Provider


class Ours(Provider):
    name, title = "ours", "tritonmargin"
    retain = False

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        self.margin = tm.ArcFace(m=MARGIN, s=SCALE)
        self.retain_bytes = problem.n * problem.classes * problem.itemsize if self.retain else 0

    def forward(self) -> Tensor:
        loss = tm.margin_cross_entropy(self.x, self.weight, self.target, self.margin, retain_bytes=self.retain_bytes)
        assert isinstance(loss, Tensor)
        return loss


class OursRetaining(Ours):
    """Everything kept from forward to backward: N x C once, in the compute dtype."""

    name, title, peer = "ours-retain", "tritonmargin, all retained", "ours-retain"
    modes = ("forward+backward",)
    logits_copies = 1
    retain = True


class OursLinear(Provider):
    """No margin, nothing normalised: beside `F.linear_cross_entropy`."""

    name, title, peer = "ours-linear", "tm.linear_cross_entropy (no margin)", "ours-linear"
    loss = "softmax"

    def forward(self) -> Tensor:
        return tm.linear_cross_entropy(self.x, self.weight, self.target)


PROVIDERS = (Ours, OursRetaining, OursLinear)
