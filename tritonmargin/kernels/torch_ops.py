"""The four functions of a backend, in plain PyTorch: any device, one chunk of classes at a time.

A logits tile is [K, N], classes first: the rows of a chunk are then the left factor of every product, and the sums
over classes run down contiguous lines. Every buffer is the caller's and is reused from chunk to chunk.

`bounded` chooses between the two ways to an exponential (see `stream.py`): exp(z) as it is when the logits cannot
overflow, exp(z - running max) otherwise. On the bounded path x carries a factor log2(e), so that the tile holds
z log2(e) and exp(z) is its exp2, which is several times faster than exp on CPUs and one instruction on GPUs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmargin.kernels.updates import RowUpdate, update_rows
from tritonmargin.kernels.variants import hinge, hinge_slope

# Elementwise work is a pass over memory: it needs a tile in the precision of sums, and the rows in it.
FUSED = False


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


def prepare_rows(
    weight: Tensor, class_ids: Tensor | None, start: int, stop: int, unit: bool, buffer: Tensor, wide: Tensor
) -> Rows:
    """Rows start..stop of the walk, normalised if `unit`, in `buffer` and `wide` (the same for full precision)."""
    chunk = weight[start:stop] if class_ids is None else weight.index_select(0, class_ids[start:stop])
    rows, exact = buffer[: len(chunk)], wide[: len(chunk)]
    if not unit:
        rows = chunk if chunk.dtype == rows.dtype else rows.copy_(chunk)
        return Rows(rows, rows, None, chunk, None)
    # Mixed dtypes in one elementwise call are several times slower on a CPU than a copy first.
    source = chunk if chunk.dtype == exact.dtype else exact.copy_(chunk)
    inverse = inverse_norm(torch.linalg.vector_norm(source, dim=1))
    torch.mul(source, inverse[:, None], out=exact)
    return Rows(exact if rows.dtype == exact.dtype else rows.copy_(exact), exact, inverse, chunk, None)


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
    """Fold one chunk's logits into `run`.

    With `keep`, leaves in `tile` what `weigh_chunk` can start from: exp(z) on the bounded path and z otherwise, the
    targets masked. `scratch` is a tile in the precision of sums; where z has to be kept, another buffer than `tile`.
    """
    z = logits(rows, x, bias, target, start, tile)
    if run.hardest is not None and run.hardest_row is not None:
        fold_hardest(z, widened(z, scratch).amax(dim=0), start, run.hardest[0], run.hardest_row[0])
    if run.threshold is not None and run.hinge is not None and run.violations is not None:
        total, violations = hinge(widened(z, scratch), run.threshold, scratch)
        run.hinge += total
        run.violations += violations
    if run.total is None:
        return
    z = widened(z, scratch)
    if bounded:
        run.total += z.exp2_().sum(dim=0)
        if keep and z is not tile:
            tile.copy_(z)
        return
    assert run.maximum is not None
    maximum = torch.maximum(run.maximum, z.amax(dim=0))
    # Where every logit so far is masked the maximum is -inf, and -inf - -inf would be nan.
    shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
    run.total *= torch.exp(run.maximum - shift)
    run.total += exp_(torch.sub(z, shift, out=scratch)).sum(dim=0)
    run.maximum.copy_(maximum)


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
    `ready` is the tile that `reduce_chunk` left, if it was retained; it is not written to.

    Returns the share in the compute dtype, for the GEMMs, and with `factor` [N] the sum over samples of factor times
    the share, [K], before it is rounded.
    """
    if kind == "exp":
        assert factor is None  # logits with a bias have no bound
        return (logits(rows, x, bias, target, start, tile).exp2_() if ready is None else ready), None
    z = logits(rows, x, bias, target, start, tile) if ready is None else ready
    z = widened(z, scratch)
    if kind == "hinge":
        hinge_slope(z, shift, scratch)
    else:
        exp_(torch.sub(z, shift, out=scratch))
    by_class = None if factor is None else scratch @ factor
    return (scratch if tile.dtype == scratch.dtype else tile.copy_(scratch)), by_class


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
    dL/dw = (A - w' (w' . A)) / |w|. `factor` undoes a scale that A carries and the shares do not. `scratch` is [K, D]
    in the precision of sums; it may be `out`, and so may the product. Where nothing is to be done but to add the
    shares, all three may be `out` in a lower precision.
    """
    stop = start + len(scratch)
    gradient = scratch
    if product is None:
        gradient.zero_()
    elif product is not gradient:
        gradient.copy_(product)
    if gradient.dtype != accumulate(gradient.dtype):
        add_to_few(gradient, start, [*shares, *([] if norm_shares is None else [norm_shares])])
        return
    undo = None if factor is None else factor.reciprocal()
    for share in shares:
        sample, row = inside_chunk(share.row, start, stop)
        if len(sample):
            along = share.along.index_select(0, sample)
            add_rows(gradient, row, along if undo is None else along * undo)
    if mean is not None:
        class_weight, along = mean
        gradient.addr_(class_weight, along if undo is None else along * undo)
    if prepared.inverse is not None:
        assert prepared.exact is not None
        dot = torch.linalg.vecdot(prepared.exact, gradient)
        gradient.addcmul_(prepared.exact, dot[:, None], value=-1.0)
        gradient.mul_((prepared.inverse if factor is None else prepared.inverse * factor)[:, None])
    elif factor is not None:
        gradient.mul_(factor)
    if norm_shares is not None:
        sample, row = inside_chunk(norm_shares.row, start, stop)
        add_rows(gradient, row, norm_shares.along.index_select(0, sample))
    if update is not None:
        assert place is not None
        update_rows(update, place, gradient)
    elif place is not None:
        out[place] = gradient.to(out.dtype)
    elif out is not gradient:
        out.copy_(gradient)


def slots(x: Tensor, chunk: int) -> int:
    """How many places for partial results a sample needs."""
    return 1


def new_tile(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:  # [K, N]
    """A tile whose lines run over samples."""
    return x.new_empty(k, x.shape[0], dtype=dtype)


# -- what the four are made of -----------------------------------------------------------------------------------


def logits(rows: Tensor, x: Tensor, bias: Tensor | None, target: Tensor, start: int, tile: Tensor) -> Tensor:
    """tile = rows x^T (+ bias), -inf at the targets: the sum over j != y leaves them out."""
    torch.mm(rows, x.t(), out=tile)
    if bias is not None:
        tile += bias[:, None]
    sample, place = inside_chunk(target, start, start + len(tile))
    if len(sample):
        tile[place, sample] = -torch.inf
    return tile


def widened(z: Tensor, scratch: Tensor) -> Tensor:
    """z in the precision of sums: on a CPU a copy and a pass are several times as fast as a pass that converts."""
    return z if z.dtype == scratch.dtype else scratch.copy_(z)


def fold_hardest(z: Tensor, value: Tensor, start: int, hardest: Tensor, hardest_row: Tensor) -> None:
    """The chunk's maxima [N] into what was the hardest; their rows are looked for where there is something better.

    A maximum with its place takes ten times as long as one without, and after a few chunks hardly any is better. Until
    then it is taken of the tile as it is: a copy of most of it would be another tile.
    """
    sample = (value > hardest).nonzero().squeeze(1)
    torch.maximum(value, hardest, out=hardest)  # nan stays nan
    if 8 * len(sample) > z.shape[1]:
        hardest_row[sample] = z.max(dim=0).indices[sample] + start
    elif len(sample):
        hardest_row[sample] = z.index_select(1, sample).max(dim=0).indices + start


def inside_chunk(row: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Samples whose row lies in this chunk, and its place there."""
    sample = ((row >= start) & (row < stop)).nonzero().squeeze(1)
    return sample, row.index_select(0, sample) - start


def add_rows(out: Tensor, row: Tensor, values: Tensor) -> None:
    """out[row] += values, equal rows in one order on every run: index_add_ is atomic on a GPU, index_put_ on a CPU."""
    if out.is_cuda:
        out.index_put_((row,), values, accumulate=True)
    else:
        out.index_add_(0, row, values)


def add_to_few(out: Tensor, start: int, shares: list[Shares]) -> None:
    """The shares of the chunk's rows, each row summed in the precision of the shares and rounded once."""
    inside = [(share, *inside_chunk(share.row, start, start + len(out))) for share in shares]
    if any(len(row) for _, _, row in inside):
        rows, place = torch.cat([row for _, _, row in inside]).unique(return_inverse=True)
        along = torch.cat([share.along.index_select(0, sample) for share, sample, _ in inside])
        sums = out.index_select(0, rows).to(along.dtype)
        add_rows(sums, place, along)
        out.index_copy_(0, rows, sums.to(out.dtype))


def exp_(z: Tensor) -> Tensor:
    """exp(z), z <= 0, in place: two passes, for a CPU's exp2 is several times as fast as its exp in float32."""
    return z.mul_(math.log2(math.e)).exp2_()


def inverse_norm(norm: Tensor) -> Tensor:
    """1/norm, and 0 for a row whose norm is 0 (or so small that 1/norm overflows)."""
    smallest = 4.0 * torch.finfo(norm.dtype).tiny
    return torch.where(norm < smallest, torch.inf, norm).reciprocal_()


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and losses: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
