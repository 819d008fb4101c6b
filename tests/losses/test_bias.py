"""The gradient of a bias over many samples of few classes, where what a class's own samples add nearly cancels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS, DEVICE, MACHINE, every_objective
from torch import Tensor

import tritonmargin as tm
from tritonmargin.reference import margin_cross_entropy as with_full_logits

N = 65_536 if MACHINE in ("cpu", "cuda") else 640
C = 2


def given(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(*shape, generator=generator, device="cpu") for shape in ((N, 16), (C, 16), (C,)))
    made = {"x": x, "w": w / 4, "b": b / 4}
    y = torch.randint(C, (N,), generator=generator, device="cpu").to(DEVICE)
    return {name: each.to(DEVICE, dtype) for name, each in made.items()} | {"y": y}


def gradient(loss: Callable[..., Any], of: dict[str, Tensor], *args: object, **options: object) -> Tensor:
    bias = of["b"].clone().requires_grad_()
    found = loss(of["x"], of["w"], of["y"], *args, bias=bias, **options)
    return torch.autograd.grad(found, bias)[0].double().cpu()


def check(dtype: torch.dtype, bias: torch.dtype, backend: str, margin: tm.Margin, **options: object) -> None:
    """Beside full logits in the same dtypes, against float64."""
    rounded = given(dtype) | {"b": given(bias)["b"]}
    exact = {name: each.double() if each.is_floating_point() else each for name, each in rounded.items()}
    expected = gradient(with_full_logits, exact, margin, **options)
    with tm.use_backend(backend):
        ours = gradient(tm.margin_cross_entropy, rounded, margin, **options)
    plain = gradient(with_full_logits, rounded, margin, **options)
    error, allowed = (float((each - expected).norm()) for each in (ours, plain))
    # Two numbers may be right by chance.
    one_rounding = torch.finfo(bias).eps / 4 * float(expected.norm())
    assert error <= 2.0 * allowed + one_rounding, (error, allowed)


@every_objective
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "bias"),
    [
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
        (torch.float16, torch.float32), (torch.float64, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_a_bias_over_many_samples_of_two_classes(
    dtype: torch.dtype, bias: torch.dtype, backend: str, objective: str
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels do not compute in float64")
    check(dtype, bias, backend, tm.Softmax(), objective=objective)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"class_weight": torch.tensor([0.5, 2.0])}], ids=lambda each: next(iter(each))
)
def test_the_same_with_smoothing_and_weights(options: dict[str, Any], backend: str) -> None:
    options = {name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in options.items()}
    check(torch.float32, torch.float32, backend, tm.Softmax(), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_with_a_margin_of_ones_own(backend: str) -> None:
    class Own(tm.Margin):
        def __init__(self) -> None:
            super().__init__(s=4.0)

        def target_cosine(self, cos: Tensor) -> Tensor:
            return cos - 0.2

    check(torch.float32, torch.float32, backend, Own())
