"""The Triton kernels one by one, written for a GPU; conftest.py says on what machines they run.

Every output is nan before a kernel writes it. Sizes are one past a block in some direction. The expected values come
from float64 tensors, or from the torch backend's function of the same name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import DEVICE, MACHINE, made, passed
from counted import counting
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tritonmargin as tm
from tritonmargin.backends import precision as products
from tritonmargin.backends import registry as kernels
from tritonmargin.backends import torch_ops

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

from tritonmargin.kernels import tiles, triton_ops
from tritonmargin.kernels.triton_ops import Running, Shares

TTSEM = MACHINE.startswith("ttsem")
# The interpreter multiplies bfloat16 operands wrongly (Triton 3.6 to 3.9).
DTYPES = [torch.float32, torch.float16] + ([] if MACHINE == "interpreter" else [torch.bfloat16])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (N, K, D), and why.
SIZES = {
    "one of everything": (1, 1, 1),
    "one class past a tile": (5, 129, 16),
    "one sample past a tile": (17, 40, 24),
    "width past a block": (6, 70, 65),
    "several tiles in every direction": (130, 140, 130),
}
sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


in_the_kernel = pytest.mark.usefixtures("tf32")  # products of float32, which the library makes otherwise


@pytest.fixture(params=[*DTYPES, *([] if MACHINE == "interpreter" else ["tf32"])], ids=str)
def numbers(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    """The operands' dtype, and one that is as fine as their products: float16 has TF32's ten bits."""
    if request.param == "tf32":
        request.getfixturevalue("tf32")
        return torch.float32, torch.float16
    return request.param, request.param


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return made(*shape, seed=seed).to(dtype)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def unwritten_tile(n: int, k: int, dtype: torch.dtype) -> Tensor:
    tile = triton_ops.new_tile(unwritten(n, 1, dtype=dtype), k, dtype)
    return tile.fill_(math.nan)


def close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, size: float = 8.0, floor: float = 0.0
) -> None:
    """Within `size` roundings of the largest number, or of `floor` where larger ones cancelled."""
    assert actual.shape == expected.shape
    expected, actual = expected.double(), actual.double()
    scale = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 1.0
    scale, eps = max(scale, floor), torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=size * eps, atol=size * eps * scale, equal_nan=True)


# -- prepare_rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "transposed", "every other row", "every other column"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("sampled", [False, True], ids=["range", "ids"])
@dtypes
def test_prepare_rows(dtype: torch.dtype, sampled: bool, unit: bool, layout: str) -> None:
    c, d, start, stop = 70, 33, 5, 57
    w = {
        "dense": lambda: random(c, d, seed=1),
        "transposed": lambda: random(d, c, seed=1).t(),
        "every other row": lambda: random(2 * c, d, seed=1)[::2],
        "every other column": lambda: random(c, 2 * d, seed=1)[:, ::2],
    }[layout]()
    w[11] = 0.0
    ids = torch.arange(c, device=DEVICE)[torch.arange(c) % 7 != 3] if sampled else None
    rows, wide = unwritten(64, d, dtype=dtype), unwritten(64, d)
    found = triton_ops.prepare_rows(w, ids, start, stop, unit, rows, wide)
    chunk = (w if ids is None else w[ids])[start:stop].double()
    norm = chunk.norm(dim=1, keepdim=True)
    expected = torch.where(norm > 0, chunk / norm, 0.0) if unit else chunk
    close(found.rows, expected, dtype, 2.0)
    if unit:
        close(found.exact, expected)
        close(found.inverse, torch.where(norm > 0, 1.0 / norm, 0.0)[:, 0])
        assert rows[stop - start :].isnan().all()
        assert wide[stop - start :].isnan().all()
    else:
        assert found.inverse is None


def test_prepare_rows_uses_the_weight_itself_where_nothing_changes() -> None:
    w = random(20, 16, seed=1)
    found = triton_ops.prepare_rows(w, None, 3, 9, False, unwritten(16, 16), None)
    assert found.rows.data_ptr() == w[3].data_ptr()


def test_prepare_rows_of_any_length() -> None:
    """Rows whose norm is outside of what a float32 can be squared to have none, as in torch."""
    w = torch.ones(5, 8, device=DEVICE) * torch.tensor([[0.0], [1e-39], [1e-12], [1.0], [1e12]], device=DEVICE)
    found = triton_ops.prepare_rows(w, None, 0, 5, True, unwritten(16, 8), None)
    expected = torch_ops.prepare_rows(w, None, 0, 5, True, unwritten(16, 8), unwritten(16, 8))
    close(found.rows, expected.rows)
    close(found.inverse, expected.inverse)


# -- reduce_chunk ------------------------------------------------------------------------------------------------


def operands(n: int, k: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, rows and targets, of which some are in the chunk that starts at 3, some before, behind, and nowhere."""
    x, rows = random(n, d, seed=1, dtype=dtype), random(k, d, seed=2, dtype=dtype) / math.sqrt(d)
    target = torch.arange(n, device=DEVICE) * 3 % (k + 6)
    target[::5] = -1
    return x, rows, target


def logits(x: Tensor, rows: Tensor, bias: Tensor | None, target: Tensor, start: int) -> Tensor:  # [N, K]
    z = x.double() @ rows.double().T + (0.0 if bias is None else bias.double())
    own = target[:, None] == start + torch.arange(len(rows), device=DEVICE)
    return z.masked_fill(own, -math.inf)


def running(n: int, k: int, like: Tensor, bounded: bool = False, threshold: Tensor | None = None) -> Running:
    slots = triton_ops.slots(like, k)

    def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((slots, n), value, dtype=dtype, device=DEVICE)

    return Running(
        total=full(0.0),
        maximum=None if bounded else full(-math.inf),
        hardest=full(-math.inf),
        hardest_row=full(-1, torch.int64),
        threshold=threshold,
        hinge=None if threshold is None else full(0.0),
        violations=None if threshold is None else full(0.0),
    )


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("path", ["bounded", "online", "online with bias", "hinge"])
@sizes
def test_reduce_chunk(numbers: tuple[torch.dtype, torch.dtype], size: str, path: str, keep: bool) -> None:
    """Two chunks folded one after the other, the second shorter by one class and its scratch the tile where it may."""
    dtype, fine = numbers
    sums = torch.float32 if fine == dtype else fine  # low precision's products are exact
    n, k, d = SIZES[size]
    x, rows, target = operands(n, k, d, dtype)
    bias = random(k, seed=3, dtype=dtype) if path == "online with bias" else None
    threshold = random(n, seed=4) if path == "hinge" else None
    run = running(n, k, x, path == "bounded", threshold)
    found = []
    for start, last, apart in ((3, k, True), (3 + k, max(1, k - 1), False)):
        tile = unwritten_tile(n, last, dtype)
        scratch = unwritten_tile(n, last, dtype) if apart else tile
        b = None if bias is None else bias[:last]
        triton_ops.reduce_chunk(rows[:last], x, b, target, start, path == "bounded", tile, scratch, keep, run)
        z = logits(x, rows[:last], b, target, start)
        found.append(z)
        kept = z.exp2() if path == "bounded" else z
        if keep:
            close(tile.t(), kept, fine)
        elif apart:
            assert tile.isnan().all()
    z = torch.cat(found, dim=1)
    rounded = dtype if keep and path != "bounded" and fine == dtype else sums
    scale = 1.0 + float(z[z.isfinite()].abs().max()) if z.isfinite().any() else 1.0
    if path == "bounded":
        close(run.total.sum(dim=0), z.exp2().sum(dim=1), sums, 32.0)
    else:
        total = (run.total.double() * torch.exp(run.maximum.double())).sum(dim=0)
        close(total.log(), z.logsumexp(dim=1), rounded, scale * 8.0)
    hardest = run.hardest.amax(dim=0)
    close(hardest, z.amax(dim=1), rounded)
    row = torch.where(run.hardest == hardest, run.hardest_row, 10**9).amin(dim=0)
    if rounded == torch.float32:
        index = torch.cat([torch.arange(3, 3 + k), torch.arange(3 + k, 3 + k + max(1, k - 1))]).to(DEVICE)
        expected = torch.where(z.amax(dim=1) == -math.inf, -1, index[z.argmax(dim=1)])
        assert torch.equal(torch.where(hardest == -math.inf, -1, row), expected)
    if threshold is not None:
        excess = (z - threshold.double()[:, None]).relu()
        close(run.hinge.sum(dim=0), excess.sum(dim=1), rounded, 32.0)
        if rounded == torch.float32:
            assert torch.equal(run.violations.sum(dim=0), (excess > 0).sum(dim=1).float())


def test_reduce_chunk_breaks_ties_by_the_lowest_class() -> None:
    x, rows = torch.ones(3, 16, device=DEVICE), torch.ones(300, 16, device=DEVICE)
    run = running(3, 300, x)
    target = torch.tensor([0, 5, 299], device=DEVICE)
    tile = unwritten_tile(3, 300, x.dtype)
    triton_ops.reduce_chunk(rows, x, None, target, 0, False, tile, tile, False, run)
    assert run.hardest_row[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("path", ["bounded", "online", "hinge"])
def test_not_a_number_comes_out_where_it_went_in(path: str) -> None:
    """In the samples that see it, of all four numbers."""
    x, rows, target = operands(20, 140, 16, torch.float32)
    x[7] = math.nan
    threshold = random(20, seed=4) if path == "hinge" else None
    run = running(20, 140, x, path == "bounded", threshold)
    tile = unwritten_tile(20, 140, x.dtype)
    triton_ops.reduce_chunk(rows, x, None, target, 3, path == "bounded", tile, tile, False, run)
    numbers = [run.total.sum(dim=0), run.hardest.amax(dim=0)] + ([] if threshold is None else [run.hinge.sum(dim=0)])
    for value in numbers:
        assert value.isnan().nonzero().flatten().tolist() == [7]


# -- weigh_chunk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_class", [False, True], ids=["", "with the bias's gradient"])
@pytest.mark.parametrize("ready", [False, True], ids=["", "from a retained tile"])
@pytest.mark.parametrize("kind", ["exp", "softmax", "hinge"])
@sizes
def test_weigh_chunk(
    numbers: tuple[torch.dtype, torch.dtype], size: str, kind: str, ready: bool, by_class: bool
) -> None:
    dtype, fine = numbers
    n, k, d = SIZES[size]
    if kind == "exp" and by_class:
        pytest.skip("a bias has no bound")
    x, rows, target = operands(n, k, d, dtype)
    shift, factor = random(n, seed=5) + 4.0, random(n, seed=6)
    tile = unwritten_tile(n, k, dtype)
    z = logits(x, rows, None, target, 3)
    retained = None
    if ready:
        # A line longer than the tile's: retained tiles lie next to each other.
        retained = triton_ops.new_tile(x, k + 100, dtype)[:k]
        retained.copy_((z.exp2() if kind == "exp" else z).t())
        z = z if kind == "exp" else retained.t().double()
    found, sums = triton_ops.weigh_chunk(
        rows, x, None, target, 3, kind, shift, tile, tile, retained, factor if by_class else None
    )
    shift = shift.double()[:, None]
    expected = {"exp": z.exp2(), "softmax": (z - shift).exp(), "hinge": (z > shift).double()}[kind]
    scale = 1.0 + float(z[z.isfinite()].abs().max()) if z.isfinite().any() else 1.0
    away = (z - shift).abs() > 0.05 if kind == "hinge" and fine != dtype else torch.ones_like(z, dtype=torch.bool)
    close(torch.where(away, found.t(), 0.0), expected * away, fine, 2.0 if dtype != torch.float32 else scale * 8.0)
    assert (sums is None) == (not by_class)
    if sums is not None and away.all():
        close(
            sums,
            (expected * factor.double()[:, None]).sum(dim=0),
            torch.float32 if fine == dtype else fine,
            scale * 64.0,
        )


# -- finish_rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["dense", "to sampled rows", "in place"])
@pytest.mark.parametrize("extras", ["product only", "shares", "everything", "no product"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("d", [1, 33, 130])
def test_finish_rows(d: int, unit: bool, extras: str, written: str) -> None:
    """The torch backend's function on float64 tensors is the oracle; it has its own tests against autograd."""
    c, n, start, stop = 60, 40, 10, 50
    k = stop - start
    w = random(c, d, seed=1)
    ids = torch.arange(0, 2 * c, 2, device=DEVICE) if written == "to sampled rows" else None
    w = random(2 * c, d, seed=1) if ids is not None else w
    product = None if extras == "no product" else random(k, d, seed=2)
    row = torch.arange(n, device=DEVICE) * 7 % c % 20  # several samples a row, some rows outside the chunk
    row[::6] = -1
    shares = (
        [] if extras == "product only" else [Shares(row, random(n, d, seed=3)), Shares(row + 20, random(n, d, seed=4))]
    )
    all_of_it = extras == "everything"
    norm_shares = Shares(row, random(n, d, seed=5)) if all_of_it else None
    mean = (random(k, seed=6), random(d, seed=7)) if all_of_it else None
    factor = torch.tensor(0.25, device=DEVICE) if all_of_it else None

    def double(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, Shares):
            return Shares(value.row, value.along.double())
        return None if value is None else type(value)(double(item) for item in value)

    results = []
    for ops in (torch_ops, triton_ops):
        cast = double if ops is torch_ops else lambda value: value
        source, a = cast(w), cast(None if product is None else product.clone())
        buffers = (cast(unwritten(k, d)), cast(unwritten(k, d)))
        prepared = ops.prepare_rows(source, ids, start, stop, unit, *(buffers[:1] * 2))
        if written == "in place" and a is not None:
            out, scratch = a, a
        else:
            out, scratch = cast(unwritten(*(w.shape if ids is not None else (k, d)))), cast(unwritten(k, d))
        place = None if ids is None else ids[start:stop]
        ops.finish_rows(
            a, scratch, prepared, start, cast(shares), cast(norm_shares), cast(mean), cast(factor), out, place
        )
        results.append(out)
    inverse = float(1.0 / w.norm(dim=1).min()) if unit else 1.0
    close(results[1], results[0], size=32.0, floor=inverse)
    if ids is not None:
        assert results[1].isnan().any(dim=1).sum() == len(w) - k


@dtypes
def test_finish_rows_writes_the_gradient_in_the_weights_dtype(dtype: torch.dtype) -> None:
    w, a = random(30, 24, seed=1, dtype=dtype), random(30, 24, seed=2, dtype=dtype)
    prepared = triton_ops.prepare_rows(w, None, 0, 30, True, unwritten(30, 24, dtype=dtype), None)
    out = unwritten(30, 24, dtype=dtype)
    triton_ops.finish_rows(a, a, prepared, 0, [], None, None, None, out, None)
    norm = w.double().norm(dim=1, keepdim=True)
    unit = w.double() / norm
    close(out, (a.double() - unit * (unit * a.double()).sum(dim=1, keepdim=True)) / norm, dtype)


# -- what the kernels have in common -----------------------------------------------------------------------------


def loss_and_gradients(n: int, d: int, c: int, margin: tm.Margin, dtype: torch.dtype = torch.float32, **options: Any):
    x, w = random(n, d, seed=1, dtype=dtype).requires_grad_(), random(c, d, seed=2, dtype=dtype).requires_grad_()
    target = torch.arange(n, device=DEVICE) * 5 % c
    with tm.use_backend("triton"):
        loss = tm.margin_cross_entropy(x, w, target, margin, **{"chunk_bytes": 1, **options})
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


def with_tiles(monkeypatch: pytest.MonkeyPatch, ops: ModuleType = triton_ops, **changed: Any) -> None:
    real = tiles.pick_tiles
    monkeypatch.setattr(ops, "pick_tiles", lambda *given: real(*given)._replace(**changed))


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("programs", [0, 1, 3])
@in_the_kernel
def test_grids_and_loads_change_nothing(monkeypatch: pytest.MonkeyPatch, programs: int, descriptors: bool) -> None:
    if descriptors and MACHINE == "interpreter":
        pytest.skip("the pointers are the interpreter's path")
    found = []
    for changed in ({"programs": 0, "descriptors": False}, {"programs": programs, "descriptors": descriptors}):
        with_tiles(monkeypatch, block_n=16, block_c=32, **changed)
        found.append(loss_and_gradients(40, 24, 70, tm.Softmax()))
    for ours, other in zip(*found, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("d", [16, 17])
def test_descriptors_only_where_lines_are_aligned(d: int) -> None:
    x = random(20, d, seed=1)
    assert triton_ops.can_describe(x) == (d == 16)
    assert not triton_ops.can_describe(random(20, 32, seed=1)[:, 1:17])
    assert not triton_ops.can_describe(random(20, 32, seed=1).t())


def test_precision_is_what_the_target_can() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert products.precision(torch.float32, "gfx942") == products.precision(torch.float32, "sm_80") == "tf32"
        assert products.precision(torch.float32, "gfx90a") == products.precision(torch.bfloat16, "sm_90") == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@dtypes
def test_no_samples_and_no_classes(dtype: torch.dtype) -> None:
    """Nothing to launch, nothing to describe to the memory accelerator."""
    for n, c in ((0, 70), (5, 70)):
        x, w = random(n, 16, seed=1, dtype=dtype).requires_grad_(), random(c, 16, seed=2, dtype=dtype).requires_grad_()
        ids = torch.arange(0, device=DEVICE) if n == 0 else None
        for class_ids in {None, ids} if n == 0 else {None}:
            loss = tm.margin_cross_entropy(
                x, w, torch.arange(n, device=DEVICE), tm.ArcFace(), reduction="sum", class_ids=class_ids
            )
            dx, dw = torch.autograd.grad(loss, (x, w))
            assert dx.shape == x.shape
            assert dw.isfinite().all()
            assert n or (float(loss) == 0.0 and not dw.any())


def test_a_large_bias_stays_with_its_class() -> None:
    """Samples that fill up a tile have the bias as their logit, and exp(100) is infinite."""
    x, w, bias = random(20, 16, seed=1), random(40, 16, seed=2), random(40, seed=3)
    bias[7] = 100.0
    leaves = [leaf.requires_grad_() for leaf in (x, w, bias)]
    target = torch.arange(20, device=DEVICE)
    loss = tm.margin_cross_entropy(x, w, target, tm.Softmax(), bias=bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = tm.reference.margin_cross_entropy(exact[0], exact[1], target, tm.Softmax(), bias=exact[2])
    for ours, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True):
        close(ours, other, size=64.0)


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_float32_products_follow_torchs_setting(setting: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        x, rows, target = operands(20, 40, 64, torch.float32)
        assert products.precision(torch.float32, "sm_90") == ("ieee" if setting == "highest" else "tf32")
        run = running(20, 40, x)
        tile = unwritten_tile(20, 40, x.dtype)
        triton_ops.reduce_chunk(rows, x, None, target, 3, False, tile, tile, False, run)
    finally:
        torch.set_float32_matmul_precision(before)
    z = logits(x, rows, None, target, 3)
    error = (run.hardest.amax(dim=0).double() - z.amax(dim=1)).abs().max()
    assert error < (2e-6 if setting == "highest" else 3e-3)
    if TTSEM and setting == "high":
        assert error > 1e-5  # operands of 10 bits


def holds_tf32(values: Tensor) -> bool:
    """Whether nothing is in the bits that matrix units cut off."""
    return not bool((values.contiguous().view(torch.int32) & 0x1FFF).any())


@pytest.mark.parametrize("margin", [tm.ArcFace(), tm.Softmax()], ids=["bounded, unit rows", "raw rows"])
@pytest.mark.parametrize("setting", ["highest", "high"])
@pytest.mark.skipif(MACHINE == "interpreter", reason="it has no TF32")
def test_float16_is_multiplied_as_tf32_whatever_torchs_setting(
    monkeypatch: pytest.MonkeyPatch, setting: str, margin: tm.Margin
) -> None:
    """By the tile kernel and by torch; afterwards the setting is what it was, where a kernel failed too."""
    before, seen, broken = torch.get_float32_matmul_precision(), [], []
    call, mm, addmm = triton_ops.call, torch.mm, Tensor.addmm_

    def launched(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        if broken:
            raise kernels.KernelError("broken")
        if kernel is triton_ops.tile_kernel:
            seen.append(options["PRECISION"])
        call(kernel, programs, *args, **options)

    def multiplied(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **options: Any) -> Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            assert all(holds_tf32(each) for each in args[-2:])
            # Lines of all operands and results, also where D is no multiple of 16.
            lines = [max(each.stride()) for each in args[-3:] if isinstance(each, Tensor)]
            lines += [max(each.stride()) for each in options.values()]
            assert len(lines) == 3
            assert all(line % 16 == 0 for line in lines)
            return real(*args, **options)

        return run

    monkeypatch.setattr(triton_ops, "call", launched)
    monkeypatch.setattr(torch, "mm", multiplied(mm))
    monkeypatch.setattr(Tensor, "addmm_", multiplied(addmm))
    try:
        torch.set_float32_matmul_precision(setting)
        as_set = torch.backends.cuda.matmul.fp32_precision
        found = loss_and_gradients(20, 24, 150, margin, torch.float16)
        assert seen == ["tf32"] * 3 * 4  # chunks of 64 classes, each with two tiles and two products
        assert torch.backends.cuda.matmul.fp32_precision == as_set
        broken.append(True)
        with pytest.raises(kernels.KernelError):
            loss_and_gradients(20, 24, 150, margin, torch.float16)
        assert torch.backends.cuda.matmul.fp32_precision == as_set
    finally:
        torch.set_float32_matmul_precision(before)
    x, w = random(20, 24, seed=1, dtype=torch.float16), random(150, 24, seed=2, dtype=torch.float16)
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    exact = tm.reference.margin_cross_entropy(x, w, torch.arange(20, device=DEVICE) * 5 % 150, margin)
    for ours, other in zip(found, (exact.detach(), *torch.autograd.grad(exact, (x, w))), strict=True):
        close(ours, other, torch.float16)


@pytest.mark.skipif(MACHINE == "interpreter", reason="it has no TF32")
def test_what_float16_multiplies_is_rounded_to_nearest() -> None:
    """Rows of a float32 W too, which other walks take as they are: under autocast."""
    w = random(40, 32, seed=1)
    with products.products(torch.float16, w, True):
        found = triton_ops.prepare_rows(w, None, 0, 40, False, unwritten(40, 32), None).rows
        other = products.as_operand(w, torch.float32)
    assert torch.equal(found, other)
    assert holds_tf32(found)
    assert not holds_tf32(w)
    close(found, w.half().double(), torch.float16, size=0.5)  # but for ties, which go to even there
    beside = torch.tensor(
        [1.0, -1.0, math.inf, -math.inf, math.nan, 0.0, 1.0 + 2.0**-12, 1.0 + 2.0**-11], device=DEVICE
    )
    right = torch.tensor([1.0, -1.0, math.inf, -math.inf, math.nan, 0.0, 1.0, 1.0 + 2.0**-10], device=DEVICE)
    with products.products(torch.float16, w, True):
        assert torch.equal(products.as_operand(beside, torch.float32).nan_to_num(7.0), right.nan_to_num(7.0))
    assert products.as_operand(w, torch.float32) is w
    assert triton_ops.prepare_rows(w, None, 0, 40, False, unwritten(40, 32), None).rows.data_ptr() == w.data_ptr()


@in_the_kernel
@pytest.mark.skipif(MACHINE == "interpreter", reason="it has no TF32")
def test_a_walk_multiplies_all_its_chunks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, and with them the places of partial results, follow the precision: it may not change between chunks."""
    call, before = triton_ops.call, torch.backends.cuda.matmul.fp32_precision
    expected = loss_and_gradients(20, 24, 150, tm.ArcFace())

    def changing(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        call(kernel, programs, *args, **options)
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    monkeypatch.setattr(triton_ops, "call", changing)
    found = []
    try:
        x, w = random(20, 24, seed=1), random(150, 24, seed=2)
        with tm.use_backend("triton"):
            target = torch.arange(20, device=DEVICE) * 5 % 150
            found.append(tm.margin_cross_entropy(x, w, target, tm.ArcFace(), chunk_bytes=1))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("asks", ["rest", "hinge", "hardest"])
def test_nothing_waits_for_the_device(asks: str) -> None:
    """The class pass reads no number back and no size depends on data, so a step can be captured in a CUDA graph."""
    x, w = random(20, 16, seed=1).requires_grad_(), random(70, 16, seed=2).requires_grad_()
    target = torch.arange(20, device=DEVICE)
    threshold = random(20, seed=3) if asks == "hinge" else None

    def step() -> None:
        out = passed(
            x, w, target, torch.float32, class_ids=torch.arange(70, device=DEVICE), threshold=threshold,
            bounded=asks == "rest", want_rest=asks == "rest", want_hardest=asks == "hardest", backend="triton",
        )  # fmt: skip
        value = {"rest": out.rest, "hinge": out.hinge, "hardest": out.hardest_product}[asks]
        (value + out.target_product + out.target_norm).sum().backward()

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    assert x.grad.isfinite().all()
    names = {event.name() for event in profiler.profiler.kineto_results.events()}
    assert "ClassPassBackward" in names
    waits = {"aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::_unique2", "aten::masked_select"}
    assert not names & waits


@pytest.mark.parametrize("options", [{}, {"logq_correction": True, "sparse_grad": True}], ids=str)
def test_a_sampled_step_where_the_sample_has_room_for_every_label(options: dict[str, Any]) -> None:
    """The targets' classes and others in every step; the loss is that of the same given by hand. A GPU may not wait."""
    head = tm.MarginSoftmaxLoss(16, 400, tm.ArcFace(), sample_rate=0.1, **options).to(DEVICE)
    x, target = random(20, 16, seed=1).requires_grad_(), torch.arange(20, device=DEVICE) * 19
    head(x, target).backward()  # kernels are compiled
    walked = []
    for _ in range(2):
        x.grad = head.weight.grad = None
        with waits_are_errors():
            loss = head(x, target)
            loss.backward()
        ids = head.weight.grad.to_dense().abs().sum(dim=1).nonzero().squeeze(1)
        assert len(ids) == 40
        assert torch.isin(target, ids).all()
        assert torch.equal(head(x, target, class_ids=ids).detach(), loss.detach())
        walked.append(ids.tolist())
    assert walked[0] != walked[1]
    assert head.sampler.tolist()[1] == 3


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    if MACHINE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_captured_in_a_graph() -> None:
    """And a margin's number that is changed in place is the next replay's."""
    if MACHINE != "cuda":
        pytest.skip("graphs need a GPU")
    x, w = random(40, 64, seed=1).requires_grad_(), random(500, 64, seed=2).requires_grad_()
    target = torch.arange(40, device=DEVICE) * 5 % 500
    # Made before the capture, which allows no copy from the CPU, and the margin's numbers are such copies.
    margin = tm.ArcFace().to(DEVICE)
    expected = {m: loss_and_gradients(40, 64, 500, tm.ArcFace(m=m).to(DEVICE)) for m in (0.5, 0.1)}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), tm.use_backend("triton"):
        tm.margin_cross_entropy(x, w, target, margin, chunk_bytes=1).backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = w.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), tm.use_backend("triton"):
        loss = tm.margin_cross_entropy(x, w, target, margin, chunk_bytes=1)
        loss.backward()
    losses = []
    for m, right in expected.items():
        margin.m = m  # in place
        graph.replay()
        losses.append(float(loss.detach()))
        for ours, other in zip((loss.detach(), x.grad, w.grad), right, strict=True):
            assert torch.equal(ours, other)
    assert losses[1] < losses[0]


def test_a_head_as_a_graphed_callable() -> None:
    """Other embeddings and targets in every step, as torch.cuda.make_graphed_callables replays them."""
    if MACHINE != "cuda":
        pytest.skip("graphs need a GPU")
    head = tm.MarginSoftmaxLoss(64, 500, tm.ArcFace()).to(DEVICE)
    given = random(40, 64, seed=1).requires_grad_(), torch.arange(40, device=DEVICE)
    replayed = torch.cuda.make_graphed_callables(tm.MarginSoftmaxLoss(64, 500, tm.ArcFace()).to(DEVICE), given)
    replayed.load_state_dict(head.state_dict())
    for seed in (3, 4):
        x, target = random(40, 64, seed=seed).requires_grad_(), torch.arange(40, device=DEVICE) * seed % 500
        right = head(x, target)
        expected = torch.autograd.grad(right, (x, head.weight))
        y = x.detach().clone().requires_grad_()
        loss = replayed(y, target)
        loss.backward()
        assert torch.equal(loss.detach(), right.detach())
        assert torch.equal(y.grad, expected[0])
        assert torch.equal(replayed.weight.grad, expected[1])
        replayed.weight.grad = None


def test_a_sampled_head_in_a_graph_draws_others_in_every_replay() -> None:
    if MACHINE != "cuda":
        pytest.skip("graphs need a GPU")
    head = tm.MarginSoftmaxLoss(64, 500, tm.ArcFace(), sample_rate=0.2).to(DEVICE)
    x, target = random(40, 64, seed=1).requires_grad_(), torch.arange(40, device=DEVICE) * 7
    replayed = torch.cuda.make_graphed_callables(head, (x, target))
    walked = []
    for _ in range(3):
        loss = replayed(x, target)
        loss.backward()
        ids = replayed.weight.grad.abs().sum(dim=1).nonzero().squeeze(1)
        assert len(ids) == 100
        assert torch.isin(target, ids).all()
        right = tm.margin_cross_entropy(x.detach(), head.weight.detach(), target, head.margin, class_ids=ids)
        torch.testing.assert_close(loss.detach(), right)
        walked.append(tuple(ids.tolist()))
        replayed.weight.grad = None
    assert len(set(walked)) == 3


def test_a_compiled_sampled_head_draws_what_it_would_have_drawn() -> None:
    if MACHINE != "cuda":
        pytest.skip("Inductor's code for a GPU needs one")
    head = tm.MarginSoftmaxLoss(64, 500, tm.ArcFace(), sample_rate=0.2).to(DEVICE)
    other = tm.MarginSoftmaxLoss(64, 500, tm.ArcFace(), sample_rate=0.2).to(DEVICE)
    other.load_state_dict(head.state_dict())
    compiled = torch.compile(other)
    for seed in (3, 4):
        x, target = random(40, 64, seed=seed), torch.arange(40, device=DEVICE) * seed % 500
        torch.testing.assert_close(compiled(x, target), head(x, target))
    assert torch.equal(head.sampler, other.sampler)


def test_what_changes_from_step_to_step_compiles_nothing(pytestconfig: pytest.Config) -> None:
    """Scale, margin, number of samples and of classes, sampled rows, learning rate: the same compiled kernels."""
    if MACHINE == "interpreter":
        pytest.skip("nothing is compiled")

    def compiled() -> int:
        if TTSEM:
            return pytestconfig.ttsem_modules()
        return sum(
            len(cache[0])
            for kernel in (triton_ops.prepare_kernel, triton_ops.tile_kernel, triton_ops.finish_kernel)
            for cache in kernel.device_caches.values()
        )

    def step(n: int, c: int, s: float, m: float, ids: Tensor | None) -> None:
        for margin in (tm.ArcFace(s=s, m=m), tm.Softmax()):
            loss_and_gradients(n, 32, c, margin, class_ids=ids)
        head = tm.MarginSoftmaxLoss(32, c, tm.ArcFace(s=s, m=m), device=DEVICE)
        optimizer = tm.optim.RowAdamW(head.parameters(), lr=0.01 * m, weight_decay=m, stochastic_rounding=False)
        head.update_in_backward(optimizer)
        with tm.use_backend("triton"):
            head(random(n, 32, seed=1).requires_grad_(), torch.arange(n, device=DEVICE) % c, class_ids=ids).backward()

    everything = torch.arange(0, 200, device=DEVICE)
    step(40, 200, 16.0, 0.3, None)
    step(40, 200, 16.0, 0.3, everything)
    before = compiled()
    step(33, 311, 30.0, 0.1, None)
    step(48, 200, 8.0, 0.5, everything)
    step(17, 1025, 64.0, 0.0, None)
    assert compiled() == before


# -- the checks find what they are there for ---------------------------------------------------------------------


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *edits: tuple[str, str]) -> ModuleType:
    """The kernels with a mistake in them, in use."""
    source = inspect.getsource(triton_ops)
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} times in the source: {old}"
        source = source.replace(old, new)
    path = tmp_path / "broken_ops.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("broken_ops", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(kernels.LOADED, "triton", module)
    return module


@pytest.mark.xfail(strict=True, raises=pytest.fail.Exception, reason="conftest.py lets no such test pass")
@pytest.mark.parametrize("backend", ["triton"])
def test_that_runs_on_another_backend_than_it_says(backend: str, ttsem: Any) -> None:
    x, w = random(4, 8, seed=1), random(9, 8, seed=2)
    tm.margin_cross_entropy(x.double(), w.double(), torch.arange(4), tm.ArcFace())


MISTAKES = {
    "a store without its mask": (
        "tl.store(inverse + row, scale, mask=inside)", "tl.store(inverse + row, scale)", "past the end",
    ),
    "a load without its mask": (
        "own = tl.load(target + sample, mask=sample < n, other=-1) - start",
        "own = tl.load(target + sample) - start", "past the end",
    ),
    "two programs on one slot": (
        "own = slot.to(tl.int64) * n + sample", "own = 0 * slot.to(tl.int64) * n + sample", "program instances",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_ttsem_stops_at(
    mistake: str, ttsem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    from ttsem.sanitize import KernelFault

    old, new, message = MISTAKES[mistake]
    broken(tmp_path, monkeypatch, (old, new))
    with pytest.raises(kernels.KernelError) as found:
        loss_and_gradients(5, 16, 197, tm.CosFace(s=8.0), class_ids=torch.arange(197), chunk_bytes=10**6)
    fault = found.value.__cause__.__cause__
    assert isinstance(fault, KernelFault)
    assert message in str(fault)


@in_the_kernel
def test_memory_that_nobody_wrote_is_not_a_number(ttsem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(tmp_path, monkeypatch, (
        "tl.store(share + place, value.to(share.dtype.element_ty), mask=mask)",
        "tl.store(share + place, value.to(share.dtype.element_ty), mask=mask & (column > 0)[None, :])",
    ))  # fmt: skip
    _, dx, dw = loss_and_gradients(5, 16, 70, tm.CosFace(s=8.0))
    assert dx.isnan().any()
    assert dw.isnan().any()


@in_the_kernel
@pytest.mark.parametrize("kernel", ["reduce", "weigh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_memory_fits(kernel: str, dtype: torch.dtype, ttsem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a real width, against the card's limit; and a tile that needs more is stopped."""
    target = int(MACHINE.removeprefix("ttsem-"))
    monkeypatch.setattr(ttsem, "shared_limit", (target, 166_912 if target == 80 else 232_448))
    x, rows, own = operands(129, 130, 512, dtype)
    tile = unwritten_tile(129, 130, dtype)

    def launch() -> None:
        if kernel == "reduce":
            triton_ops.reduce_chunk(rows, x, None, own, 0, False, tile, tile, False, running(129, 130, x))
        else:
            triton_ops.weigh_chunk(rows, x, None, own, 0, "exp", own.float(), tile, tile, None, None)

    launch()
    assert not ttsem.shared_unknown
    block = 32 if dtype == torch.float32 else 64  # ten stages of either are 327,680 bytes
    with_tiles(monkeypatch, block_n=block, block_c=block, block_d=128, stages=10)
    with pytest.raises(kernels.KernelError, match="shared memory"):
        launch()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_agrees_and_moves_what_was_counted(dtype: torch.dtype, ttsem: Any) -> None:
    """Plain softmax on the same tensors, and what our kernels store and multiply is what the formula says."""
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    n, d, c, single = 32, 32, 300, dtype == torch.float32
    x, w = (random(size, d, seed=size).div(d**0.25).to(dtype).requires_grad_() for size in (n, c))
    target = torch.arange(n) * 7 % c

    def step(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    exact = [each.detach().double().requires_grad_() for each in (x, w)]
    expected = step(torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target), *exact)
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    with profiler, counting() as count, tm.use_backend("triton"):
        ours = step(tm.margin_cross_entropy(x, w, target, tm.Softmax()), x, w)
    other = liger.LigerFusedLinearCrossEntropyFunction.apply(x, w, target)
    other = step(other[0] if isinstance(other, tuple) else other, x, w)
    for got, theirs, want in zip(ours, other, expected, strict=True):
        error, of_liger = (float((each.double() - want).norm() / want.norm()) for each in (got, theirs))
        assert error <= 2.0 * of_liger + (1e-6 if single else 2e-3)
        assert error < (1e-6 if single else 1e-2)
    # Rows that are not normalised are W itself; both walks make tiles; backward stores its share and the gradient.
    tile = triton_ops.tiles_for(x, c)
    slots, columns = -(-c // tile.block_c), -(-c // 16) * 16
    whole = -(-n // tile.block_n) * tile.block_n * slots * tile.block_c * -(-d // tile.block_d) * tile.block_d
    assert count.flops == (0 if single else 2 * 2 * whole)  # float32's products are all the library's
    by_torch = 0
    for event in profiler.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            # What is added to comes before the factors.
            (rows, inner), (_, width) = event.input_shapes[event.name != "aten::mm" :][:2]
            by_torch += 2 * rows * inner * width
    assert by_torch == (4 if single else 2) * 2 * n * d * c
    assert count.stored == n * 4 * slots * 2 + n * columns * dtype.itemsize + c * d * dtype.itemsize


def test_chunks_are_whole_waves_in_memory_that_is_bounded() -> None:
    for (target, processors, memory), (n, d, dtype, c) in itertools.product(
        [("sm_80", 108, 80), ("sm_90", 132, 80), ("sm_100", 148, 180), ("sm_89", 128, 24), ("gfx942", 304, 192)],
        [
            (1024, 512, torch.bfloat16, 1_000_000), (256, 128, torch.float32, 100_000),
            (32, 512, torch.bfloat16, 100_000_000), (1024, 512, torch.bfloat16, 100_000),
            (16, 8192, torch.bfloat16, 1_000_000),
        ],
    ):  # fmt: skip
        chunk = tiles.default_chunk(tiles.Device(target, processors, memory * 10**9), dtype, n, d, c)
        tile = tiles.pick_tiles(target, dtype, n, d, chunk, processors)
        wave = max(1, (tile.programs or 2 * processors) // -(-n // tile.block_n)) * tile.block_c
        assert chunk % (wave if chunk >= wave else tile.block_c) == 0
        per_class = (n + 2 * d) * dtype.itemsize
        most = min(tiles.MOST, memory * 10**9 / tiles.SHARE, max(tiles.LEAST, per_class * c // 4))
        assert most / 2 < per_class * chunk <= most


def test_every_combination_has_a_tile() -> None:
    for target, dtype, n, d, k, precision in itertools.product(
        ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter"), (torch.float32, torch.float16, torch.bfloat16),
        (1, 16, 17, 1000), (1, 17, 64, 512, 1024), (1, 63, 8192), ("ieee", "tf32"),
    ):  # fmt: skip
        tile = tiles.pick_tiles(target, dtype, n, d, k, precision=precision)
        assert tile.block_n >= 16
        assert all(size & (size - 1) == 0 for size in tile[:3])
