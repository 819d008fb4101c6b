"""Fused kernels of others, for plain softmax, where they are installed: they need a GPU."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from perf.problem import Problem, Tensors
from perf.providers.base import STEP, WHOLE, Provider


class OnGpu(Provider):
    losses = ("softmax",)
    modes = (STEP, WHOLE)
    package: str

    def supports(self, problem: Problem) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return super().supports(problem) if problem.device.startswith("cuda") else "needs a GPU"


class Liger(OnGpu):
    name, title, package = "liger", "Liger-Kernel fused linear cross-entropy", "liger_kernel"

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        self.apply = LigerFusedLinearCrossEntropyFunction.apply

    def forward(self) -> Tensor:
        found = self.apply(self.x, self.weight, self.target)
        return found[0] if isinstance(found, tuple) else found


class CutCrossEntropy(OnGpu):
    name, title, package = "cce", "Cut Cross-Entropy", "cut_cross_entropy"
    dtypes = ("bfloat16", "float16")

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        from cut_cross_entropy import linear_cross_entropy

        self.apply = linear_cross_entropy

    def forward(self) -> Tensor:
        return self.apply(self.x, self.weight, self.target)


class Quack(OnGpu):
    name, title, package = "quack", "quack's chunked linear cross-entropy", "quack"
    dtypes = ("bfloat16", "float16")

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        self.apply = chunked_linear_cross_entropy

    def forward(self) -> Tensor:
        return self.apply(self.x, self.weight, self.target)


PROVIDERS = (Liger, CutCrossEntropy, Quack)
