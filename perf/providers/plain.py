"""Plain torch code with full logits, as its users write it; and the baseline, a product without a loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.providers.base import STEP, WHOLE, Provider
from perf.suite.problem import MARGINS, MOMENTUM, SAMPLE_RATE, SCALE, Problem, Tensors

BUFFER = 1 << 17  # classes of the baseline at a time: the buffer is larger than any cache and still not N x C


def plain_loss(x: Tensor, weight: Tensor, target: Tensor, loss: str = "arcface", reduction: str = "mean") -> Tensor:
    """As training repositories write it, in its better form: no arccos, no one-hot mask, float32 logits."""
    if loss == "softmax":
        return F.cross_entropy(F.linear(x, weight).float(), target, reduction=reduction)
    cos = F.linear(F.normalize(x), F.normalize(weight)).float().clamp(-1.0, 1.0)
    own, m = cos.gather(1, target[:, None]), MARGINS[loss]
    if loss == "cosface":
        lowered = own - m
    else:
        sine = (1.0 - own * own).clamp(min=1e-9).sqrt()
        lowered = own * math.cos(m) - sine * math.sin(m)
        lowered = torch.where(own > -math.cos(m), lowered, own - m * math.sin(m))
    return F.cross_entropy(SCALE * cos.scatter(1, target[:, None], lowered), target, reduction=reduction)


class Plain(Provider):
    name, title, losses = "plain", "full logits, plain code", ("arcface", "cosface", "softmax")
    loss_of = staticmethod(plain_loss)

    def forward(self) -> Tensor:
        return self.loss_of(self.x, self.weight, self.target, self.problem.loss)


class Compiled(Plain):
    """The usual code, fused as far as Inductor does."""

    name, title = "plain-compiled", "full logits, plain code, torch.compile"
    compiles = True

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        torch.compiler.reset()
        self.loss_of = torch.compile(plain_loss)


class PlainSampled(Provider):
    """Partial FC as training repositories write it: the sampled rows gathered, full logits of them, rows put back."""

    name, title = "plain-sampled", "full logits of a tenth of the classes, plain code"
    losses, work = Plain.losses, "sampled"
    dense_gradient = False
    modes = ("forward", STEP, WHOLE)

    def forward(self) -> Tensor:
        """Positives always, then the classes with the largest random numbers."""
        with torch.no_grad():
            drawn = torch.rand(self.problem.classes, device=self.target.device)
            drawn[self.target] = 2.0
            self.ids = drawn.topk(int(SAMPLE_RATE * self.problem.classes)).indices.sort().values
        self.rows = self.weight.detach()[self.ids].requires_grad_(self.weight.requires_grad)
        return plain_loss(self.x, self.rows, torch.searchsorted(self.ids, self.target), self.problem.loss)

    def update(self) -> None:
        rows = torch.nn.Parameter(self.rows.detach())
        rows.grad = self.rows.grad
        optimizer = torch.optim.SGD([rows], lr=0.0, momentum=MOMENTUM)
        if self.momentum is None:
            self.momentum = torch.zeros_like(self.weight)
        optimizer.state[rows]["momentum_buffer"] = self.momentum[self.ids]
        optimizer.step()
        self.weight.detach()[self.ids] = rows.detach()
        self.momentum[self.ids] = optimizer.state[rows]["momentum_buffer"]

    def weight_gradient(self) -> Tensor:
        return torch.zeros_like(self.weight).index_copy(0, self.ids, self.rows.grad)

    def class_ids(self) -> Tensor | None:
        return self.ids


class InsightFace(Provider):
    """The formulas of arcface_torch, since 2022-12, around a linear layer.

    Its ArcFace turns all logits into angles and back under no_grad, so the gradient of the target's logit is that of
    its cosine: another loss than ArcFace's derivative ("arcface-straight-through").
    """

    name, title, losses = "insightface", "insightface's formulas", ("arcface-straight-through", "cosface")

    def forward(self) -> Tensor:
        logits = F.linear(F.normalize(self.x), F.normalize(self.weight)).float().clamp(-1.0, 1.0)
        own, m = (torch.arange(len(self.target), device=self.target.device), self.target), MARGINS[self.problem.loss]
        if self.problem.loss == "cosface":
            logits[own] -= m
        else:
            with torch.no_grad():
                logits.arccos_()
                logits[own] += m
                logits.cos_()
        return F.cross_entropy(SCALE * logits, self.target)


class Gemm(Provider):
    """The baseline: one N x D x C product into a buffer that exists."""

    name, title = "gemm", "one N x D x C GEMM"
    modes = ("no-grad",)

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        shape = problem.n, min(problem.classes, BUFFER)
        self.out = torch.zeros(shape, dtype=problem.torch_dtype, device=problem.device)  # written, so it is there

    def forward(self) -> Tensor:
        for rows in self.weight.detach().split(BUFFER):
            torch.mm(self.x, rows.t(), out=self.out[:, : len(rows)])
        return self.out
