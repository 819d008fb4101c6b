"""One chunk of the class pass in plain PyTorch, on any device: rows, logits, sums, gradients of rows.

A logits tile is [K, N], classes first: the rows of a chunk are then the left factor of every product, and the sums
over classes run down contiguous lines. Every buffer is the caller's and is reused from chunk to chunk.

`bounded` chooses between the two ways to an exponential (see `class_pass/backward.py`): exp(z) as it is when the logits
cannot overflow, exp(z - running max) otherwise. On the bounded path x carries a factor log2(e), so that the tile holds
z log2(e) and exp(z) is its exp2, which is several times faster than exp on CPUs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmargin.backends.precision import accumulate
from tritonmargin.backends.variants import hinge
from tritonmargin.optim.update_rules import RowUpdate, update_rows

MANY = 64  # samples of a class; of more of them a sum is made in float64


@dataclass
class Running:
    """What the forward pass sums up per sample, chunk by chunk; None: nobody asked. All [N]."""

    total: Tensor | None = None  # sum over j != y of exp(z_ij - maximum), maximum = 0 on the bounded path
    maximum: Tensor | None = None  # running max, only on the unbounded path
    hardest: Tensor | None = None  # max over j != y of z_ij, as the tile has it
    hardest_row: Tensor | None = None  # its position in the pass, -1 at first
    threshold: Tensor | None = None  # t_i of the hinge
    hinge: Tensor | None = None  # sum over j != y of relu(z_ij - threshold_i)
    violations: Tensor | None = None  # how many of them are positive


class Places:
    """One row of the pass a sample, -1 for none, sorted once: the samples of a chunk are then a slice.

    Of samples with the same row the first one stays first: their sums keep their order.
    """

    def __init__(self, row: Tensor) -> None:
        self.row, self.sample = row.sort(stable=True)
        self.rows: list[int] = self.row.tolist()

    def inside(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Samples whose row lies in this chunk, and its index there."""
        first, last = bisect_left(self.rows, start), bisect_left(self.rows, stop)
        return self.sample[first:last], self.row[first:last] - start


@dataclass
class SampleGrad:
    """The gradient of a number that looks at one class row a sample: the target's, or the hardest wrong class's."""

    places: Places
    grad: Tensor  # [N, D]  dL/dw' of that row: g_i x_i


class Rows(NamedTuple):
    """A chunk's class rows w', ready for the products."""

    operand: Tensor  # [K, D]  in the dtype of the products
    exact: Tensor  # [K, D]  in the precision of sums if they are unit rows, else `operand`
    inverse: Tensor | None  # [K]  1/|w|, 0 for a zero row, if they are unit rows


class RowGrads(NamedTuple):
    """What is added to dL/dw of the rows beside the product of the chunk's dlogits with the samples."""

    unit: list[SampleGrad]  # gradients of the row w' that the logits are made of
    norm: SampleGrad | None = None  # gradient of |w|, already along w
    mean: Tensor | None = None  # [D]  dL/d(sum_j a_j w'_j)
    undo: Tensor | None = None  # []  undoes a scale that the product carries


def prepare_rows(
    weight: Tensor,
    class_ids: Tensor | None,
    start: int,
    stop: int,
    unit: bool,
    buffer: Tensor,
    wide: Tensor,
    inverse: Tensor | None = None,
) -> Rows:
    """Rows start..stop of the pass, normalised if `unit`, in `buffer` and `wide` (the same for full precision).

    inverse: [K] their 1/|w|, where it is known.
    """
    chunk = weight[start:stop] if class_ids is None else weight.index_select(0, class_ids[start:stop])
    rows, exact = buffer[: len(chunk)], wide[: len(chunk)]
    if not unit:
        rows = chunk if chunk.dtype == rows.dtype else rows.copy_(chunk)
        return Rows(rows, rows, None)
    # Mixed dtypes in one elementwise call are several times slower on a CPU than a copy first.
    source = chunk if chunk.dtype == exact.dtype else exact.copy_(chunk)
    if inverse is None:
        inverse = inverse_norm(torch.linalg.vector_norm(source, dim=1))
    torch.mul(source, inverse[:, None], out=exact)
    return Rows(exact if rows.dtype == exact.dtype else rows.copy_(exact), exact, inverse)


def reduce_logits(
    z: Tensor, start: int, bounded: bool, tile: Tensor, scratch: Tensor, keep: bool, run: Running
) -> None:
    """Fold one chunk's logits z, targets masked, into `run`.

    With `keep`, leaves exp(z - shift) in `tile`, for backward. `scratch` is a tile in the precision of sums; where z
    has to be kept, another buffer than `tile` and z.
    """
    if run.hardest is not None and run.hardest_row is not None:
        fold_hardest(z, widened(z, scratch).amax(dim=0), start, run.hardest, run.hardest_row)
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
    p = exp_(torch.sub(z, shift, out=scratch))
    run.total += p.sum(dim=0)
    if keep and p is not tile:
        tile.copy_(p)
    run.maximum.copy_(maximum)


def finish_gradient(
    product: Tensor | None,
    scratch: Tensor,
    prepared: Rows,
    start: int,
    more: RowGrads,
    mean_weight: Tensor | None,
    out: Tensor,
    where: slice | Tensor | None,
    update: RowUpdate | None = None,
) -> None:
    """From A = dL/dw' of a chunk (product, in its own dtype; None: 0) to dL/dw, in `out` (its rows `where`).

    With `update`, `out` is the weight, and what is written is its rows after the update.

    Adds what `more` has for these rows (`mean_weight` [K] are their a_j of the mean), then, for unit rows,
    dL/dw = (A - w' (w' . A)) / |w|. `scratch` is [K, D] in the precision of sums; it may be `out`, and so may the
    product. Where nothing is to be done but to add the gradients of single rows, all three may be `out` in a lower
    precision.
    """
    stop = start + len(scratch)
    gradient = scratch
    if product is None:
        gradient.zero_()
    elif product is not gradient:
        gradient.copy_(product)
    if gradient.dtype != accumulate(gradient.dtype):
        add_to_few(gradient, start, [*more.unit, *([] if more.norm is None else [more.norm])])
        return
    scale = None if more.undo is None else more.undo.reciprocal()
    for each in more.unit:
        sample, row = each.places.inside(start, stop)
        if len(sample):
            grad = each.grad.index_select(0, sample)
            add_rows(gradient, row, grad if scale is None else grad * scale)
    if more.mean is not None and mean_weight is not None:
        gradient.addr_(mean_weight, more.mean if scale is None else more.mean * scale)
    project(gradient, prepared, more.undo)
    if more.norm is not None:
        sample, row = more.norm.places.inside(start, stop)
        if len(sample):
            add_rows(gradient, row, more.norm.grad.index_select(0, sample))
    if update is not None:
        assert where is not None
        update_rows(update, where, gradient)
    elif where is not None:
        out[where] = gradient.to(out.dtype)
    elif out is not gradient:
        out.copy_(gradient)


def project(gradient: Tensor, prepared: Rows, undo: Tensor | None) -> None:
    """dL/dw from dL/dw', in place: across the row and divided by its length, if w' is a unit row."""
    if prepared.inverse is not None:
        dot = torch.linalg.vecdot(prepared.exact, gradient)
        gradient.addcmul_(prepared.exact, dot[:, None], value=-1.0)
        gradient.mul_((prepared.inverse if undo is None else prepared.inverse * undo)[:, None])
    elif undo is not None:
        gradient.mul_(undo)


def new_tile(x: Tensor, k: int, dtype: torch.dtype) -> Tensor:  # [K, N]
    """A tile whose lines run over samples."""
    return x.new_empty(k, x.shape[0], dtype=dtype)


# -- what they are made of -------------------------------------------------------------------------------------------


def widened(z: Tensor, scratch: Tensor) -> Tensor:
    """z in the precision of sums: on a CPU a copy and a pass are several times as fast as a pass that converts."""
    return z if z.dtype == scratch.dtype else scratch.copy_(z)


def fold_hardest(z: Tensor, value: Tensor, start: int, hardest: Tensor, hardest_row: Tensor) -> None:
    """The chunk's maxima [N] into what was the hardest; their rows are looked for where there is something better.

    A maximum with its index takes ten times as long as one without, and after a few chunks hardly any is better. Until
    then it is taken of the tile as it is: a copy of most of it would be another tile.
    """
    sample = (value > hardest).nonzero().squeeze(1)
    torch.maximum(value, hardest, out=hardest)  # nan stays nan
    if 8 * len(sample) > z.shape[1]:
        hardest_row[sample] = z.max(dim=0).indices[sample] + start
    elif len(sample):
        hardest_row[sample] = z.index_select(1, sample).max(dim=0).indices + start


def add_rows(out: Tensor, row: Tensor, values: Tensor) -> None:
    """out[row] += values, equal rows in one order on every run: index_add_ is atomic on a GPU, index_put_ on a CPU.

    Many values of one row, added one after the other, would lose digits that a product keeps.
    """
    if out.is_cuda:
        out.index_put_((row,), values, accumulate=True)
        return
    if len(row) > MANY:
        rows, index = row.unique(return_inverse=True)
        if len(row) > MANY * len(rows):
            sums = out.index_select(0, rows).double().index_add_(0, index, values.double())
            out.index_copy_(0, rows, sums.to(out.dtype))
            return
    out.index_add_(0, row, values)


def add_to_few(out: Tensor, start: int, grads: list[SampleGrad]) -> None:
    """The gradients of the chunk's rows, each row summed in the precision of sums and rounded once."""
    inside = [(each, *each.places.inside(start, start + len(out))) for each in grads]
    if any(len(row) for _, _, row in inside):
        rows, index = torch.cat([row for _, _, row in inside]).unique(return_inverse=True)
        values = torch.cat([each.grad.index_select(0, sample) for each, sample, _ in inside])
        sums = out.index_select(0, rows).to(values.dtype)
        add_rows(sums, index, values)
        out.index_copy_(0, rows, sums.to(out.dtype))


def exp_(z: Tensor) -> Tensor:
    """exp(z), z <= 0, in place: two passes, for a CPU's exp2 is several times as fast as its exp in float32."""
    return z.mul_(math.log2(math.e)).exp2_()


def inverse_norm(norm: Tensor) -> Tensor:
    """1/norm, and 0 for a row whose norm is 0 (or so small that 1/norm overflows)."""
    smallest = 4.0 * torch.finfo(norm.dtype).tiny
    return torch.where(norm < smallest, torch.inf, norm).reciprocal_()
