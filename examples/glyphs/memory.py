"""Peak memory of the head in one training step, beside the same loss written with full logits. Both are measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import tritonmargin as tm
from examples.glyphs.network import EMBEDDING_DIM, autocast
from examples.glyphs.recipes import Settings
from perf.suite.memory import allocations, peak_without


def compare(settings: Settings, classes: int, retain_bytes: int) -> dict[str, float]:
    """Bytes at the peak of forward and backward, on top of the weights and the embeddings that exist before."""
    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(settings.batch, EMBEDDING_DIM, generator=random, requires_grad=True)
    target = torch.randint(classes, (settings.batch,), generator=random)
    head = tm.MarginSoftmaxLoss(EMBEDDING_DIM, classes, settings.recipe.margin(settings.loss))
    leaves = [embeddings, head.weight]
    numbers: dict[str, float] = {"batch": settings.batch, "classes": classes, "retain_bytes": retain_bytes}
    numbers["gradient_of_the_weight"] = classes * EMBEDDING_DIM * 4  # part of both
    numbers["one_copy_of_the_logits"] = settings.batch * classes * 4
    numbers["head"] = peak(lambda: head(embeddings, target), leaves)
    head.retain_bytes = retain_bytes
    numbers["head_retaining"] = peak(lambda: head(embeddings, target), leaves)
    numbers["full_logits"] = peak(lambda: full_logits(embeddings, head.weight, target, settings), leaves)
    return numbers


def full_logits(x: Tensor, weight: Tensor, target: Tensor, settings: Settings) -> Tensor:
    """The usual code: all logits, the margin on one column of them, cross_entropy."""
    if settings.loss == "softmax":
        return F.cross_entropy(F.linear(x, weight), target)
    recipe = settings.recipe
    cos = F.linear(F.normalize(x), F.normalize(weight)).float()
    own = cos.gather(1, target[:, None]).clamp(-1.0 + 1e-6, 1.0 - 1e-6)
    lowered = torch.cos(torch.acos(own) + recipe.m) if settings.loss == "arcface" else own - recipe.m
    return F.cross_entropy(recipe.s * cos.scatter(1, target[:, None], lowered), target)


def peak(loss: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """The most bytes that tensors made by forward and backward hold at one time, from the profiler's memory events."""

    def step() -> None:
        with autocast():
            value = loss()
        value.backward()

    step()  # unrecorded: the first call makes things that later ones find
    for leaf in leaves:
        leaf.grad = None
    return peak_without(allocations(step), 0)
