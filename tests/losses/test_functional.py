"""The losses against the float64 reference: every margin, objective and reduction, values and gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    DEVICE,
    FLOATS,
    KINDS,
    ONE_CHUNK,
    Problem,
    assert_rows_close,
    assert_same,
    combinations,
    cost,
    every_backend,
    every_kind,
    every_margin,
    every_objective,
    made,
    oracle,
    precise,
    problem,
    run,
    streamed,
)
from torch import Tensor

import tritonmargin as tm
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES

# Sizes at which blocked code goes wrong: (N, D, C), and why.
SHAPES = {
    "one class past a chunk": (6, 9, ONE_CHUNK + 1),
    "one class past two chunks": (5, 65, 2 * ONE_CHUNK + 1),
    "exactly one chunk": (6, 9, ONE_CHUNK),
    "one sample": (1, 17, 131),
    "one column": (7, 1, 2 * ONE_CHUNK + 3),
    "two classes": (5, 9, 2),
    "one class": (5, 9, 1),
    "more samples than anything": (70, 3, 5),
}


def tolerance(given: Problem, margin: tm.Margin, objective: str, backend: str) -> tuple[float, float]:
    """rtol of each row, and an absolute one for what is 0 in exact arithmetic or a difference of logits."""
    dtype, size = precise(backend)
    atol = size * (1e-11 if objective != "softmax" else 1e-14)
    if given.x.shape[1] == 1 and (margin.unit_embeddings or margin.unit_weight):
        # A unit row of one number has no direction to move in: the gradient is what rounding leaves of cos = +-1,
        # 1e-16, times the slope of arccos there, 1/sqrt(2 eps) = 5e7, and s = 64. The values are as uncertain.
        # In float32 it is 1e-7 times 2e3 times 64, over the length of a row, which is down to 0.02.
        atol = (1e-5 if dtype == torch.float64 else 1.0) * (len(given.w) if objective == "hinge" else 1)
    return size * 1e-10, atol


REDUCTIONS = ("mean", "sum", "none")


def reductions(backend: str, *case: str) -> tuple[str, ...]:
    """All, or one where kernels are executed, another for each case: they launch the same kernels."""
    if backend == "torch":
        return REDUCTIONS
    place = sum(list(axis).index(value) for value in case for axis in AXES if value in axis)
    return (REDUCTIONS[place % 3],)


# -- everything against the reference ------------------------------------------------------------------------------


@every_backend
@combinations(("name", "objective", "shape"), MARGINS, OBJECTIVES, SHAPES)
def test_against_the_reference(name: str, objective: str, shape: str, backend: str) -> None:
    given, margin = problem(*SHAPES[shape]).to(precise(backend)[0]), MARGINS[name]()
    allowed = tolerance(given, margin, objective, backend)
    for reduction in reductions(backend, name, objective, shape):
        options = {"objective": objective, "reduction": reduction}
        ours = streamed(given, margin, backend=backend, **options)
        assert_same(ours, oracle(given, margin, **options), *allowed, what=options)


@every_backend
@combinations(("name", "objective"), MARGINS, ("softmax", "lse-hinge", "hinge"))
def test_low_precision_is_that_of_the_products(name: str, objective: str, backend: str) -> None:
    """Of several tiles, with and without the kept ones: on a GPU float32's are not the kernels' own products.

    Not of the max-hinge: rounded logits have another hardest class.
    """
    given, margin = problem(40, 24, 150).to(torch.bfloat16), MARGINS[name]()
    if margin.unit_embeddings:
        margin.s = 8.0  # logits of 64 are known to a quarter
    kept = {"retain_bytes": 10**6, "bias": made(150).bfloat16()} if not margin.unit_weight else {"retain_bytes": 10**6}
    for options in ({}, kept):
        bias = options.pop("bias", None)
        this = given if bias is None else replace(given, bias=bias)
        ours = streamed(this, margin, backend=backend, objective=objective, chunk_bytes=50_000, **options)
        expected = oracle(this, margin, objective=objective)
        assert_same(ours, expected, 0.1, 0.02 * float(expected["dw"].abs().max()), what=options)


@every_backend
@pytest.mark.parametrize("objective", ["softmax", "hinge"])
def test_hooks_may_give_what_was_saved_another_layout(objective: str, backend: str) -> None:
    """As torch.autograd.graph.save_on_cpu does: retained tiles come back with lines of their own."""
    given = problem(20, 16, 133, bias=True).to(precise(backend)[0])
    options: dict[str, Any] = {"objective": objective, "retain_bytes": 10**6, "backend": backend}
    expected = streamed(given, tm.Softmax(), **options)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: each.detach().contiguous().clone(), lambda each: each):
        moved = streamed(given, tm.Softmax(), **options)
    for name, value in expected.items():
        assert torch.equal(moved[name], value), name


def option(name: str, given: Problem) -> tuple[Problem, dict[str, object]]:
    """A problem and the keywords that make this option matter."""
    c = len(given.w)
    ids = torch.cat([given.y, torch.arange(0, c, 2)]).unique()
    class_weight = made(c, seed=7).abs() + 0.1
    ignoring = given.y.clone()
    ignoring[[1, -1]] = -100
    bias = made(c, seed=8)
    everything = {
        "class_ids": ids, "class_weight": class_weight, "label_smoothing": 0.3, "ignore_index": int(given.y[2]),
    }  # fmt: skip
    return {
        "bias": (replace(given, bias=bias), {}),
        "class_ids": (given, {"class_ids": ids}),
        "class_ids and bias": (replace(given, bias=bias), {"class_ids": ids}),
        "class_weight": (given, {"class_weight": class_weight}),
        "label_smoothing": (given, {"label_smoothing": 0.1}),
        "label_smoothing of 1": (given, {"label_smoothing": 1.0}),
        "label_smoothing and class_weight": (given, {"label_smoothing": 0.2, "class_weight": class_weight}),
        "ignore_index": (replace(given, y=ignoring), {}),
        "another ignore_index": (given, {"ignore_index": int(given.y[0])}),
        "sparse_grad": (given, {"sparse_grad": True}),
        "sparse_grad and class_ids": (given, {"sparse_grad": True, "class_ids": ids}),
        "everything": (replace(given, bias=bias), {**everything, "sparse_grad": True, "retain_bytes": 10**4}),
    }[name]


OPTIONS = [
    "bias", "class_ids", "class_ids and bias", "class_weight", "label_smoothing", "label_smoothing of 1",
    "label_smoothing and class_weight", "ignore_index", "another ignore_index", "sparse_grad",
    "sparse_grad and class_ids", "everything",
]  # fmt: skip


AXES = (MARGINS, KINDS, OBJECTIVES, SHAPES, OPTIONS)


@every_backend
@combinations(("kind", "objective", "name"), KINDS, OBJECTIVES, OPTIONS)
def test_options_against_the_reference(kind: str, objective: str, name: str, backend: str) -> None:
    dtype, size = precise(backend)
    given, options = option(name, problem(8, 9, 2 * ONE_CHUNK + 5, seed=1))
    given = given.to(dtype)
    if "class_weight" in options:
        options["class_weight"] = options["class_weight"].to(dtype)
    if objective != "softmax":
        options.pop("label_smoothing", None)
    if not options and given.bias is None and name != "ignore_index":
        pytest.skip("label smoothing belongs to the softmax objective")
    # A smoothed loss is a difference of logits, and a sum over all classes in the gradient to x.
    rtol, atol = size * 1e-10, size * 1e-11
    for reduction in reductions(backend, kind, objective, name):
        these = {**options, "objective": objective, "reduction": reduction}
        ours = streamed(given, KINDS[kind], backend=backend, **these)
        assert_same(ours, oracle(given, KINDS[kind], **these), rtol, atol, (name, reduction))


@every_backend
@pytest.mark.parametrize("objective", ["softmax", "max-hinge", "hinge"])
@pytest.mark.parametrize("sampled", [False, True], ids=["all", "sampled"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@every_kind
def test_stats_against_the_reference(kind: str, with_bias: bool, sampled: bool, objective: str, backend: str) -> None:
    exact = backend == "torch"
    given = problem(40, 9, 3 * ONE_CHUNK + 1, bias=with_bias, seed=2)
    given.y[[3, 17]] = -100
    # Some of them right, some wrong.
    given.x[:12] = 6.0 * given.w[given.y[:12].clamp(min=0)] + 0.1 * given.x[:12]
    ids = torch.cat([given.y[given.y >= 0], torch.arange(1, len(given.w), 3)]).unique() if sampled else None
    options = {"class_ids": ids, "objective": objective, "return_stats": True, "reduction": "none"}
    given = given if exact else given.to(torch.float32)
    x, w = given.x.clone().requires_grad_(), given.w.clone().requires_grad_()
    with tm.use_backend(backend):
        loss, ours = tm.margin_cross_entropy(x, w, given.y, KINDS[kind], bias=given.bias, chunk_bytes=1, **options)
    expected_loss, expected = tm.reference.margin_cross_entropy(
        given.x, given.w, given.y, KINDS[kind], bias=given.bias, **options
    )
    size = 1.0 if exact else 1e6
    assert_rows_close(loss, expected_loss, size * 1e-10, size * 1e-10)
    for field, value, other in zip(expected._fields, ours, expected, strict=True):
        assert not value.requires_grad, field
        assert value.dtype == other.dtype, field
        if value.is_floating_point():
            assert_rows_close(value, other, size * 1e-11, size * 1e-10, field)
        else:
            assert torch.equal(value, other), field
    assert 0 < ours.correct.sum() < 38
    plain, _ = tm.margin_cross_entropy(x, w, given.y, KINDS[kind], bias=given.bias, chunk_bytes=1, **options)
    assert torch.equal(plain, loss)


def test_hardest_class_is_the_lowest_of_equals() -> None:
    """Whether they stand in one chunk or in several."""
    given = problem(4, 8, 4 * ONE_CHUNK)
    for copies in ([3, 7, 11], [60, 70, 250], [1, 64, 128]):
        w = given.w.clone()
        w[copies] = given.w[copies[0]]
        x, y = w[copies[0]].expand(4, 8), torch.tensor([0, 2, copies[0], copies[1]])
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            _, stats = tm.margin_cross_entropy(
                x.to(dtype), w.to(dtype), y, tm.NormFace(), chunk_bytes=1, return_stats=True
            )
            assert stats.hardest_class.tolist() == [copies[0], copies[0], copies[1], copies[0]]


@pytest.mark.no_launch
@every_backend
@every_objective
def test_an_empty_batch(objective: str, backend: str) -> None:
    given = problem(0, 4, 131).to(precise(backend)[0])
    for reduction, value in (("mean", math.nan), ("sum", 0.0)):
        ours = streamed(given, tm.ArcFace(), objective=objective, reduction=reduction, backend=backend)
        torch.testing.assert_close(ours["loss"], torch.tensor(value, dtype=given.x.dtype), equal_nan=True)
        assert not ours["dw"].any()
    none = streamed(given, tm.Softmax(), objective=objective, reduction="none", backend=backend)
    assert none["loss"].shape == (0,)


# -- where other implementations fail ------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("cosine", [1.0, -1.0])
@every_objective
@every_margin
def test_target_cosine_of_exactly_one(name: str, objective: str, cosine: float, backend: str) -> None:
    """acos has no slope there: gradients are nan or 1e3 too large in the usual code."""
    margin = MARGINS[name]()
    given = problem(6, 16, 2 * ONE_CHUNK + 1, seed=3)
    x = cosine * given.w[given.y] * torch.tensor([0.5, 1.0, 2.0, 1.0, 4.0, 1.0], dtype=torch.float64)[:, None]
    given = replace(given, x=x)
    options = {"objective": objective, "reduction": "none"}
    # The slope of ArcFace is 2e7 one eps away from 1 in float64, and meets 1e-16 of direction left by rounding; the
    # hinge does so once for every class.
    noise = 1e-5 * (len(given.w) if objective == "hinge" else 1)
    if backend == "torch":
        assert_same(streamed(given, margin, backend=backend, **options), oracle(given, margin, **options), 1e-7, noise)
    rounded = given.to(torch.float32)
    ours, expected = streamed(rounded, margin, backend=backend, **options), oracle(rounded, margin, **options)
    # In float32 2e3 meets 1e-7, times s = 64: 1e-2 beside gradients of 64 and more, once for every class in the hinge.
    for key, value in ours.items():
        scale = float(expected[key].abs().max()) + 64.0 * (len(given.w) if objective == "hinge" else 1)
        assert (value.double() - expected[key]).abs().max() <= 1e-3 * scale, key


def test_plain_softmax_with_a_common_offset_of_ten_thousand() -> None:
    """An offset of all logits changes nothing, and in float32 costs 1e4 eps = 1e-3, as everywhere."""
    given = problem(6, 9, 2 * ONE_CHUNK + 1, seed=4)
    one = torch.ones(6, 1, dtype=torch.float64)
    shifted = replace(
        given,
        x=torch.cat([given.x, 100.0 * one], dim=1),
        w=torch.cat([given.w, 100.0 * torch.ones(len(given.w), 1, dtype=torch.float64)], dim=1),
    )
    for objective in ("softmax", "lse-hinge", "max-hinge", "hinge"):
        options = {"objective": objective, "reduction": "none"}
        plain, moved = streamed(given, tm.Softmax(), **options), streamed(shifted, tm.Softmax(), **options)
        assert_rows_close(moved["loss"], plain["loss"], 1e-10, 1e-10)
        assert_rows_close(moved["dx"][:, :-1], plain["dx"], 1e-10, 1e-10)
        assert_rows_close(moved["dw"][:, :-1], plain["dw"], 1e-10, 1e-10)
        single = shifted.to(torch.float32)
        ours, exact = streamed(single, tm.Softmax(), **options), oracle(single, tm.Softmax(), **options)
        # The last column's gradient is 100 (sum_j p_j - 1) = 0, times what 1e4 leaves of the logits' precision.
        assert_same(ours, exact, 0.02, 0.2 * (len(given.w) if objective == "hinge" else 1), objective)
        ours["dx"], exact["dx"] = ours["dx"][:, :-1], exact["dx"][:, :-1]
        ours["dw"], exact["dw"] = ours["dw"][:, :-1], exact["dw"][:, :-1]
        assert_same(ours, exact, 0.01, 0.01, objective)
    far = replace(given, bias=torch.full((len(given.w),), 1e4, dtype=torch.float64))
    assert_rows_close(streamed(far, tm.Softmax())["loss"], streamed(given, tm.Softmax())["loss"], 1e-10)


@every_backend
@combinations(("name",), MARGINS)
def test_per_sample_losses_can_be_weighted_afterwards(name: str, backend: str) -> None:
    """Gradients made in the forward pass with one common factor are right for a mean and wrong here."""
    dtype, size = precise(backend)
    given, margin = problem(12, 9, 131, seed=5).to(dtype), MARGINS[name]()
    exact = given.to(torch.float64)
    leaves = [[leaf.clone().requires_grad_() for leaf in (each.x, each.w)] for each in (given, exact)]
    with tm.use_backend(backend):
        ours = tm.margin_cross_entropy(*leaves[0], given.y, margin, reduction="none", chunk_bytes=1)
    expected = tm.reference.margin_cross_entropy(*leaves[1], given.y, margin, reduction="none")
    for combine in (
        lambda loss: (loss * exact.upstream).sum(),
        lambda loss: loss.square().mean(),
        lambda loss: loss[3],
    ):
        dx, dw = torch.autograd.grad(combine(ours), leaves[0], retain_graph=True)
        right_dx, right_dw = torch.autograd.grad(combine(expected), leaves[1], retain_graph=True)
        assert_rows_close(dx, right_dx, size * 1e-10)
        assert_rows_close(dw, right_dw, size * 1e-10, size * 1e-14)


# -- dtypes and layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_w", FLOATS, ids=str)
@pytest.mark.parametrize("of_x", FLOATS, ids=str)
@every_kind
def test_mixed_dtypes(kind: str, of_x: torch.dtype, of_w: torch.dtype) -> None:
    """Products in the common dtype, sums and the loss in float32 or float64, gradients in each input's own."""
    given = problem(6, 9, 131, seed=6)
    given = replace(given, x=given.x.to(of_x), w=given.w.to(of_w))
    compute = torch.promote_types(of_x, of_w)
    found: list[dict[str, Tensor]] = []
    with_bias = KINDS[kind].unit_weight is False
    if with_bias:
        given = replace(given, bias=made(131).to(of_w))
    paid = cost(lambda: found.append(streamed(given, KINDS[kind], reduction="none")))
    ours = found[0]
    assert ours["loss"].dtype == (torch.float64 if compute == torch.float64 else torch.float32)
    assert (ours["dx"].dtype, ours["dw"].dtype) == (of_x, of_w)
    assert not with_bias or ours["db"].dtype == of_w
    names = {torch.bfloat16: "c10::BFloat16", torch.float32: "float", torch.float64: "double"}
    # exp(64) does not fit float16: on the CPU its products are in float32.
    product = names[torch.float32 if compute == torch.float16 else compute]
    assert {dtype for dtypes in paid.products for dtype in dtypes} == {product}
    eps = max(torch.finfo(dtype).eps for dtype in (of_x, of_w))
    expected = oracle(given, KINDS[kind], reduction="none")
    s = KINDS[kind].s if KINDS[kind].unit_embeddings else 4.0
    for key, value in ours.items():
        error, size = (value.double() - expected[key]).norm(), expected[key].norm()
        assert error <= 2.0 * s * eps * size, (key, error / size)


@every_backend
@every_objective
@every_kind
def test_statistics_change_no_gradient(kind: str, objective: str, backend: str) -> None:
    """Of a logsumexp that is only returned there is no gradient, and none of a batch without samples."""
    whole = problem(6, 9, 131, seed=6).to(precise(backend)[0])
    for given in (whole, replace(whole, x=whole.x[:0], y=whole.y[:0])):
        found = []
        for stats in (False, True):
            x, w = given.x.clone().requires_grad_(), given.w.clone().requires_grad_()
            with tm.use_backend(backend):
                loss = tm.margin_cross_entropy(
                    x, w, given.y, KINDS[kind], objective=objective, return_stats=stats, reduction="sum", chunk_bytes=1
                )
            value = loss[0] if stats else loss
            found.append((value.detach(), *torch.autograd.grad(value, (x, w))))
        for ours, other in zip(*found, strict=True):
            # The bounded logsumexp and the one beside a hardest class or a hinge are the same numbers.
            assert_rows_close(ours, other, 1e-5, 1e-9)


@every_kind
def test_autocast(kind: str) -> None:
    """Under autocast products are in its dtype; norms, sums, the loss and the gradients are not."""
    given = problem(6, 9, 131, seed=6)
    for dtype in (torch.float32, torch.float64):
        typed = given.to(dtype)
        found: list[dict[str, Tensor]] = []

        def call(typed: Problem = typed, found: list[dict[str, Tensor]] = found) -> None:
            with torch.autocast(DEVICE, torch.bfloat16):
                found.append(streamed(typed, KINDS[kind], reduction="none"))

        paid = cost(call)
        used = {name for names in paid.products for name in names}
        assert used == ({"c10::BFloat16"} if dtype == torch.float32 else {"double"})
        assert all(value.dtype == dtype for value in found[0].values())
        plain = streamed(typed, KINDS[kind], reduction="none")
        assert torch.equal(found[0]["loss"], plain["loss"]) == (dtype == torch.float64)
        s = KINDS[kind].s if KINDS[kind].unit_embeddings else 4.0
        for key, value in plain.items():
            assert (found[0][key] - value).norm() <= 2.0**-7 * s * value.norm(), key


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_kind
def test_sparse_and_dense_gradients_agree(kind: str, dtype: torch.dtype) -> None:
    given = problem(6, 9, 3 * ONE_CHUNK, seed=7).to(dtype)
    ids = torch.cat([given.y, torch.arange(5, 190, 4)]).unique()
    for class_ids in (None, ids):
        w = given.w.clone().requires_grad_()
        grads = []
        for sparse in (False, True):
            loss = tm.margin_cross_entropy(
                given.x, w, given.y, KINDS[kind], class_ids=class_ids, sparse_grad=sparse, chunk_bytes=1
            )
            grads.append(torch.autograd.grad(loss, w)[0])
        dense, sparse = grads
        assert sparse.is_sparse
        assert sparse.is_coalesced()
        assert sparse.dtype == dtype
        walked = torch.arange(len(w)) if class_ids is None else class_ids
        assert torch.equal(sparse.indices()[0], walked)
        assert torch.equal(sparse.to_dense(), dense)
        # And it is a gradient that an optimiser takes.
        with torch.no_grad():
            w.add_(sparse, alpha=-0.1)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(w.detach(), given.w - 0.1 * dense, rtol=0, atol=4 * eps * float(w.abs().max()))


# -- the backends --------------------------------------------------------------------------------------------------


@every_objective
@every_margin
def test_the_reference_as_a_backend_is_the_reference(name: str, objective: str) -> None:
    given, margin = problem(), MARGINS[name]()
    options = {"objective": objective, "reduction": "none"}
    ours = run(tm.margin_cross_entropy, given, margin, backend="reference", **options)
    for key, value in run(tm.reference.margin_cross_entropy, given, margin, **options).items():
        assert torch.equal(ours[key], value)
