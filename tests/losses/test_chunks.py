"""Chunks and retained logits of the class pass: the same result for any, and what a call costs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import (
    KINDS,
    ONE_CHUNK,
    Cost,
    Problem,
    asked,
    cost,
    cpu_only,
    every_backend,
    every_kind,
    every_margin,
    every_objective,
    made,
    problem,
    streamed,
)
from torch import Tensor

import tritonmargin as tm
from tritonmargin.class_pass.chunks import chunk_classes, retained_classes
from tritonmargin.class_pass.forward import Saved, run_forward
from tritonmargin.margins import MARGINS

EVERYTHING = 10**9
CHUNKS = 3  # of 64, 64 and 3 classes
CLASSES = 2 * ONE_CHUNK + 3


# -- chunks and retained tiles -------------------------------------------------------------------------------------


def test_chunk_classes_is_what_the_budget_allows() -> None:
    for n, d, budget in ((256, 512, 8 << 20), (1024, 512, 1 << 24), (32, 64, 1 << 20)):
        chunk = chunk_classes(n, d, 10**6, budget)
        assert chunk % 64 == 0
        assert chunk * (n + 2 * d) * 4 <= budget < (chunk + 64) * (n + 2 * d) * 4
        assert chunk_classes(n, d, 100, budget) == 100
    assert chunk_classes(4, 4, 1000, 1) == ONE_CHUNK
    assert chunk_classes(4, 4, 0, 1) == 1
    assert chunk_classes(0, 4, 10, 1) == 10
    assert chunk_classes(256, 512, 10**6, 0) >= 64  # the machine's own budget


def test_retained_classes_are_whole_chunks_or_all() -> None:
    assert retained_classes(10, 1000, 64, 4, 0) == 0
    assert retained_classes(10, 1000, 64, 4, 64 * 40 - 1) == 0
    assert retained_classes(10, 1000, 64, 4, 64 * 40) == 64
    assert retained_classes(10, 1000, 64, 4, 3 * 64 * 40 - 1) == 128
    assert retained_classes(10, 1000, 64, 4, 1000 * 40 - 1) == 960
    assert retained_classes(10, 1000, 64, 4, 1000 * 40) == 1000
    assert retained_classes(0, 1000, 64, 4, 10**4) == 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_objective
@every_kind
@every_backend
def test_promise_same_result_for_any_chunk_size_and_retained_tiles(
    backend: str, kind: str, objective: str, dtype: torch.dtype
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels leave float64 to the torch backend")
    given = problem(6, 9, CLASSES, bias=kind == "raw rows").to(dtype)
    options = {"objective": objective, "reduction": "none", "backend": backend}
    expected = streamed(given, KINDS[kind], chunk_bytes=EVERYTHING, **options)
    one_chunk = ONE_CHUNK * 6 * dtype.itemsize
    for chunk, retain in itertools.product((1, EVERYTHING), (0, one_chunk, EVERYTHING)):
        ours = streamed(given, KINDS[kind], chunk_bytes=chunk, retain_bytes=retain, **options)
        for key, value in ours.items():
            error, size = (value.double() - expected[key].double()).norm(), expected[key].double().norm()
            assert error <= 16.0 * torch.finfo(dtype).eps * max(KINDS[kind].s, 8.0) * size + 1e-30, (key, chunk, retain)


@pytest.mark.parametrize("objective", ["softmax", "max-hinge"])
def test_low_precision_rows_are_rounded_once_wherever_they_are_made(objective: str) -> None:
    """Raw rows' gradients are made in place, listed classes' in a buffer: the same bits, for many samples a row too."""
    given = problem(60, 24, 300, seed=1).to(torch.bfloat16)
    y = given.y % 7 * 30  # 7 rows with some nine samples each, over several chunks
    given = replace(given, x=given.x.requires_grad_(), w=given.w.requires_grad_(), y=y)
    found = [
        torch.autograd.grad(
            tm.margin_cross_entropy(given.x, given.w, given.y, tm.Softmax(), objective=objective, chunk_bytes=1,
                                    class_ids=ids),
            (given.x, given.w),
        )
        for ids in (None, torch.arange(300, device=given.w.device))
    ]  # fmt: skip
    for direct, buffered in zip(*found, strict=True):
        assert torch.equal(direct, buffered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_objective
@every_margin
def test_a_second_run_is_bitwise_the_same(name: str, objective: str, dtype: torch.dtype) -> None:
    """Classes drawn twice and thrice, so that a sum over samples in another order would show."""
    given, margin = problem(40, 9, CLASSES), MARGINS[name]()
    given = replace(given, y=given.y % 7).to(dtype)
    for retain in (0, EVERYTHING):
        runs = [streamed(given, margin, objective=objective, retain_bytes=retain) for _ in range(2)]
        for key, value in runs[0].items():
            assert torch.equal(value, runs[1][key])


# -- what a call costs ---------------------------------------------------------------------------------------------


def step(given: Problem, margin: tm.Margin, frozen: str = "", shapes: bool = True, **options: object) -> list[Cost]:
    """Costs of forward and of backward, the leaves named in `frozen` without a gradient."""
    leaves = {name: getattr(given, name).clone().requires_grad_(name not in frozen) for name in ("x", "w")}
    bias = None if given.bias is None else given.bias.clone().requires_grad_("b" not in frozen)
    found: list[Tensor] = []

    def forward() -> None:
        options.setdefault("chunk_bytes", 1)
        loss = tm.margin_cross_entropy(leaves["x"], leaves["w"], given.y, margin, bias=bias, **options)
        found.append(loss[0] if isinstance(loss, tuple) else loss)

    def backward() -> None:
        found[0].backward()

    return [cost(forward, shapes)] + ([cost(backward, shapes)] if found[0].requires_grad else [])


@cpu_only
@pytest.mark.parametrize("retain", [0, ONE_CHUNK * 6 * 4, EVERYTHING], ids=["none", "one chunk", "everything"])
@pytest.mark.parametrize("frozen", ["", "x", "w", "xw"], ids=["nothing", "x", "w", "both"])
@every_objective
@every_kind
def test_matrix_products_per_chunk(kind: str, objective: str, frozen: str, retain: int) -> None:
    """One forward; backward one for the tile unless it was kept, one for each gradient that somebody wants."""
    given = problem(6, 9, CLASSES).to(torch.float32)
    costs = step(given, KINDS[kind], frozen, objective=objective, retain_bytes=retain)
    assert len(costs[0].products) == CHUNKS
    if frozen == "xw":
        assert len(costs) == 1
        return
    kept = 0 if retain == 0 else 1 if retain < EVERYTHING else CHUNKS
    backward = CHUNKS - kept + CHUNKS * (2 - len(frozen))
    # The hardest class is one row a sample: nothing to multiply.
    assert len(costs[1].products) == (0 if objective == "max-hinge" else backward)


@cpu_only
@pytest.mark.parametrize("frozen", ["", "x", "w"], ids=["nothing", "x", "w"])
@every_objective
@every_kind
def test_a_cpu_retains_all_logits_where_half_of_the_budget_has_room(kind: str, objective: str, frozen: str) -> None:
    """One byte less and there are as many products as without; and so with a chunk that the caller sized."""
    given = problem(6, 9, CLASSES).to(torch.float32)
    tiles, products = 6 * CLASSES * 4, 0 if objective == "max-hinge" else 2 - len(frozen)
    again = 0 if objective == "max-hinge" else 1
    for budget, chunk, expected in (
        (None, None, products),
        (20 * tiles, None, products),
        (2 * tiles, 10**6, products + again),
    ):
        options = {"objective": objective, "memory_budget": budget, "chunk_bytes": chunk}
        costs = step(given, KINDS[kind], frozen, **options)
        assert [len(each.products) for each in costs] == [1, expected], (budget, chunk)
    # Chunks of 64 classes now, so a retained tile shows in each of them.
    for budget, kept in ((2 * tiles, True), (2 * tiles - 1, False)):
        costs = step(given, KINDS[kind], frozen, objective=objective, memory_budget=budget, chunk_bytes=None)
        chunks = len(costs[0].products)
        assert chunks > 1
        assert len(costs[1].products) == chunks * (products if kept else products + again), budget


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_objective
@every_kind
def test_retained_logits_change_no_bit(kind: str, objective: str, dtype: torch.dtype) -> None:
    """Not even in low precision, with a bias or without a bound: kept is what backward would have made."""
    given = problem(6, 9, CLASSES, bias=kind == "raw rows").to(dtype)
    kept = streamed(given, KINDS[kind], objective=objective, retain_bytes=EVERYTHING)
    made_again = streamed(given, KINDS[kind], objective=objective)
    for key, value in made_again.items():
        assert torch.equal(kept[key], value), key


@cpu_only
def test_no_grad_keeps_no_tile() -> None:
    given = problem(16, 9, 40 * ONE_CHUNK).to(torch.float32)
    tiles = 16 * 40 * ONE_CHUNK * 4
    assert step(given, tm.ArcFace(), retain_bytes=EVERYTHING)[0].above(tiles) == 1
    with torch.no_grad():
        paid = step(given, tm.ArcFace(), retain_bytes=EVERYTHING)[0]
    assert paid.above(tiles) == 0
    assert len(paid.products) == 40
    leaves = given.x, given.w
    for retain, kept in ((-1, 1), (0, 0)):
        inputs, spec = asked(*leaves, given.y, torch.float32, retain_bytes=retain, chunk_bytes=0, memory_budget=10**7)
        saved = Saved(*run_forward(inputs, spec)[1])
        assert len(saved.retained) == kept * len(given.w)


BIG = {"n": 64, "d": 32, "c": 300 * ONE_CHUNK}
SOME = 4 * ONE_CHUNK * (64 + 2 * 32) * 4  # bytes of a chunk of 256 classes, of 19,200
MEMORY = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "class_weight": {"class_weight": made(BIG["c"]).float().abs() + 0.1},
    "stats": {"return_stats": True},
    "lse-hinge": {"objective": "lse-hinge"},
    "max-hinge": {"objective": "max-hinge"},
    "hinge": {"objective": "hinge"},
    "sampled": {"class_ids": torch.arange(0, BIG["c"], 2)},
    "sampled and sparse": {"class_ids": torch.arange(0, BIG["c"], 2), "sparse_grad": True},
    "sparse": {"sparse_grad": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MEMORY)
@every_kind
@every_backend
def test_nothing_as_large_as_the_logits_or_a_second_weight(
    backend: str, kind: str, name: str, dtype: torch.dtype
) -> None:
    """N x C does not exist, and C x D once: the gradient."""
    given = problem(**BIG, bias=kind == "raw rows").to(dtype)
    ids = MEMORY[name].get("class_ids")
    given = replace(given, y=given.y // 2 * 2) if ids is not None else given
    with tm.use_backend(backend):
        forward, backward = step(given, KINDS[kind], chunk_bytes=SOME, shapes=False, **MEMORY[name])
    rows = BIG["c"] if ids is None or "sparse" not in name else len(ids)
    weight, logits = BIG["c"] * BIG["d"] * dtype.itemsize, BIG["n"] * BIG["c"] * dtype.itemsize
    gradient = rows * BIG["d"] * dtype.itemsize
    assert forward.above(logits) + backward.above(logits) == 0
    # Vectors of C are allowed, and so is a chunk; together they do not reach half of W.
    assert forward.above(weight // 2) == 0
    assert backward.above(gradient // 2) == 1
    assert backward.peak < gradient + weight // 2
    assert forward.peak < weight // 2


def test_the_memory_test_notices_the_usual_code() -> None:
    given = problem(**BIG).to(torch.float32)
    with tm.use_backend("reference"):
        forward, backward = step(given, tm.ArcFace(), chunk_bytes=SOME)
    assert forward.above(BIG["n"] * BIG["c"] * 4) > 1
    assert forward.above(BIG["c"] * BIG["d"] * 4 // 2) > 1
    assert backward.above(BIG["c"] * BIG["d"] * 4 // 2) > 1


def test_autocast_makes_no_cast_copy_of_the_weight() -> None:
    given = problem(**BIG).to(torch.float32)
    with torch.autocast(given.x.device.type, torch.bfloat16):
        forward, backward = step(given, tm.ArcFace(), chunk_bytes=SOME, shapes=False)
    assert forward.above(BIG["c"] * BIG["d"]) == 0
    assert backward.above(BIG["c"] * BIG["d"]) == 1
