"""The usual code with full logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.problem import MOMENTUM, SAMPLE_RATE, SCALE, Problem, Tensors, cosine_of_margin
from perf.providers.base import WHOLE, Gradients, Provider


def plain_loss(
    x: Tensor, weight: Tensor, target: Tensor, loss: str, margin: tuple[float, float, float]
) -> Tensor:  # margin: cos m, sin m, m
    """As training repositories write it, in its better form: no arccos, no one-hot mask, float32 logits."""
    if loss == "softmax":
        return F.cross_entropy(F.linear(x, weight).float(), target)
    cos = F.linear(F.normalize(x), F.normalize(weight)).float().clamp(-1.0, 1.0)
    own = cos.gather(1, target[:, None])
    cos_m, sin_m, m = margin
    if loss == "cosface":
        lowered = own - m
    else:
        sine = (1.0 - own * own).clamp(min=1e-9).sqrt()
        lowered = own * cos_m - sine * sin_m
        lowered = torch.where(own > -cos_m, lowered, own - m * sin_m)
    return F.cross_entropy(SCALE * cos.scatter(1, target[:, None], lowered), target)


class Plain(Provider):
    name, title, losses = "plain", "full logits, plain code", ("arcface", "cosface", "softmax")

    def forward(self) -> Tensor:
        loss = self.problem.loss
        return plain_loss(self.x, self.weight, self.target, loss, cosine_of_margin(loss))


class Compiled(Plain):
    """The usual code, fused as far as Inductor does."""

    name, title = "plain-compiled", "full logits, plain code, torch.compile"
    compiles = True

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        torch.compiler.reset()
        self.compiled = torch.compile(plain_loss)
        self.numbers = cosine_of_margin(problem.loss)

    def forward(self) -> Tensor:
        return self.compiled(self.x, self.weight, self.target, self.problem.loss, self.numbers)


class PlainSampled(Provider):
    """Partial FC as training repositories write it: the sampled rows gathered, full logits of them, rows put back."""

    name, title = "plain-sampled", "full logits of a tenth of the classes, plain code"
    losses, work = Plain.losses, "sampled"
    dense_gradient = False
    modes = ("forward", "forward+backward", WHOLE)

    def supports(self, problem: Problem) -> str | None:
        if SAMPLE_RATE * problem.classes <= problem.n:
            return "the batch has as many classes as the sample"
        return super().supports(problem)

    def forward(self) -> Tensor:
        """Positives always, then the classes with the largest random numbers."""
        classes, count = self.problem.classes, int(SAMPLE_RATE * self.problem.classes)
        with torch.no_grad():
            drawn = torch.rand(classes, device=self.target.device)
            drawn[self.target] = 2.0
            self.ids = drawn.topk(count).indices.sort().values
        self.rows = self.weight.detach()[self.ids].requires_grad_(self.weight.requires_grad)
        own, loss = torch.searchsorted(self.ids, self.target), self.problem.loss
        return plain_loss(self.x, self.rows, own, loss, cosine_of_margin(loss))

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

    def gradients(self) -> Gradients:
        self.reset("forward+backward")
        loss = self.run("forward+backward")
        dense = torch.zeros_like(self.weight)
        assert self.rows.grad is not None
        assert self.x.grad is not None
        dense[self.ids] = self.rows.grad
        return Gradients(loss, self.x.grad, dense, self.ids)


PROVIDERS = (Plain, Compiled, PlainSampled)
