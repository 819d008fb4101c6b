"""Fused kernels of others, for plain softmax, where they are installed: they need a GPU."""

import importlib

from torch import Tensor

from perf.providers.base import STEP, WHOLE, Provider
from perf.suite.problem import Problem, Tensors


class OnGpu(Provider):
    losses = ("softmax",)
    modes = (STEP, WHOLE)
    module: str
    function: str

    def supports(self, problem: Problem) -> str:
        return super().supports(problem) or ("" if problem.on_gpu else "needs a GPU")

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        found = getattr(importlib.import_module(self.module), self.function)
        self.apply = getattr(found, "apply", found)

    def forward(self) -> Tensor:
        found = self.apply(self.x, self.weight, self.target)
        return found[0] if isinstance(found, tuple) else found


class Liger(OnGpu):
    name, title = "liger", "Liger-Kernel fused linear cross-entropy"
    package, module = "liger_kernel", "liger_kernel.ops.fused_linear_cross_entropy"
    function = "LigerFusedLinearCrossEntropyFunction"


class CutCrossEntropy(OnGpu):
    name, title = "cce", "Cut Cross-Entropy"
    package = module = "cut_cross_entropy"
    function = "linear_cross_entropy"
    dtypes = ("bfloat16", "float16")


class Quack(OnGpu):
    name, title = "quack", "quack's chunked linear cross-entropy"
    package, module = "quack", "quack.linear_cross_entropy"
    function = "chunked_linear_cross_entropy"
    dtypes = ("bfloat16", "float16")
