"""A head behind a little backbone, one step of it, and when two steps are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS, ONE_CHUNK, labels, made
from torch import Tensor, nn

import tritonmargin as tm

CLASSES = 2 * ONE_CHUNK + 3
N, WIDTH, D = 12, 5, 7

# Heads that take different ways through the library.
HEADS: dict[str, Callable[[], dict[str, Any]]] = {
    "bounded": lambda: {"margin": tm.ArcFace(m=0.4, s=16.0)},
    "smoothed, with a bias and retained logits": lambda: {
        "margin": tm.LSoftmax(m=3, lam=1.0), "bias": True, "label_smoothing": 0.1, "retain_bytes": 10**6,
        "class_weight": made(CLASSES, seed=5).abs().float(),
    },
    "hinge": lambda: {"margin": tm.CosFace(s=200.0), "objective": "hinge", "reduction": "sum"},
    "max-hinge with sparse gradients": lambda: {
        "margin": tm.ASoftmax(m=2), "objective": "max-hinge", "sparse_grad": True
    },
}  # fmt: skip
every_head = pytest.mark.parametrize("kind", HEADS)


class Network(nn.Module):
    """The same numbers every time, with a little backbone."""

    def __init__(self, kind: str = "bounded", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, D)
        self.head = tm.MarginSoftmaxLoss(D, CLASSES, **HEADS[kind](), chunk_bytes=1, **options)
        nn.init.normal_(self.head.weight, std=0.5)
        if self.head.bias is not None:
            nn.init.normal_(self.head.bias)

    def forward(self, x: Tensor, y: Tensor, class_ids: Tensor | None = None) -> Tensor:
        return self.head(self.layer(x), y, class_ids)


def batch(dtype: torch.dtype = torch.float32, n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One of the samples is ignored."""
    y = labels(CLASSES, n, seed)
    y[1] = -100
    return made(n, WIDTH, seed=seed).to(dtype), y


def step(call: Callable[..., Tensor], network: nn.Module, *given: Any, backend: str | None = None) -> dict[str, Tensor]:
    """The loss and the gradients of the network's parameters by name."""
    network.zero_grad()
    with tm.use_backend(backend or BACKENDS[0]):
        loss = call(*given)
        loss.backward()
    grads = {name: dense(each.grad) for name, each in network.named_parameters()}
    network.zero_grad()
    return {"loss": loss.detach(), **grads}


def dense(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to_dense()


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """But for the order of sums."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        size = float(value.abs().max())
        torch.testing.assert_close(
            ours[name], value, rtol=1e-5, atol=1e-5 * size, msg=lambda why, of=name: f"{of}: {why}"
        )
