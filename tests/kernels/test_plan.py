"""Sizes, tiles and memory of a pass: pure functions; and the buffers that are really made."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DEVICE, MACHINE
from torch import Tensor

pytest.importorskip("triton")

from tritonmargin.backends.tiles import Device, pick_tiles
from tritonmargin.backends.triton import plan as plan_module
from tritonmargin.backends.triton.plan import Plan, Tile, copies, fits, kept_copies, make_plan, plan_for
from tritonmargin.spec import PassInputs, PassSpec

DEVICES = [
    Device("sm_80", 108, 80 << 30),
    Device("sm_90", 132, 140 << 30),
    Device("sm_100", 148, 180 << 30),
    Device("sm_89", 128, 24 << 30),
    Device("gfx942", 304, 192 << 30),
    Device("interpreter", 1, 4 << 30),
]
KINDS = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
SIZES = [(1024, 512, 1_000_000), (256, 128, 100_000), (32, 512, 30_000_000), (17, 33, 129), (16, 8192, 100_000)]


def every_plan(chunk_bytes: int = 0, retain_bytes: int = 0, budget: int | None = None):
    for device, (dtype, precision), (n, d, c), copied in itertools.product(DEVICES, KINDS, SIZES, (False, True)):
        limit = device.memory // 64 if budget is None else budget
        yield make_plan(n, d, c, device, dtype, precision, copied, limit, chunk_bytes, retain_bytes), dtype, limit


def forward_bytes(plan: Plan, dtype: torch.dtype, kept: int) -> int:
    """What a chunk of forward holds beside inputs, outputs and numbers per sample."""
    copied = 0 if plan.whole or not plan.copied else plan.forward_chunk * plan.line_d * dtype.itemsize
    room = plan.forward_chunk * plan.line_n * 4 if plan.library and plan.retained < plan.active else 0
    return kept + copied + room


def backward_bytes(plan: Plan, dtype: torch.dtype, kept: int) -> int:
    k, size = plan.backward_chunk, dtype.itemsize
    copied = 0 if plan.whole or not plan.copied else k * plan.line_d * size
    product = 0 if plan.finish_inside else k * plan.line_d * 4
    sums = k * -(-plan.n // plan.weigh.shape[1]) * 4
    return kept + copied + product + sums + k * plan.line_n * size


@pytest.mark.parametrize("budget", [None, 1, 3 << 20, 100 << 20])
def test_a_pass_holds_no_more_than_its_budget_or_one_tile(budget: int | None) -> None:
    for plan, dtype, limit in every_plan(budget=budget):
        kept = plan.active * plan.line_d * dtype.itemsize if plan.whole else 0
        assert kept <= limit // 2 or not kept
        if plan.forward_chunk > plan.reduce.shape[1]:
            assert forward_bytes(plan, dtype, kept) <= limit, plan
        if plan.backward_chunk > 128:
            assert backward_bytes(plan, dtype, kept) <= limit, plan


def test_a_budget_is_used() -> None:
    """Chunks twice as large would not fit, and a budget that everything fits leads to one chunk."""
    for plan, dtype, limit in every_plan(budget=100 << 20):
        if plan.backward_chunk < plan.active:
            twice = plan._replace(backward_chunk=2 * plan.backward_chunk + 128)
            assert backward_bytes(twice, dtype, 0) > (limit if not plan.whole else limit // 2)
    for plan, _, _ in every_plan(budget=1 << 50):
        assert plan.backward_chunk == plan.active
        assert plan.whole == plan.copied


@pytest.mark.parametrize("chunk_bytes", [0, 1, 1 << 20, 1 << 30])
@pytest.mark.parametrize("retain_bytes", [0, 1, 50 << 20, 1 << 50])
def test_chunks_are_whole_tiles_and_what_is_retained_is_whole_chunks(chunk_bytes: int, retain_bytes: int) -> None:
    for plan, _, _ in every_plan(chunk_bytes, retain_bytes):
        tile = plan.reduce.shape[1]
        assert plan.forward_chunk == plan.active or plan.forward_chunk % tile == 0
        assert plan.backward_chunk == plan.active or plan.backward_chunk % 128 == 0
        # Blocks of samples that `weigh` sums over are the lines' parts, and tiles of classes start where chunks do.
        assert plan.line % plan.weigh.shape[1] == plan.line % plan.reduce.shape[0] == 0
        assert 128 % plan.finish.shape[0] == 0
        assert not (plan.retained and not plan.library)
        assert plan.retained * plan.line_n * 4 <= retain_bytes
        if plan.library and 0 < plan.retained < plan.active:
            assert plan.retained % plan.forward_chunk == 0
        if plan.library and retain_bytes == 1 << 50:
            assert plan.retained == plan.active
        slots = -(-plan.forward_chunk // tile)
        assert slots * plan.n * 4 <= plan_module.SLOTS or plan.forward_chunk == tile


def test_every_combination_has_a_tile() -> None:
    targets = ("sm_80", "sm_90", "sm_100", "sm_89", "gfx942", "interpreter")
    for target, (dtype, precision), n, d, c in itertools.product(
        targets, KINDS, (1, 16, 17, 1000), (1, 17, 64, 512, 1024), (1, 63, 8192)
    ):
        plan = make_plan(n, d, c, Device(target, 132, 80 << 30), dtype, precision, False, 1 << 30, 0, 0)
        for tile in (plan.reduce, plan.weigh, plan.finish):
            assert all(size >= 16 and size & (size - 1) == 0 for size in tile.shape), tile
            assert tile.shape[1] // tile.split >= 16
            assert tile.shape[1] // tile.finer(True) >= 16
            assert 0 < tile.programs_for(n, c) <= max(tile.programs, -(-n // tile.shape[0]) * -(-c // tile.shape[1]))
        assert pick_tiles(target, dtype, n, d, c, precision=precision).block_n == plan.reduce.shape[0] or plan.library


def test_a_tile_that_needs_more_is_cut_finer_only_where_it_is_cut() -> None:
    tile = Tile((128, 128, 64), 4, 8, 3, 0, 0, False)
    assert [tile.finer(needed) for needed in (False, True)] == [4, 8]
    assert Tile((16, 32, 16), 1, 4, 1, 0, 0, False).finer(True) == 1
    assert Tile((16, 64, 16), 4, 4, 1, 0, 0, False).finer(True) == 4


# -- which rows are copied ---------------------------------------------------------------------------------------


def spec_of(dtype: torch.dtype, unit: bool = True, **changed: object) -> PassSpec:
    made = dict(
        unit_weight=unit, unit_embeddings=True, scale=8.0, bounded=True, want_rest=True, want_hardest=False,
        sparse=False, dtype=dtype, chunk_bytes=0, retain_bytes=0, backend="triton",
    )  # fmt: skip
    return PassSpec(**(made | changed))  # type: ignore[arg-type]


def test_rows_are_taken_as_they_are_where_that_is_as_exact() -> None:
    bf16, f16, f32 = (torch.zeros(64, 32, dtype=d) for d in (torch.bfloat16, torch.float16, torch.float32))
    ids = torch.arange(10)
    for weight, how, expected in (
        (bf16, spec_of(torch.bfloat16), False),
        (f32, spec_of(torch.bfloat16), True),
        (f16, spec_of(torch.float16, unit=False), False),
        (f16, spec_of(torch.float16), True),
        (f32, spec_of(torch.float32), False),
        (f32, spec_of(torch.float32, precision="tf32"), True),
    ):
        assert copies(weight, None, how) == expected
        assert copies(weight, ids, how)
    assert not kept_copies(bf16, bf16, None, spec_of(torch.bfloat16))
    assert kept_copies(bf16, bf16, ids, spec_of(torch.bfloat16))
    assert not kept_copies(bf16, bf16, ids, spec_of(torch.bfloat16, chunk_bytes=1))
    assert not kept_copies(bf16, bf16, ids, spec_of(torch.bfloat16, memory_budget=10 * 32 * 2))
    assert kept_copies(bf16, bf16, ids, spec_of(torch.bfloat16, memory_budget=10 * 32 * 2 * 2))


@pytest.mark.parametrize("d", [16, 17])
def test_rows_fit_where_lines_are_aligned(d: int) -> None:
    w = torch.zeros(20, d)
    assert fits(w) == (d == 16)
    assert not fits(torch.zeros(20, 40)[:, 4:20])
    assert not fits(torch.zeros(20, 32)[:, 1:17])
    assert fits(torch.zeros(20, 32)[:, 16:])
    assert not fits(torch.zeros(20, 32)[:, ::2])
    assert not fits(torch.zeros(16, 20).t())


# -- buffers -----------------------------------------------------------------------------------------------------


def shapes(tensors: tuple[Tensor, ...]) -> list[object]:
    return [(tuple(each.shape), each.dtype, each.stride()) for each in tensors]


@pytest.mark.skipif(MACHINE == "cpu", reason="kernels run on a GPU, under ttsem or in the interpreter")
@pytest.mark.parametrize("asks", ["rest", "hardest", "hinge", "mean"])
@pytest.mark.parametrize("kind", ["rows as they are", "copied", "copied by chunks", "sampled", "retained", "nothing"])
def test_fake_tensors_are_like_the_real_ones(kind: str, asks: str) -> None:
    from tritonmargin.backends.triton import numbers

    n, d, c = (0 if kind == "nothing" else 5), 16, 70
    x, w = torch.randn(n, d, device=DEVICE), torch.randn(c, d, device=DEVICE)
    w = w if kind != "copied" else w.half()
    ids = torch.arange(0, c, 2, device=DEVICE) if kind in ("copied by chunks", "sampled") else None
    inputs = PassInputs(
        x, w, torch.zeros(n, dtype=torch.int64, device=DEVICE), ids,
        mean_weight=torch.ones(c, device=DEVICE) if asks == "mean" else None,
        threshold=torch.zeros(n, device=DEVICE) if asks == "hinge" else None,
    )  # fmt: skip
    spec = spec_of(
        torch.float32, unit=kind != "sampled", want_rest=asks != "hinge", want_hardest=asks == "hardest",
        chunk_bytes=1 if kind == "copied by chunks" else 0, retain_bytes=10**6 if kind == "retained" else 0,
    )  # fmt: skip
    out, saved = numbers.forward(inputs, spec)
    fake_out, fake_saved = numbers.fake(inputs, spec)
    assert shapes(fake_out) == shapes(out)
    assert shapes(fake_saved) == shapes(saved)
    if kind == "retained" and MACHINE != "interpreter":
        assert plan_for(x, w, ids, spec).retained == c
