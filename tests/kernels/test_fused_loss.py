"""The whole loss in kernels against the reference in float64; conftest.py says where it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases import DEVICE, MACHINE
from torch import Tensor

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

from kernel_cases import NUMBERS, laid_out, near, numbers_of_all_kinds, other_dtype, pairwise, random

import tritonmargin as tm
from tritonmargin.backends.triton import BACKEND
from tritonmargin.spec import LossInputs, LossOptions

MARGINS = {
    "ArcFace": lambda: tm.ArcFace(m=0.4, s=10.0),
    "past the bound": lambda: tm.CosFace(m=0.3, s=100.0),
    "Softmax": lambda: tm.Softmax(),
    "L2Softmax": lambda: tm.L2Softmax(s=8.0),
    "ASoftmax": lambda: tm.ASoftmax(m=3, lam=1.0),
    "LSoftmax": lambda: tm.LSoftmax(m=2, lam=0.5),
}
AXES: dict[str, tuple[Any, ...]] = {
    "numbers": tuple(NUMBERS),
    "margin": ("ArcFace", "Softmax", "L2Softmax", "ASoftmax", "LSoftmax"),
    "size": ((17, 32, 129), (1, 33, 70), (20, 144, 70)),
    "stored": ("same", "another dtype"),
    "classes": ("all", "sampled", "sampled, sparse"),
    "bias": (False, True),
    "smoothing": (0.0, 0.1),
    "class_weight": (False, True),
    "reduction": ("mean", "sum", "none, strided"),
    "chunks": ("one chunk", "chunk_bytes", "memory_budget"),
    "layout": ("dense", "transposed"),
    "labels": ("random", "one class", "ignored"),
    "frozen": ("nothing", "x", "W", "x and W"),
}


class Case(NamedTuple):
    numbers: str = "float32"
    margin: str = "ArcFace"
    size: tuple[int, int, int] = (17, 32, 129)
    stored: str = "same"
    classes: str = "all"
    bias: bool = False
    smoothing: float = 0.0
    class_weight: bool = False
    reduction: str = "mean"
    chunks: str = "one chunk"
    layout: str = "dense"
    labels: str = "random"
    frozen: str = "nothing"

    def __str__(self) -> str:
        return ", ".join(
            f"{key} {value}" if isinstance(value, bool | float) else str(value)
            for key, value in self._asdict().items()
            if value != Case._field_defaults[key] or key in ("numbers", "margin")
        )


def valid(**chosen: Any) -> bool:
    """Something has to be trained."""
    return not (chosen.get("frozen") == "x and W" and chosen.get("bias") is False)


CASES = [Case(**chosen) for chosen in pairwise(AXES, valid)]


@contextlib.contextmanager
def multiplied(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inputs_of(case: Case) -> LossInputs:
    n, d, c = case.size
    dtype = NUMBERS[case.numbers][0]
    stored = dtype if case.stored == "same" else other_dtype(dtype)
    x, w = random(n, d, seed=1), random(c, d, seed=2) * (1.5 / math.sqrt(d))
    ids = None if case.classes == "all" else torch.arange(c, device=DEVICE)[torch.arange(c, device=DEVICE) % 7 != 3]
    own = torch.arange(n, device=DEVICE) * 29 % (c if ids is None else len(ids))
    if case.labels == "one class":
        own[: n - n // 3] = 11
    target = own if ids is None else ids[own]
    if case.labels == "ignored":
        target[1::4] = -100
        x[1::4] = math.nan
    found = LossInputs(
        laid_out(x.to(dtype), case.layout), laid_out(w.to(stored), case.layout), target,
        random(c, seed=3, dtype=stored) if case.bias else None, ids,
        random(c, seed=4).abs() + 0.5 if case.class_weight else None,
    )  # fmt: skip
    found.embeddings.requires_grad_("x" not in case.frozen)
    found.weight.requires_grad_("W" not in case.frozen)
    if found.bias is not None:
        found.bias.requires_grad_()
    return found


def step(loss: Tensor, inputs: LossInputs, case: Case) -> dict[str, Tensor]:
    """The loss and gradients by name, for an upstream gradient that is not 1."""
    upstream = torch.tensor(0.7, dtype=loss.dtype)
    if loss.ndim:
        upstream = random(len(loss), seed=9).to(loss.dtype).to(loss.device)
        if "strided" in case.reduction:
            upstream = torch.stack([upstream, upstream], dim=1)[:, 1]
    leaves = {"x": inputs.embeddings, "weight": inputs.weight, "bias": inputs.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    found = torch.autograd.grad(loss, tuple(leaves.values()), upstream.to(loss.device))
    return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}


def check_loss(case: Case, backend: Any = BACKEND, slack: float = 1.0) -> None:
    """One step against float64. backend: `BACKEND`, or one with a fault."""
    inputs = inputs_of(case)
    dtype, precision, tolerance = NUMBERS[case.numbers]
    tolerance *= slack
    options = LossOptions(
        label_smoothing=case.smoothing, reduction=case.reduction.split(",")[0], sparse_grad="sparse" in case.classes,
        chunk_bytes=1 if case.chunks == "chunk_bytes" else None,
        memory_budget=1 if case.chunks == "memory_budget" else None,
    )  # fmt: skip
    margin = MARGINS[case.margin]()
    with multiplied(precision):
        loss = backend.fused(inputs, margin.to(DEVICE), options, torch.promote_types(dtype, inputs.weight.dtype))
    assert loss is not None, "has no kernel"
    found = step(loss, inputs, case)
    exact = LossInputs(*(right_leaf(each) for each in inputs))
    expected = tm.reference.margin_cross_entropy(
        exact.embeddings, exact.weight, exact.target, margin.to("cpu"), bias=exact.bias, class_ids=exact.class_ids,
        class_weight=exact.class_weight, label_smoothing=case.smoothing, reduction=options.reduction,
    )  # fmt: skip
    right = step(expected, exact, case)
    near(found.pop("loss").reshape(-1), right.pop("loss").reshape(-1), tolerance / 4, "loss")
    for name, gradient in found.items():
        assert gradient.is_sparse == (name == "weight" and options.sparse_grad)
        rounding = 2.0 * torch.finfo(gradient.dtype).eps
        near(gradient.to_dense(), right[name], max(tolerance, rounding), f"gradient of {name}")


def right_leaf(value: Tensor | None) -> Tensor | None:
    if value is None or not value.is_floating_point():
        return None if value is None else value.cpu()
    return value.detach().cpu().double().requires_grad_(value.requires_grad)


@pytest.mark.parametrize("case", CASES[:: 8 if MACHINE == "interpreter" else 1], ids=str)
def test_loss_and_gradients(case: Case) -> None:
    check_loss(case)


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("numbers", [name for name in NUMBERS if name != "float16"])
def test_several_chunks_past_the_bound(numbers: str) -> None:
    """exp(z) overflows: a maximum runs along. A logit of 100 is off by as many roundings; float16 loses whole rows."""
    case = Case(numbers, "past the bound", (20, 130, 140), chunks="chunk_bytes", labels="one class")
    check_loss(case, slack=20.0)


@numbers_of_all_kinds
def test_two_steps_are_equal_bit_by_bit(numbers: str) -> None:
    case = Case(numbers, "LSoftmax", (20, 24, 129), bias=True, smoothing=0.1, chunks="chunk_bytes", labels="one class")
    steps = []
    for _ in range(2):
        inputs = inputs_of(case)
        options = LossOptions(label_smoothing=0.1, chunk_bytes=1)
        with multiplied(NUMBERS[numbers][1]):
            loss = BACKEND.fused(inputs, MARGINS["LSoftmax"]().to(DEVICE), options, NUMBERS[numbers][0])
        steps.append(step(loss, inputs, case))
    for name, first in steps[0].items():
        assert torch.equal(first, steps[1][name]), name


def test_no_other_class() -> None:
    """C = 1: the loss is 0 and so are its gradients, whatever the margin."""
    x, w = random(3, 16, seed=1).requires_grad_(), random(1, 16, seed=2).requires_grad_()
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for margin in (tm.ArcFace(), tm.Softmax()):
        loss = BACKEND.fused(LossInputs(x, w, target), margin.to(DEVICE), LossOptions(), torch.float32)
        dx, dw = torch.autograd.grad(loss, (x, w))
        assert float(loss) == 0.0
        assert not dx.any()
        assert not dw.any()


@numbers_of_all_kinds
def test_no_sample_and_no_label(numbers: str) -> None:
    """An empty batch; one in which every label is ignored has no mean."""
    dtype = NUMBERS[numbers][0]
    for n, reduction in ((0, "sum"), (0, "none"), (5, "sum"), (5, "mean")):
        x, w = random(n, 16, seed=1, dtype=dtype).requires_grad_(), random(70, 16, seed=2, dtype=dtype).requires_grad_()
        target = torch.full((n,), -100, device=DEVICE)
        options = LossOptions(reduction=reduction)
        loss = BACKEND.fused(LossInputs(x, w, target), tm.ArcFace().to(DEVICE), options, dtype)
        dx, dw = torch.autograd.grad(loss.sum(), (x, w))
        assert dx.shape == x.shape
        if reduction == "mean":
            assert loss.isnan()
        else:
            assert not loss.any()
            assert not dx.any()
            assert not dw.any()


def test_the_margins_number_is_read_in_every_step() -> None:
    margin = tm.ArcFace(s=10.0).to(DEVICE)
    inputs = inputs_of(Case())
    losses = []
    for m in (0.5, 0.1, 0.5):
        margin.m = m
        losses.append(float(BACKEND.fused(inputs, margin, LossOptions(), torch.float32).detach()))
    assert losses[0] == losses[2]
    assert losses[0] > losses[1] + 0.1


@pytest.mark.parametrize(
    ("margin", "options"),
    [(tm.ArcFace(), {"logq_correction": True}), (type("Mine", (tm.Margin,), {"target_cosine": lambda s, c: c})(), {})],
    ids=["a correction of the sample's sum", "a margin without a formula"],
)
def test_what_is_left_to_pytorch(margin: tm.Margin, options: dict[str, Any]) -> None:
    assert BACKEND.fused(inputs_of(Case()), margin, LossOptions(**options), torch.float32) is None
