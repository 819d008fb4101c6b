"""One size to measure at, and its tensors."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import tritonmargin as tm

# As the command line names them. "tf32": float32 tensors whose products torch rounds to TF32, on a GPU alone.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64", "tf32": "tf32"}
SCALE, SAMPLE_RATE, MOMENTUM = 64.0, 0.1, 0.9
MARGINS = {"arcface": 0.5, "cosface": 0.4, "arcface-straight-through": 0.5}  # m of the face recipes
LOSSES = (*MARGINS, "softmax")  # what is computed: providers of one loss agree in its value and its gradients


def margin_of(loss: str) -> tm.Margin:
    if loss == "softmax":
        return tm.Softmax()
    if loss == "cosface":
        return tm.CosFace(m=MARGINS[loss], s=SCALE)
    # The second is what insightface's current code trains.
    how = {"beyond_pi": "raw", "gradient": "straight-through"} if loss == "arcface-straight-through" else {}
    return tm.ArcFace(m=MARGINS[loss], s=SCALE, **how)


class Tensors(NamedTuple):
    x: Tensor  # [N, D]
    weight: Tensor  # [C, D]
    target: Tensor  # [N]
    momentum: Tensor | None = None  # [C, D] of the weight's dtype, for a step with an optimiser; any content


@dataclass(frozen=True)
class Problem:
    """N samples against C classes of width D."""

    n: int
    d: int
    classes: int
    dtype: str = "float32"
    device: str = "cpu"
    loss: str = "arcface"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def flops(self) -> int:
        """Of one N x D x C GEMM."""
        return 2 * self.n * self.d * self.classes

    @property
    def weight_bytes(self) -> int:
        return self.classes * self.d * self.torch_dtype.itemsize

    @property
    def title(self) -> str:
        return f"{self.loss}, {self.dtype}, N={self.n}, D={self.d}, C={self.classes:,}"

    def tensors(self, weight: Tensor | None = None, momentum: Tensor | None = None) -> Tensors:
        """Random leaves, the weight as a head starts it: N(0, 0.01); or the one given, as it is."""
        random = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(self.n, self.d, generator=random, dtype=self.torch_dtype, device=self.device)
        target = torch.randint(self.classes, (self.n,), generator=random, device=self.device)
        if weight is None:
            # In place from the start: a temporary copy of W would show up as memory in use.
            weight = torch.empty(self.classes, self.d, dtype=self.torch_dtype, device=self.device)
            fill(weight, self.device)
        return Tensors(x.requires_grad_(), weight.requires_grad_(), target, momentum)


@contextlib.contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """With torch's setting for products of float32 tensors that the dtype asks for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fill(weight: Tensor, device: str = "cpu") -> None:
    weight.normal_(std=0.01, generator=torch.Generator(device).manual_seed(1))
