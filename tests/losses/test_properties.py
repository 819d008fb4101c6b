"""Hypothesis over shapes, dtypes, layouts and options: the stream is the reference, whatever is asked of it."""

from __future__ import annotations

import torch
from cases import DEVICE, FLOATS, HALVES, MORE, Problem, assert_rows_close, made, oracle, run, sampled, streamed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tritonmargin as tm
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES

LAYOUTS = ("contiguous", "transposed", "every other column", "reversed twice")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, in memory another way."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "every other column":
        return tensor.repeat_interleave(2, dim=1)[:, ::2]
    return tensor.flip(0).flip(0) if layout == "reversed twice" else tensor


@st.composite
def calls(draw: st.DrawFn) -> tuple[Problem, tm.Margin, dict[str, object]]:
    """A problem with its options, as legal as they are arbitrary. Labels repeat, and some samples are ignored."""
    n, d, c = draw(st.integers(1, 9)), draw(st.integers(2, 70)), draw(st.integers(1, 200))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    y = torch.randint(c, (n,), generator=generator, device="cpu").to(DEVICE)
    ignore_index = draw(st.sampled_from((-100, -1, 0, 3)))
    if draw(st.booleans()):
        y[:: draw(st.integers(1, 4))] = ignore_index
    objective = draw(st.sampled_from(sorted(OBJECTIVES)))
    options: dict[str, object] = {
        "objective": objective,
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "ignore_index": ignore_index,
        "retain_bytes": draw(st.sampled_from((0, 100 * n, 10**9))),
        "chunk_bytes": draw(st.sampled_from((1, 10**5, None))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 1.0))) if objective == "softmax" else 0.0,
        "class_weight": made(c, seed=seed + 5).abs() + 0.1 if draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        kept = y[y != ignore_index]
        options["class_ids"] = sampled(kept, c, draw(st.integers(1, c)), generator)
        options["sparse_grad"] = draw(st.booleans())
    problem = Problem(
        x=laid_out(made(n, d, seed=seed + 1), draw(st.sampled_from(LAYOUTS))),
        w=laid_out(made(c, d, seed=seed + 2) / d**0.5, draw(st.sampled_from(LAYOUTS))),
        y=y.to(draw(st.sampled_from((torch.int64, torch.int32)))),
        upstream=made(n, seed=seed + 3),
        bias=made(c, seed=seed + 4) if draw(st.booleans()) else None,
    )
    return problem.to(dtype), MARGINS[draw(st.sampled_from(sorted(MARGINS)))](), options


@settings(max_examples=200 * MORE)
@given(calls())
def test_any_call_is_the_reference(call: tuple[Problem, tm.Margin, dict[str, object]]) -> None:
    problem, margin, options = call
    double = problem.x.dtype == torch.float64
    ours, expected = run(tm.margin_cross_entropy, problem, margin, **options), oracle(problem, margin, **options)
    # A logit of 64 is exact to 64 eps; where a margin has a steep slope, at cos = +-1, so is what follows from it.
    rtol = 1e-8 if double else 2e-3
    size = max(float(value.abs().max()) for value in expected.values() if value.numel() and not value.isnan().any())
    for key, value in ours.items():
        torch.testing.assert_close(
            value.double(), expected[key], rtol=rtol, atol=rtol * max(size, 1.0) * 0.1, equal_nan=True, msg=None
        )


@settings(max_examples=60 * MORE)
@given(
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from(sorted(MARGINS)),
    st.sampled_from(sorted(OBJECTIVES)),
    st.booleans(),
    st.integers(0, 1000),
)
def test_dtypes_of_results(
    of_x: torch.dtype, of_w: torch.dtype, name: str, objective: str, autocast: bool, seed: int
) -> None:
    """Gradients have their parameter's dtype, the loss float32, or float64 if an input has it; all finite."""
    x, w = made(4, 8, seed=seed).to(of_x).requires_grad_(), made(90, 8, seed=seed + 1).to(of_w).requires_grad_()
    target = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, stats = tm.margin_cross_entropy(
            x, w, target, MARGINS[name](), objective=objective, chunk_bytes=1, return_stats=True
        )
    loss.backward()
    double = torch.float64 in (of_x, of_w)
    assert loss.dtype == stats.target_logit.dtype == (torch.float64 if double else torch.float32)
    assert (x.grad.dtype, w.grad.dtype) == (of_x, of_w)
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(w.grad).all()


@settings(max_examples=60 * MORE)
@given(st.sampled_from(sorted(MARGINS)), st.integers(1, 6), st.integers(2, 150), st.integers(0, 1000))
def test_more_classes_never_make_a_sample_easier(name: str, n: int, c: int, seed: int) -> None:
    """Every loss grows with the set of walked classes, and by nothing if a class is already walked."""
    problem = Problem(made(n, 6, seed=seed), made(c, 6, seed=seed + 1), torch.arange(n) % c, torch.ones(n))
    few = sampled(problem.y, c, c // 2, torch.Generator().manual_seed(seed))
    for objective in OBJECTIVES:
        options = {"objective": objective, "reduction": "none"}
        part = streamed(problem, MARGINS[name](), class_ids=few, **options)["loss"]
        whole = streamed(problem, MARGINS[name](), **options)["loss"]
        assert (whole >= part - 1e-9 * part.abs() - 1e-12).all()
        assert torch.equal(streamed(problem, MARGINS[name](), class_ids=torch.arange(c), **options)["loss"], whole)


@settings(max_examples=60 * MORE)
@given(st.sampled_from((*HALVES, torch.float32)), st.floats(0.1, 10.0), st.integers(0, 1000))
def test_normalised_losses_do_not_see_the_length_of_rows(dtype: torch.dtype, length: float, seed: int) -> None:
    problem = Problem(made(5, 9, seed=seed), made(100, 9, seed=seed + 1), torch.arange(5), made(5, seed=seed + 2))
    longer = Problem(problem.x * length, problem.w / length, problem.y, problem.upstream)
    for margin in (tm.ArcFace(), tm.CosFace(), tm.SphereFaceR()):
        plain, scaled = (oracle(given, margin, reduction="none") for given in (problem, longer))
        assert_rows_close(scaled["loss"], plain["loss"], 1e-9)
        ours = streamed(longer.to(dtype), margin, reduction="none")
        exact = oracle(longer.to(dtype), margin, reduction="none")
        tolerance = 0.05 if dtype in HALVES else 1e-4
        assert_rows_close(ours["loss"], exact["loss"], tolerance, 64 * tolerance * 0.1)
