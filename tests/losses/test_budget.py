"""How exact: the error against float64 is at most twice that of the usual code in the same dtype, and where that code
loses everything (p_y near 1 and 0, rows of very different ease, bfloat16 near p_y = 1) ours does not.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    HALVES,
    KINDS,
    ONE_CHUNK,
    Problem,
    assert_rows_close,
    assert_same,
    at_angle,
    every_backend,
    every_kind,
    every_margin,
    every_objective,
    labels,
    made,
    oracle,
    rms,
    run,
    streamed,
)
from torch import Tensor

import tritonmargin as tm
from tritonmargin.margins import MARGINS, TargetRows

# -- the budget ----------------------------------------------------------------------------------------------------


def usual(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    margin: tm.Margin,
    bias: Tensor | None = None,
    objective: str = "softmax",
    label_smoothing: float = 0.0,
    reduction: str = "none",
) -> Tensor:
    """What people write, in the dtype of its inputs: normalise, F.linear, target replaced, scale, F.cross_entropy."""
    assert reduction == "none"
    s = margin.s if margin.unit_embeddings else 1.0
    x_norm, w_norm = x.norm(dim=1), w[y].norm(dim=1)
    cos = F.linear(F.normalize(x) if margin.unit_embeddings else x, F.normalize(w) if margin.unit_weight else w)
    own = F.one_hot(y, len(w)).bool()
    z = s * cos
    scale = s if margin.unit_embeddings else x_norm
    scale = scale if margin.unit_weight else scale * w_norm
    t = margin.target_logit(TargetRows(z[own], x_norm, w_norm, scale, y)).to(z.dtype)
    if bias is not None:
        z, t = z + bias, t + bias[y]
    if objective == "softmax":
        return F.cross_entropy(torch.where(own, t[:, None], z), y, reduction="none", label_smoothing=label_smoothing)
    others = z.masked_fill(own, -torch.inf)
    if objective == "hinge":
        return (others - t[:, None]).relu().sum(dim=1)
    return ((others.logsumexp(dim=1) if objective == "lse-hinge" else others.max(dim=1).values) - t).relu()


def drawn(
    regime: str, margin: tm.Margin, seed: int, bias: bool = False, n: int = 48, d: int = 33, c: int = 5 * ONE_CHUNK + 1
) -> Problem:
    """Embeddings as they are at first, when trained, when they sit at a wrong class; no two samples alike."""
    w, y = made(c, d, seed=10 * seed), labels(c, n, seed)
    x, wrong = made(n, d, seed=10 * seed + 1), w[(y + 1) % c]
    towards = {"untrained": 0.0 * x, "trained": w[y], "mixed": torch.where((y % 2 == 0)[:, None], w[y], wrong)}[regime]
    x = towards + (0.3 + made(n, seed=10 * seed + 2).abs())[:, None] * x
    if not (margin.unit_embeddings and margin.unit_weight):
        # Logits that a network has, below about 30, not D |x| |w|.
        x = x / (2.0 if margin.unit_weight else d**0.5) / (16.0 if margin.unit_embeddings else 1.0)
        w = w / (d**0.5 if margin.unit_embeddings else 1.0)
    return Problem(x, w, y, made(n, seed=10 * seed + 3), made(c, seed=10 * seed + 4) if bias else None)


LOW = (torch.float32, *HALVES)
REGIMES = ["untrained", "trained", "mixed"]
every_regime = pytest.mark.parametrize("regime", REGIMES)


@every_objective
@every_margin
def test_the_usual_code_is_the_same_loss(name: str, objective: str) -> None:
    """A budget from a baseline that computes something else would be no budget."""
    for regime in REGIMES:
        given, margin = drawn(regime, MARGINS[name](), 0, bias=True), MARGINS[name]()
        usually = run(usual, given, margin, objective=objective, reduction="none")
        assert_same(usually, oracle(given, margin, objective=objective, reduction="none"), 1e-9, 1e-11)


@every_backend
@pytest.mark.parametrize("dtype", LOW, ids=str)
@every_regime
@every_objective
@every_margin
def test_error_is_at_most_twice_that_of_the_usual_code(
    name: str, objective: str, regime: str, dtype: torch.dtype, backend: str
) -> None:
    check_budget(MARGINS[name](), regime, dtype, range(4), objective=objective, backend=backend)


@every_backend
@pytest.mark.parametrize("s", [8.0, 16.0, 30.0, 64.0, 79.0])
@every_regime
def test_error_of_bounded_logits_at_every_scale(regime: str, s: float, backend: str) -> None:
    """exp(z) without a maximum, and f = g exp(-rest) with its power of e: exponents of up to 85, rounded to 4e-6.

    Many samples, so that a ratio of 2 is no accident of a few.
    """
    check_budget(tm.NormFace(s=s), regime, torch.float32, range(25), backend=backend)


@every_backend
@pytest.mark.parametrize("dtype", LOW, ids=str)
@every_regime
@every_kind
def test_error_with_bias_and_with_label_smoothing(kind: str, regime: str, dtype: torch.dtype, backend: str) -> None:
    check_budget(KINDS[kind], regime, dtype, range(4), bias=True, backend=backend)
    check_budget(KINDS[kind], regime, dtype, range(4), label_smoothing=0.1, backend=backend)


def decided(given: Problem, margin: tm.Margin, eps: float) -> Tensor:  # [N] bool
    """Samples whose hardest class is the same after logits are rounded; the others' gradient is a draw of lots."""
    x, w = given.x.double(), given.w.double()
    z = (F.normalize(x) * margin.s if margin.unit_embeddings else x) @ (F.normalize(w) if margin.unit_weight else w).T
    largest = z.scatter(1, given.y[:, None], -torch.inf).topk(2, dim=1).values
    return largest[:, 0] - largest[:, 1] > 2.0 * eps * z.abs().amax(dim=1)


def check_budget(
    margin: tm.Margin,
    regime: str,
    dtype: torch.dtype,
    seeds: range,
    backend: str = "torch",
    bias: bool = False,
    **options: object,
) -> None:
    ours: dict[str, list[Tensor]] = {}
    plain: dict[str, list[Tensor]] = {}
    exact: dict[str, list[Tensor]] = {}
    options["reduction"] = "none"
    for seed in seeds:
        given = drawn(regime, margin, seed, bias)
        if options.get("objective") == "hinge":
            given = replace(given, upstream=given.upstream / 64.0)  # sums over all classes have to fit float16
        given = given.to(dtype)
        if options.get("objective") == "max-hinge":
            given = replace(given, upstream=given.upstream * decided(given, margin, torch.finfo(dtype).eps))
        for results, found in (
            (exact, oracle(given, margin, **options)),
            (ours, streamed(given, margin, backend=backend, **options)),
            (plain, run(usual, given, margin, **options)),
        ):
            for key, value in found.items():
                results.setdefault(key, []).append(value.double())
    for key, values in exact.items():
        truth = torch.stack(values)
        a, b = (rms(torch.stack(results[key]) - truth) for results in (ours, plain))
        # One rounding of the result itself, about eps/5 RMS, is allowed even where the usual code happens to make none
        # (a gradient of whole numbers). Where that code is not finite, as in float16, anything finite is better.
        floor = 0.25 * torch.finfo(torch.float32 if key == "loss" else dtype).eps * rms(truth)
        assert math.isfinite(a), key
        assert not a > 2.0 * b + floor, (
            f"{key}: {a:.3g} against {b:.3g}, {a / max(b, 1e-300):.2f} times, floor {floor:.3g}"
        )


# -- where the usual code loses everything ------------------------------------------------------------------------


def spread(dtype: torch.dtype, s: float, d: int = 24) -> Problem:
    """Easy and hopeless samples side by side: targets at cosines from 1 to -1 and one rival for every sample."""
    c = 3 * ONE_CHUNK + 1
    cosines = torch.tensor([1.0, 0.999, 0.95, 0.9, 0.7, 0.5, 0.3, 0.0, -0.3, -0.7, -0.9, -1.0], dtype=torch.float64)
    n = len(cosines)
    w = made(c, d, seed=1)
    y = torch.arange(n) * 16 + 1
    # Some samples lean towards another class, which is then nearly as right as can be.
    aside = torch.where(torch.arange(n)[:, None] % 2 == 0, w[y + 3], made(n, d, seed=2))
    return Problem(at_angle(cosines, w[y], aside), w, y, made(n, seed=3)).to(dtype)


@every_backend
@pytest.mark.parametrize("s", [64.0, 80.0, 30.0])
@pytest.mark.parametrize("make", [tm.NormFace, tm.CosFace, tm.ArcFace])
def test_no_sample_loses_its_gradient_in_float32(make: type[tm.Margin], s: float, backend: str) -> None:
    """p_y from 1 - 1e-26 to 1e-50 in one batch, each row to its own precision.

    exp(rest) covers 1e-30 to 1e+30, the gradients of the samples 1e-26 to 1. 80 is just on the bounded side of the
    switch for 193 classes, the most that the product of factors has to bear.
    """
    given = spread(torch.float32, s)
    margin = make(s=s)
    ours = streamed(given, margin, reduction="none", backend=backend)
    expected = oracle(given, margin, reduction="none")
    assert expected["loss"].min() < 1e-6 or make is not tm.NormFace
    assert expected["loss"].max() > s
    # A logit is exact to 1e-7 of s, and so are the logs of everything.
    assert_rows_close(ours["loss"], expected["loss"], 2e-6 * s, what="loss")
    # At cos = +-1 the tangent is noise (see above): those samples and classes are held by the test before this one.
    others = torch.ones(len(given.w), dtype=torch.bool)
    others[given.y[[0, -1]]] = False
    assert_rows_close(ours["dx"][1:-1], expected["dx"][1:-1], 1e-5 * s, what="dx")
    assert_rows_close(ours["dw"][others], expected["dw"][others], 1e-5 * s, what="dw")


@every_backend
def test_gradients_of_easy_rows_alone_reach_every_class(backend: str) -> None:
    """All samples at p_y = 1 - 1e-17: gradients of 1e-17 and below, in float32, none of them lost."""
    given = spread(torch.float32, 64.0)
    given = replace(given, x=given.w[given.y] + 0.01 * made(*given.x.shape, seed=5).float())
    ours = streamed(given, tm.NormFace(), reduction="none", backend=backend)
    expected = oracle(given, tm.NormFace(), reduction="none")
    assert expected["loss"].min() < 1e-10
    assert_same(ours, expected, 2e-4)


@every_backend
@pytest.mark.parametrize("power", [-24, 0, 24, 40])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("easy", [True, False])
def test_upstream_gradients_of_any_size(easy: bool, smoothing: float, power: int, backend: str) -> None:
    """A loss scaled for float16, or a weight per sample: the gradient scales along, up to rounding."""
    w = torch.eye(8)
    y = torch.zeros(256, dtype=torch.int64)
    x = w[y] + 0.02 * made(256, 8).float() if easy else made(256, 8).float()
    given = Problem(x, w, y, torch.ones(256))
    scaled = replace(given, upstream=given.upstream * 2.0**power)
    options = {"label_smoothing": smoothing, "reduction": "none", "backend": backend}
    ours, plain = streamed(scaled, tm.NormFace(), **options), streamed(given, tm.NormFace(), **options)
    for key in ("dx", "dw"):
        assert_rows_close(ours[key] * 2.0**-power, plain[key], 1e-4, what=key)


@every_backend
@pytest.mark.parametrize("p", [0.9, 0.999, 0.99999])
def test_classifier_gradients_in_bfloat16_near_p_of_one(p: float, backend: str) -> None:
    """p_y - 1 formed in bfloat16 is off by up to 100 % at p_y = 0.999, where training spends its time."""
    c, d = 2 * ONE_CHUNK + 1, 192
    y = torch.tensor([5, 70, 128])
    own = math.log(p / (1.0 - p) * (c - 1.0))
    for margin, x in ((tm.Softmax(), own * torch.eye(c, d)[y]), (tm.NormFace(s=64.0), facing(own, y, c, d))):
        given = Problem(x, torch.eye(c, d), y, torch.ones(3)).to(torch.bfloat16)
        expected = oracle(given, margin, reduction="none")
        assert math.exp(-expected["loss"][0]) == pytest.approx(p, rel=0.02)
        ours = streamed(given, margin, reduction="none", backend=backend)
        assert ours["dw"].dtype == torch.bfloat16
        # A logit of a rival is near 0 and so is its error; the stored gradient rounds by 2^-9.
        assert_rows_close(ours["dw"][y], expected["dw"][y], 2.0**-7, what="rows of the targets")
        assert_rows_close(ours["loss"], expected["loss"], 2.0**-7, what="loss")
    rounded = torch.tensor(p).bfloat16() - 1.0
    assert p < 0.99 or abs(float(rounded) / (p - 1.0) - 1.0) > 0.5  # the failure itself


def facing(logit: float, y: Tensor, c: int, d: int) -> Tensor:
    """Unit rows whose logit at s = 64 is `logit` for their own class and 0 for all others."""
    cosine = torch.full((len(y),), logit / 64.0)
    return at_angle(cosine, torch.eye(c, d)[y], torch.eye(d)[torch.full((len(y),), d - 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_keeps_its_relative_precision_at_both_ends(dtype: torch.dtype) -> None:
    """logsumexp - t is 0 below 1e-7; log(p clamped at 1e-30) is stuck at 69.08."""
    w = torch.eye(4, dtype=dtype)
    y = torch.zeros(5, dtype=torch.int64)
    t = torch.tensor([40.0, 20.0, 0.0, -80.0, -1000.0], dtype=dtype)
    loss = tm.margin_cross_entropy(t[:, None] * w[y], w, y, tm.Softmax(), reduction="none")
    exact = [math.log1p(3.0 * math.exp(-value)) if value > -700 else math.log(3.0) - value for value in t.tolist()]
    assert exact[0] == pytest.approx(1.27e-17, rel=1e-2)
    assert loss.tolist() == pytest.approx(exact, rel=4.0 * 40.0 * torch.finfo(dtype).eps)
    # The same ends at s = 64, where cosines are all there is.
    x = at_angle(torch.tensor([1.0, -1.0], dtype=torch.float64), torch.eye(4)[:1].double().expand(2, 4), made(2, 4))
    losses = tm.margin_cross_entropy(x.to(dtype), w, y[:2], tm.NormFace(), reduction="none")
    assert losses.tolist() == pytest.approx([3.0 * math.exp(-64.0), 64.0 + math.log(3.0)], rel=1e-5)
