"""The four functions of a backend, as Triton kernels: `torch_ops` with every pass over the tile in registers.

(But for float32 that is multiplied as it is: torch makes the product, and the tile kernel reads it, see
`tiles.by_library`.)

    prepare_rows   w'_j = w_j / |w_j|, in the compute dtype                   prepare_kernel, row-wise
    reduce_chunk   z = x w'^T tile by tile, folded into numbers per sample    tile_kernel with reduce_tile
    weigh_chunk    z again, and P = dL/dz from it                             tile_kernel with weigh_tile
    finish_rows    dL/dw from dL/dw', and the rows that samples point at      finish_kernel, row-wise

A tile is [BLOCK_N samples, BLOCK_C classes]: sums over classes then stay inside a thread and its three neighbours.
What is stored of it is [N, K] in memory, and the stream sees its transpose.

Nothing is shared between programs. A tile folds its classes into a place of its own, slot c // BLOCK_C of sample i,
which the next chunk finds again; the stream adds the slots up once at the end. Samples that share a target row are
added by the one program that owns the row, in the order of the batch. So there are no atomics and no locks, the result
is the same on every run, and nothing waits for the device: no size depends on data.

Rows are counted in 64 bits: C D and N K pass 2^31. The sizes that change from step to step are not specialised.
"""

from __future__ import annotations

import errno
import functools
import os
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonmargin.backends.precision import halves, precision
from tritonmargin.backends.registry import KernelError
from tritonmargin.backends.variants import (
    exp_term,
    hinge_slope_term,
    hinge_term,
    softmax_term,
)
from tritonmargin.kernels.tiles import Tiles, by_library, default_chunk, device_of, pick_tiles, row_block
from tritonmargin.kernels.updates import TRITON_RULES, RowUpdate, corrections, mixed, store_rounded


@dataclass
class Running:
    """What the forward pass keeps per sample while it walks; None: nobody asked.

    A backend may fold its classes into several slots per sample, here it is one; the stream adds them up at the end.
    """

    total: Tensor | None = None  # [slots, N]  sum over j != y of exp(z_ij - maximum), maximum = 0 on the bounded path
    maximum: Tensor | None = None  # [slots, N]  running max, only on the unbounded path
    hardest: Tensor | None = None  # [slots, N]  max over j != y of z_ij, as the tile has it
    hardest_row: Tensor | None = None  # [slots, N]  its position in the walk, -1 at first
    threshold: Tensor | None = None  # [N]  t_i of the hinge
    hinge: Tensor | None = None  # [slots, N]  sum over j != y of relu(z_ij - threshold_i)
    violations: Tensor | None = None  # [slots, N]  how many of them are positive


@dataclass
class Shares:
    """Gradients of numbers that look at one class row a sample: the target's, or the hardest wrong class's."""

    row: Tensor  # [N]  position in the walk, -1 for none
    along: Tensor  # [N, D]  dL/dw' of that row: g_i x_i

    @functools.cached_property
    def sorted(self) -> tuple[Tensor, Tensor]:
        """Both in the order of the rows, samples of the same row in the order of the batch."""
        row, order = torch.sort(self.row, stable=True)
        return row, self.along.index_select(0, order)


class Rows(NamedTuple):
    """A chunk's class rows w', ready for the products."""

    rows: Tensor  # [K, D]  in the compute dtype
    exact: Tensor | None  # [K, D]  in the precision of sums if they are unit rows, else `rows`; None: nobody asked
    inverse: Tensor | None  # [K]  1/|w|, 0 for a zero row, if they are unit rows
    weight: Tensor  # where they come from: [K, D], or [C, D] with `ids`
    ids: Tensor | None  # [K]


# Elementwise work needs no memory here: no second tile for it, no rows beside those of the products.
FUSED = True

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
SHARES = {"exp": exp_term, "softmax": softmax_term, "hinge": hinge_slope_term}


def writable_cache() -> None:
    """Triton keeps what it compiles on disk; where it cannot, this process gets a folder of its own."""
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        private_cache(error)


def private_cache(error: OSError) -> None:
    folder = triton.knobs.cache.dir
    triton.knobs.cache.dir = tempfile.mkdtemp(prefix="tritonmargin-")
    warnings.warn(
        f"tritonmargin: Triton's cache {error.filename or folder} cannot be written ({error.strerror}); kernels are "
        "compiled again in every process. Set TRITON_CACHE_DIR to a folder that can.",
        stacklevel=3,
    )


def unwritable(error: BaseException | None) -> OSError | None:
    """What of the error says that a place in Triton's cache cannot be written, if anything does."""
    while error is not None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # which writing says without a name
            closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            if full or (closed and str(error.filename).startswith(triton.knobs.cache.dir)):
                return error
        error = error.__cause__ or error.__context__
    return None


writable_cache()


def call(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Launch; whatever keeps a kernel from being compiled or launched is a `KernelError`."""
    try:
        try:
            kernel[(programs,)](*args, **options)
        except Exception as error:
            # In a cache that can be written, a kernel's own folder may still belong to somebody else.
            forbidden = unwritable(error)
            if forbidden is None:
                raise
            private_cache(forbidden)
            kernel[(programs,)](*args, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise KernelError(f"{type(error).__name__}: {str(error).strip()[-500:]}") from error


def blocks(size: int, block: int) -> int:
    """How many blocks cover so much. triton.cdiv takes microseconds of the CPU."""
    return -(-size // block)


# -- prepare_rows ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["k"])
def prepare_kernel(
    weight, ids, rows, exact, inverse, k, stride_row, stride_column, stride_rows,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """rows[r] = w / |w|, w = weight[ids[r]], or w as it is; the norm in float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = row < k
    mask = inside[:, None] & (d < D)[None, :]
    w = load_rows(weight, ids, row, d, inside, mask, stride_row, stride_column)
    if UNIT:
        scale = inverse_norm(tl.sqrt(tl.sum(w * w, axis=1)))
        tl.store(inverse + row, scale, mask=inside)
        w *= scale[:, None]
    out = row[:, None] * stride_rows + d[None, :]
    if exact is not None:
        tl.store(exact + out, w, mask=mask)
    if ROUND:
        w = to_tf32(w)
    tl.store(rows + out, w.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def to_tf32(value):
    """The numbers as a product takes them: matrix units cut float32's last 13 bits off, here they are rounded."""
    return ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def load_rows(weight, ids, row, d, inside, mask, stride_row, stride_column):
    """Rows of W in float32, by position or by class number."""
    source = row if ids is None else tl.load(ids + row, mask=inside, other=0)
    place = source[:, None] * stride_row + d[None, :].to(tl.int64) * stride_column
    return tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(norm):
    """1/norm, and 0 for a row whose norm is 0 (or so small that 1/norm overflows)."""
    return tl.where(norm < 4.7019774e-38, 0.0, 1.0 / norm)  # 4 times the smallest normal float32


def prepare_rows(
    weight: Tensor,
    class_ids: Tensor | None,
    start: int,
    stop: int,
    unit: bool,
    buffer: Tensor,
    wide: Tensor | None,
) -> Rows:
    """Rows start..stop of the walk, normalised if `unit`, in `buffer`, and in float32 in `wide` if somebody asks.

    The buffers' lines may be longer than D (see `line`); what is beyond it stays as it is.
    """
    k, d = stop - start, weight.shape[1]
    source = weight[start:stop] if class_ids is None else weight
    ids = None if class_ids is None else class_ids[start:stop]
    fit = buffer.shape[1] == d and can_describe(source) and source.stride(0) % 16 == 0
    if not unit and ids is None and source.dtype == buffer.dtype and fit and not halves():
        return Rows(source, source, None, source, ids)
    rows = buffer[:k]
    exact = None if wide is None else rows if wide.dtype == rows.dtype else wide[:k]
    inverse = torch.empty(k, dtype=torch.float32, device=weight.device) if unit else None
    block_k, block_d, warps = row_block(d)
    call(
        prepare_kernel, blocks(k, block_k), source, ids, rows, None if exact is rows else exact, inverse, k,
        *source.stride(), rows.stride(0),
        D=d, BLOCK_K=block_k, BLOCK_D=block_d, UNIT=unit,
        ROUND=precision(rows.dtype, device_of(rows).target) == "tf32", num_warps=warps,
    )  # fmt: skip
    return Rows(rows, exact, inverse, source, ids)


# -- the tile: reduce_chunk and weigh_chunk ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "k", "start"])
def tile_kernel(
    x, rows, bias, target, numbers, tile, out, n, k, start, stride_x, stride_rows, stride_tile,
    EPILOGUE: tl.constexpr, OPTIONS: tl.constexpr, READY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, ROUND: tl.constexpr, SPECIALISED: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z = x w'^T + b, -inf at the targets, one tile after the other; what becomes of it is the epilogue's.

    Without rows, x is the product [N, K], made elsewhere.
    """
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tiles_n * tl.cdiv(k, BLOCK_C)
    # SPECIALISED: some warps multiply the next tile while the others are at the epilogue of this one.
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=SPECIALISED):
        # Tiles of the same classes follow each other: their rows are read once.
        first_n, slot = (index % tiles_n) * BLOCK_N, index // tiles_n
        first_c = slot * BLOCK_C
        sample = first_n + tl.arange(0, BLOCK_N)
        column = first_c + tl.arange(0, BLOCK_C)
        place = sample[:, None].to(tl.int64) * stride_tile + column[None, :]
        # Lines of a tile have room for a multiple of 16 classes: whole vectors are stored.
        mask = (sample < n)[:, None] & (column < (k + 15) // 16 * 16)[None, :]
        if READY:
            z = tl.load(tile + place, mask=mask, other=-float("inf")).to(tl.float32)
        else:
            if rows is None:
                far = sample[:, None].to(tl.int64) * stride_x + column[None, :]
                z = tl.load(x + far, mask=mask, other=0.0).to(tl.float32)
            else:
                z = product(x, rows, first_n, first_c, n, k, stride_x, stride_rows, DESCRIPTORS, PRECISION, D,
                            BLOCK_N, BLOCK_C, BLOCK_D)  # fmt: skip
            if bias is not None:
                z += tl.load(bias + column, mask=column < k, other=0.0).to(tl.float32)[None, :]
            # Few tiles hold a target or an edge: the others are spared a comparison per element.
            own = tl.load(target + sample, mask=sample < n, other=-1) - start
            own = tl.where((own >= first_c) & (own < first_c + BLOCK_C), own, -1).to(tl.int32)
            if tl.max(own, axis=0) >= 0:
                z = tl.where(own[:, None] == column[None, :], -float("inf"), z)
            if first_c + BLOCK_C > k:
                z = tl.where((column < k)[None, :], z, -float("inf"))
        EPILOGUE(z, sample, column, slot, first_n // BLOCK_N, start, n, k, tile, place, mask, numbers, out, OPTIONS,
                 ROUND)  # fmt: skip


@triton.jit
def product(
    x, rows, first_n, first_c, n, k, stride_x, stride_rows, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x[first_n : + BLOCK_N] rows[first_c : + BLOCK_C]^T, summed in float32; 0 beyond the edges."""
    sample = first_n + tl.arange(0, BLOCK_N)
    row = first_c + tl.arange(0, BLOCK_C)
    z = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for first_d in range(0, D, BLOCK_D):
        if DESCRIPTORS:
            a = x.load([first_n, first_d])
            b = rows.load([first_c, first_d])
        else:
            d = first_d + tl.arange(0, BLOCK_D)
            a = tl.load(
                x + sample[:, None].to(tl.int64) * stride_x + d[None, :],
                mask=(sample < n)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            b = tl.load(
                rows + row[:, None].to(tl.int64) * stride_rows + d[None, :],
                mask=(row < k)[:, None] & (d < D)[None, :],
                other=0.0,
            )
        z = tl.dot(a, b.T, z, input_precision=PRECISION)
    return z


@triton.jit
def reduce_tile(
    z, sample, column, slot, slot_n, start, n, k, tile, place, mask, threshold, run, BOUNDED: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Fold the tile's classes into the numbers that this slot keeps per sample; `tile`: what backward starts from."""
    total, maximum, hardest, hardest_row, hinge, violations = run
    inside = sample < n
    own = slot.to(tl.int64) * n + sample
    if tile is not None and not BOUNDED:
        # Backward will see the rounded logits: their logsumexp has to be the one of the same numbers.
        z = z.to(tile.dtype.element_ty).to(tl.float32)
    if hardest is not None:
        value = tl.max(z, axis=1)
        # Equal logits: the lowest class. A logit that is nan is the hardest, as in torch.
        row = tl.min(tl.where(z == value[:, None], column[None, :], 2147483647), axis=1)
        invalid = tl.max((z != z).to(tl.int32), axis=1) > 0
        before = tl.load(hardest + own, mask=inside, other=0.0)
        better = value > before
        value = tl.where(invalid, float("nan"), tl.where(better, value, before))
        tl.store(hardest + own, value, mask=inside)
        tl.store(hardest_row + own, row.to(tl.int64) + start, mask=inside & better)
    if hinge is not None:
        excess = hinge_term(z, tl.load(threshold + sample, mask=inside, other=0.0)[:, None])
        found = tl.load(hinge + own, mask=inside, other=0.0) + tl.sum(excess, axis=1)
        tl.store(hinge + own, found, mask=inside)
        count = tl.load(violations + own, mask=inside, other=0.0) + tl.sum((excess != 0.0).to(tl.float32), axis=1)
        tl.store(violations + own, count, mask=inside)
    if total is not None:
        before = tl.load(total + own, mask=inside, other=0.0)
        if BOUNDED:
            z = tl.exp2(z)
            found = before + tl.sum(z, axis=1)
        else:
            earlier = tl.load(maximum + own, mask=inside, other=-float("inf"))
            highest = tl.maximum(earlier, tl.max(z, axis=1))
            # Where every logit so far is masked the maximum is -inf, and -inf - -inf would be nan.
            shift = tl.where(highest == -float("inf"), 0.0, highest)
            found = before * tl.exp(earlier - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
            tl.store(maximum + own, highest, mask=inside)
        tl.store(total + own, found, mask=inside)
    if tile is not None:
        if BOUNDED and ROUND:
            z = to_tf32(z)
        tl.store(tile + place, z.to(tile.dtype.element_ty), mask=mask)


@triton.jit
def weigh_tile(
    z, sample, column, slot, slot_n, start, n, k, tile, place, mask, shift, out, SHARE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """P = dL/dz without the factors that only depend on the sample; and its sum with them, for the bias."""
    share, stride_share, factor, by_class = out
    # Beyond the last sample z is the bias alone: exp(z - inf) = 0 whatever it is.
    value = SHARE(z, tl.load(shift + sample, mask=sample < n, other=float("inf"))[:, None])
    place = sample[:, None].to(tl.int64) * stride_share + column[None, :]
    if ROUND:
        value = to_tf32(value)  # in place, for the sum too: a second copy would not fit the registers
    tl.store(share + place, value.to(share.dtype.element_ty), mask=mask)
    if by_class is not None:
        value *= tl.load(factor + sample, mask=sample < n, other=0.0)[:, None]
        tl.store(by_class + slot_n.to(tl.int64) * k + column, tl.sum(value, axis=0), mask=column < k)


def reduce_chunk(
    rows: Tensor,
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    start: int,
    bounded: bool,
    tile: Tensor,
    scratch: Tensor,
    keep: bool,
    run: Running,
) -> None:
    """Fold one chunk's logits into `run`, whose numbers are [slots, N].

    With `keep`, leaves in `tile` what `weigh_chunk` can start from: exp(z) on the bounded path and z otherwise, the
    targets masked. `scratch` [K, N] may be `tile`: room for the product, where the library makes it.
    """
    out = (run.total, run.maximum, run.hardest, run.hardest_row, run.hinge, run.violations)
    limited = (run.hardest is not None or bias is not None) and not keep
    kept = tile if keep else None
    launch(rows, x, bias, target, start, run.threshold, kept, scratch, out, reduce_tile, bounded, False, limited)


def weigh_chunk(
    rows: Tensor,
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    start: int,
    kind: str,
    shift: Tensor,
    tile: Tensor,
    scratch: Tensor,
    ready: Tensor | None,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The chunk's share in the gradient, without the factors that only depend on the sample, 0 at the targets.

    kind "exp": exp(z); "softmax": exp(z - shift_i) with shift = rest; "hinge": 1 where z > shift_i.
    `ready` is the tile that `reduce_chunk` left, if it was retained; it is not written to. `scratch`: as there.

    Returns the share in the compute dtype, for the GEMMs, and with `factor` [N] the sum over samples of factor times
    the share, [K], before it is rounded to 16 bits (after it is to TF32).
    """
    assert kind != "exp" or factor is None  # logits with a bias have no bound
    if kind == "exp" and ready is not None:
        return ready, None
    n, k = len(x), len(rows)
    by_class = None
    if factor is not None:
        slots = blocks(n, tiles_for(x, k).block_n)
        by_class = torch.empty(slots, k, dtype=torch.float32, device=x.device)
    out = (tile, tile.stride(1), factor, by_class)
    limited = ready is None and (kind != "hinge" or factor is None or x.dtype == torch.float32)
    launch(
        rows, x, bias, target, start, shift, ready, scratch, out, weigh_tile, SHARES[kind], ready is not None, limited
    )
    return tile, None if by_class is None else by_class.sum(dim=0)


def launch(
    rows: Tensor,
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    start: int,
    numbers: Tensor | None,
    tile: Tensor | None,
    room: Tensor,
    out: tuple[Any, ...],
    epilogue: Any,
    options: Any,
    ready: bool,
    limited: bool,
) -> None:
    """tile_kernel over the chunk: what both passes over the classes have in common.

    room: [K, N] for the product, where the library makes it.
    limited: the epilogue takes more registers than let another block in, and does with fewer. Others take fewer anyway,
        or would spill.
    """
    (n, d), k, how = x.shape, len(rows), precision(x.dtype, device_of(x).target)
    tiles = tiles_for(x, k)
    count = blocks(n, tiles.block_n) * blocks(k, tiles.block_c)
    if not count:
        return
    library = by_library(x.dtype, how) and not ready
    described = tiles.descriptors and not (ready or library) and can_describe(x) and can_describe(rows)
    a: Any = x
    b: Any = rows
    if library:
        a, b, d = torch.mm(x, rows.t(), out=room.t()), None, 1
    stride = a.stride(0)
    if described:
        a = TensorDescriptor.from_tensor(x, [tiles.block_n, tiles.block_d])
        b = TensorDescriptor.from_tensor(rows, [tiles.block_c, tiles.block_d])
    call(
        tile_kernel, min(count, tiles.programs) if tiles.programs else count, a, b, bias, target, numbers, tile, out,
        n, k, start, stride, rows.stride(0), 1 if tile is None else tile.stride(1),
        EPILOGUE=epilogue, OPTIONS=options, READY=ready, DESCRIPTORS=described,
        PRECISION=how,
        ROUND=how == "tf32" and options is not SHARES["hinge"],  # whose slopes are 0 and 1
        SPECIALISED=tiles.specialised and described and TRITON >= (3, 7),  # 3.6 fails to partition the loop
        D=d, BLOCK_N=tiles.block_n, BLOCK_C=tiles.block_c, BLOCK_D=tiles.block_d,
        num_warps=tiles.warps, num_stages=tiles.stages,
        **({"maxnreg": tiles.registers} if tiles.registers and limited else {}),
    )  # fmt: skip


def tiles_for(x: Tensor, k: int) -> Tiles:
    device, (n, d) = device_of(x), x.shape
    return pick_tiles(device.target, x.dtype, n, d, k, device.processors, precision(x.dtype, device.target))


def chunk_for(x: Tensor, dtype: torch.dtype, classes: int) -> int:
    """How many classes to walk at a time."""
    n, d = x.shape
    return default_chunk(device_of(x), dtype, n, d, classes)


def slots(x: Tensor, chunk: int) -> int:
    """How many places for partial results a sample needs."""
    return blocks(chunk, tiles_for(x, chunk).block_c)


def new_tile(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:  # [K, N]
    """A tile whose lines run over classes, every line aligned."""
    return x.new_empty(x.shape[0], (k + 15) // 16 * 16, dtype=dtype)[:, :k].t()


def as_tile(retained: Tensor) -> Tensor:  # [K, N]
    """A tile of these numbers; themselves, if they have kept the layout of `new_tile` while autograd held them."""
    k, _ = retained.shape
    if retained.stride(0) == 1 and retained.stride(1) % 16 == 0 and retained.stride(1) >= k:
        return retained
    return new_tile(retained.t(), k, retained.dtype).copy_(retained)


def line(d: int) -> int:
    """How long the lines of x and of a chunk's rows are, zeros beyond D.

    A kernel for any other D loads number by number, and spills.
    """
    return (d + 15) // 16 * 16


def can_describe(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can load it: lines and addresses are multiples of 16 bytes."""
    line = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and line % 16 == 0 and matrix.data_ptr() % 16 == 0 and line > 0


# -- finish_rows -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "k", "start", "seed"])
def finish_kernel(
    product, weight, ids, inverse, out, place, shares, norm_shares, mean, factor, update, n, k, start, seed,
    stride_product, stride_row, stride_column, stride_out, RULE: tl.constexpr, STOCHASTIC: tl.constexpr,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dL/dw = (A - w' (w' . A)) / |w| with A = product + the shares of the samples that point at the row.

    With a RULE, `out` is the weight, and what is written is its row after the update.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = row < k
    mask = inside[:, None] & (d < D)[None, :]
    a = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    if product is not None:
        a += tl.load(product + row[:, None] * stride_product + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if inverse is not None:
        # Under way while the shares are looked for.
        scale = tl.load(inverse + row, mask=inside, other=0.0)
        unit = load_rows(weight, ids, row, d, inside, mask, stride_row, stride_column) * scale[:, None]
    # A may carry a scale that the shares do not; factor undoes it.
    undo = 1.0 if factor is None else tl.load(factor)
    carried = 1.0 / undo
    for i in tl.static_range(len(shares)):
        a += carried * shares_of(shares[i], row + start, d, n, D, BLOCK_K, BLOCK_D)
    if mean is not None:
        class_weight, along = mean
        c = tl.load(class_weight + row, mask=inside, other=0.0)
        a += carried * c[:, None] * tl.load(along + d, mask=d < D, other=0.0)[None, :]
    if inverse is not None:
        a -= unit * tl.sum(unit * a, axis=1)[:, None]
        a *= (scale * undo)[:, None]
    else:
        a *= undo
    if norm_shares is not None:
        a += shares_of(norm_shares, row + start, d, n, D, BLOCK_K, BLOCK_D)
    target = row if place is None else tl.load(place + row, mask=inside, other=0)
    target = target[:, None] * stride_out + d[None, :]
    if RULE is None:
        tl.store(out + target, a.to(out.dtype.element_ty), mask=mask)
    else:
        numbers, state, steps = update
        corrections = None
        if steps is not None:
            size, root = steps
            corrections = (tl.load(size + row, mask=inside, other=1.0), tl.load(root + row, mask=inside, other=1.0))
        w = tl.load(out + target, mask=mask, other=0.0).to(tl.float32)
        w = RULE(a, w, target, mask, numbers, state, corrections, seed, STOCHASTIC)
        store_rounded(out + target, w, target, mask, seed, STOCHASTIC)


@triton.jit
def shares_of(shares, row, d, n, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of the shares of each row's samples, which are sorted by row."""
    sample_row, along = shares
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    first = tl.min(row, axis=0)
    for i in range(lower_bound(sample_row, n, first), lower_bound(sample_row, n, first + BLOCK_K)):
        own = row == tl.load(sample_row + i)
        line = tl.load(along + tl.cast(i, tl.int64) * D + d, mask=d < D, other=0.0)
        total += tl.where(own[:, None], line[None, :], 0.0)
    return total


@triton.jit
def lower_bound(values, n, limit):
    """How many of the sorted values are below the limit."""
    low = 0
    high = n
    while low < high:
        middle = (low + high) // 2
        below = tl.load(values + middle) < limit
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


def finish_rows(
    product: Tensor | None,
    scratch: Tensor,
    prepared: Rows,
    start: int,
    shares: list[Shares],
    norm_shares: Shares | None,
    mean: tuple[Tensor, Tensor] | None,
    factor: Tensor | None,
    out: Tensor,
    place: slice | Tensor | None,
    update: RowUpdate | None = None,
) -> None:
    """From A = dL/dw' of a chunk (product, in the compute dtype; None: 0) to dL/dw, in `out` (its rows `place`).

    With `update`, `out` is the weight, and what is written is its rows after the update.

    Adds the target rows' shares and the mean's (class weights [K] times one row [D]), then, for unit rows,
    dL/dw = (A - w' (w' . A)) / |w|. `factor` undoes a scale that A carries and the shares do not. `scratch` is not
    needed here.
    """
    k, d = len(prepared.rows), prepared.weight.shape[1]
    block_k, block_d, warps = row_block(d)
    n = len(shares[0].row) if shares else 0 if norm_shares is None else len(norm_shares.row)
    rows = None
    if isinstance(place, slice):
        # Rows in order need no numbers: the kernel is given them alone.
        rows, place, out = place, None, out[place]
    changes, rule, seed, counted = None, None, 0, None
    where = place if rows is None else rows
    if update is not None and where is not None:
        steps = None
        if update.steps is not None:
            counted = update.steps[where] + 1
            steps = tuple(each.float() for each in corrections(counted, *update.numbers[:3]))
        state = update.state if rows is None else tuple(each[rows] for each in update.state)
        changes, rule = (update.numbers, state, steps), TRITON_RULES[update.rule]
        seed = 0 if update.seed is None else mixed(update.seed, start) % (1 << 30)
    call(
        finish_kernel, blocks(k, block_k), product, prepared.weight, prepared.ids, prepared.inverse, out, place,
        tuple(share.sorted for share in shares), None if norm_shares is None else norm_shares.sorted, mean, factor,
        changes, n, k, start, seed,
        1 if product is None else product.stride(0), *prepared.weight.stride(), out.stride(0),
        RULE=rule, STOCHASTIC=update is not None and update.seed is not None,
        D=d, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    if update is not None and where is not None:
        update.touched = True
        if counted is not None and update.steps is not None:
            update.steps[where] = counted  # not before the launch: a kernel that fails leads to another backend
