"""What holds for every call: it is the reference's loss, and what does not matter changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import torch
from cases import KINDS, MORE, Problem, assert_same, made, oracle, run, streamed
from hypothesis import example, settings
from hypothesis import strategies as st
from torch import Tensor

import tritonmargin as tm
from tritonmargin.kernels import STREAMS
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Call:
    """Everything that a call can be given; printed by hypothesis, so as numbers and names."""

    n: int
    d: int
    c: int
    seed: int
    margin: str
    s: float
    objective: str
    reduction: str
    bias: bool = False
    sampled: bool = False
    class_weight: bool = False
    smoothing: float = 0.0
    ignored: int = 0
    sparse: bool = False
    retain_bytes: int = 0
    chunk_bytes: int = 1
    layout: str = "plain"
    backend: str = "torch"

    def given(self) -> Problem:
        seed = 10 * self.seed
        w = made(self.c, self.d, seed=seed)
        y = torch.randint(self.c, (self.n,), generator=torch.Generator().manual_seed(seed))
        # From hopeless to easy, sample by sample.
        ease = torch.linspace(-0.5, 1.5, self.n, dtype=torch.float64)[:, None]
        x = ease * w[y] + made(self.n, self.d, seed=seed + 1)
        if not MARGINS[self.margin].unit_embeddings:
            x = x / self.d
        y[: self.ignored] = -1
        bias = made(self.c, seed=seed + 2) if self.bias else None
        return Problem(laid_out(x, self.layout), laid_out(w, self.layout), y, made(self.n, seed=seed + 3), bias)

    def loss(self) -> tm.Margin:
        margin = MARGINS[self.margin]()
        if margin.unit_embeddings:
            margin.s = self.s
        return margin

    def options(self) -> dict[str, Any]:
        y = self.given().y
        generator = torch.Generator().manual_seed(self.seed)
        ids = tm.sample_classes(y, self.c, (self.c + 1) // 2, generator) if self.sampled else None
        return {
            "objective": self.objective,
            "reduction": self.reduction,
            "class_ids": ids,
            "class_weight": made(self.c, seed=10 * self.seed + 4).abs() + 0.1 if self.class_weight else None,
            "label_smoothing": self.smoothing if self.objective == "softmax" else 0.0,
            "ignore_index": -1,
        }

    def streaming(self) -> dict[str, Any]:
        """The options that only say how."""
        return {
            "sparse_grad": self.sparse,
            "retain_bytes": self.retain_bytes,
            "chunk_bytes": self.chunk_bytes,
            "backend": self.backend,
        }


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "every other column":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=2).flatten(1)[:, ::2]
    if layout == "inside":
        return torch.nn.functional.pad(tensor, (2, 1, 1, 1), value=torch.nan)[1:-1, 2:-1]
    return tensor


LAYOUTS = ("plain", "transposed", "every other column", "inside")
calls = st.builds(
    Call,
    n=st.integers(1, 9),
    d=st.integers(2, 40),
    c=st.one_of(st.integers(1, 12), st.integers(60, 200)),
    seed=st.integers(0, 1000),
    margin=st.sampled_from(sorted(MARGINS)),
    s=st.sampled_from([0.5, 4.0, 30.0, 64.0, 100.0, 800.0]),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    reduction=st.sampled_from(REDUCTIONS),
    bias=st.booleans(),
    sampled=st.booleans(),
    class_weight=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    ignored=st.integers(0, 3),
    sparse=st.booleans(),
    retain_bytes=st.sampled_from([0, 3000, 10**9]),
    chunk_bytes=st.sampled_from([1, 20_000, 10**9]),
    layout=st.sampled_from(LAYOUTS),
    backend=st.sampled_from(sorted(STREAMS)),
)


def near(call: Call, given: Problem, eps: float) -> float:
    """What rounding leaves of something that is 0 or a difference: eps of the largest logit, arccos' slope near +-1."""
    x, w = given.x.double(), given.w.double()
    logit = call.s if MARGINS[call.margin].unit_embeddings else float(x.norm(dim=1).max())
    logit *= 1.0 if MARGINS[call.margin].unit_weight else float(w.norm(dim=1).max())
    cos = torch.nn.functional.cosine_similarity(x, w[given.y.clamp(min=0)])
    slope = 1.0 / max(1.0 - float(cos.abs().max()), eps) ** 0.5
    terms = call.c if call.objective == "hinge" else 1
    smallest = min(float(norms.min()) for norms in (x.norm(dim=1), w.norm(dim=1)))
    return 64.0 * eps * terms * (1.0 + logit) * slope**2 * max(1.0, 1.0 / smallest) * 10.0


@settings(max_examples=250 * MORE)
@hypothesis.given(call=calls)
@example(Call(1, 2, 1, 0, "ArcFace", 64.0, "softmax", "mean"))
@example(Call(3, 2, 2, 0, "Softmax", 1.0, "hinge", "none", ignored=3))
@example(Call(3, 5, 1, 0, "LSoftmax", 1.0, "max-hinge", "sum", bias=True, sampled=True, sparse=True))
@example(Call(5, 5, 130, 0, "NormFace", 800.0, "softmax", "none", smoothing=0.1, class_weight=True, ignored=1))
def test_every_call_is_the_references(call: Call) -> None:
    given, margin, options = call.given(), call.loss(), call.options()
    ours = streamed(given, margin, **options, **call.streaming())
    expected = oracle(given, margin, **options)
    if call.reduction == "mean" and call.ignored >= call.n:
        assert math.isnan(ours["loss"]), "a mean over nothing"
        return
    assert_same(ours, expected, 1e-9, near(call, given, 2.2e-16), call)
    for i in range(min(call.ignored, call.n)):
        assert not ours["dx"][i].any()


@settings(max_examples=150 * MORE)
@hypothesis.given(call=calls, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_call_in_low_precision_is_near_the_references(call: Call, dtype: torch.dtype) -> None:
    """The loss of one sample, to what its logits are rounded to; the gradient where it has no jump."""
    call = replace(call, s=min(call.s, 8.0), reduction="none")
    given, margin, options = call.given().to(dtype), call.loss(), call.options()
    if options["class_weight"] is not None:
        options["class_weight"] = options["class_weight"].float()
    ours = streamed(given, margin, **options, **call.streaming())
    expected = oracle(given, margin, **options)
    assert ours["loss"].dtype == torch.float32
    assert all(ours[key].dtype == dtype for key in ours if key != "loss")
    eps = torch.finfo(dtype).eps
    logits = 10.0 + 2.0 * call.s + float((given.x.double() @ given.w.double().T).abs().max())
    terms = call.c if call.objective == "hinge" else 1
    allowed = 2.0 * eps * logits * terms * 2.0
    assert (ours["loss"].double() - expected["loss"]).abs().max() <= allowed * (4.0 if call.class_weight else 1.0)
    if call.objective == "softmax":
        for key in ("dx", "dw"):
            size = expected[key].norm() + given.upstream.double().norm()
            assert (ours[key].double() - expected[key]).norm() <= min(4.0 * eps * logits, 1.0) * size, key


# -- what does not matter ------------------------------------------------------------------------------------------

transformed = st.sampled_from(sorted(KINDS))
small = st.builds(
    Call,
    n=st.integers(2, 7),
    d=st.integers(3, 12),
    c=st.integers(3, 140),
    seed=st.integers(0, 1000),
    margin=st.sampled_from(sorted(MARGINS)),
    s=st.sampled_from([4.0, 20.0, 800.0]),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    reduction=st.just("none"),
    bias=st.booleans(),
    class_weight=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
)


def holds(call: Call, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert_same(one, other, 1e-9, near(call, call.given(), 2.2e-16), call)


def compute(call: Call, given: Problem, **changed: Any) -> dict[str, Tensor]:
    return streamed(given, call.loss(), **{**call.options(), **call.streaming(), **changed})


@settings(max_examples=40 * MORE)
@hypothesis.given(call=small, seed=st.integers(0, 100))
def test_the_order_of_the_samples(call: Call, seed: int) -> None:
    given = call.given()
    order = torch.randperm(call.n, generator=torch.Generator().manual_seed(seed))
    moved = replace(given, x=given.x[order], y=given.y[order], upstream=given.upstream[order])
    ours, plain = compute(call, moved), compute(call, given)
    plain["loss"], plain["dx"] = plain["loss"][order], plain["dx"][order]
    holds(call, ours, plain)


@settings(max_examples=40 * MORE)
@hypothesis.given(call=small, seed=st.integers(0, 100))
def test_the_order_of_the_classes(call: Call, seed: int) -> None:
    given, options = call.given(), call.options()
    order = torch.randperm(call.c, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    bias, weight = given.bias, options["class_weight"]
    moved = replace(given, w=given.w[order], y=place[given.y], bias=None if bias is None else bias[order])
    ours = compute(call, moved, class_weight=None if weight is None else weight[order])
    plain = compute(call, given)
    plain = {key: value[order] if key in ("dw", "db") else value for key, value in plain.items()}
    holds(call, ours, plain)


@settings(max_examples=40 * MORE)
@hypothesis.given(call=small)
def test_one_sample_at_a_time(call: Call) -> None:
    """Losses do not know of each other, and gradients of W add up."""
    given = call.given()
    together = compute(call, given)
    alone = [
        compute(call, replace(given, x=given.x[i : i + 1], y=given.y[i : i + 1], upstream=given.upstream[i : i + 1]))
        for i in range(call.n)
    ]
    joined: dict[str, Callable[[list[Tensor]], Tensor]] = {"loss": torch.cat, "dx": torch.cat}
    holds(call, {key: joined.get(key, sum)([one[key] for one in alone]) for key in together}, together)


@settings(max_examples=40 * MORE)
@hypothesis.given(call=small, seed=st.integers(0, 100))
def test_sampled_classes_are_a_smaller_weight(call: Call, seed: int) -> None:
    """Walking some rows is the loss of the matrix of those rows; the others' gradient is exactly 0."""
    given, options = call.given(), call.options()
    ids = tm.sample_classes(given.y, call.c, call.c // 2, torch.Generator().manual_seed(seed))
    part = replace(
        given,
        w=given.w[ids],
        y=torch.searchsorted(ids, given.y),
        bias=None if given.bias is None else given.bias[ids],
    )
    weight = options["class_weight"]
    expected = compute(call, part, class_weight=None if weight is None else weight[ids])
    for sparse in (False, True):
        ours = compute(call, given, class_ids=ids, sparse_grad=sparse)
        for key in ("dw", "db"):
            if key in ours:
                others = torch.ones(call.c, dtype=torch.bool)
                others[ids] = False
                assert not ours[key][others].any()
                ours[key] = ours[key][ids]
        holds(call, ours, expected)
    everything = compute(call, given, class_ids=torch.arange(call.c))
    holds(call, everything, compute(call, given))


@settings(max_examples=40 * MORE)
@hypothesis.given(call=small, power=st.integers(-30, 30), ease=st.sampled_from(["x", "w"]))
def test_the_length_of_a_row_that_is_normalised(call: Call, power: int, ease: str) -> None:
    """Twice the length: the same loss, half the gradient."""
    margin = call.loss()
    if not (margin.unit_embeddings if ease == "x" else margin.unit_weight):
        return
    given, factor = call.given(), 2.0**power
    longer = replace(given, **{ease: getattr(given, ease) * factor})
    ours, plain = compute(call, longer), compute(call, given)
    ours[f"d{ease}"] = ours[f"d{ease}"] * factor
    holds(call, ours, plain)


@settings(max_examples=40 * MORE)
@hypothesis.given(call=small, shift=st.floats(-50.0, 50.0))
def test_a_common_bias(call: Call, shift: float) -> None:
    """The same number on all logits changes nothing; its gradient sums to 0 where it only moves them together."""
    given = call.given()
    if given.bias is None:
        given = replace(given, bias=torch.zeros(call.c, dtype=torch.float64))
    ours, plain = compute(call, replace(given, bias=given.bias + shift)), compute(call, given)
    tolerance = near(call, given, 2.2e-16) + 1e-11 * call.c
    assert_same(ours, plain, 1e-8, tolerance, call)
    assert abs(float(ours["db"].sum())) <= tolerance * call.c


@settings(max_examples=40 * MORE)
@hypothesis.given(call=small, a=st.floats(-3.0, 3.0), seed=st.integers(0, 100))
def test_gradients_are_linear_in_the_upstream_gradient(call: Call, a: float, seed: int) -> None:
    given = call.given()
    other = made(call.n, seed=seed)
    mixed = compute(call, replace(given, upstream=given.upstream + a * other))
    one, two = compute(call, given), compute(call, replace(given, upstream=other))
    expected = {key: one[key] if key == "loss" else one[key] + a * two[key] for key in one}
    holds(call, mixed, expected)


@settings(max_examples=40 * MORE)
@hypothesis.given(call=small, kind=transformed)
def test_mean_and_sum_are_those_of_the_single_losses(call: Call, kind: str) -> None:
    given, options = call.given(), call.options()
    given.y[0] = -1
    losses, mean, total = (
        run(tm.margin_cross_entropy, given, KINDS[kind], **{**options, "reduction": reduction})["loss"]
        for reduction in ("none", "mean", "sum")
    )
    torch.testing.assert_close(total, losses.sum())
    weight = options["class_weight"]
    divisor = call.n - 1 if weight is None else weight[given.y[1:]].sum()
    torch.testing.assert_close(mean, losses.sum() / divisor)
    assert losses[0] == 0.0
