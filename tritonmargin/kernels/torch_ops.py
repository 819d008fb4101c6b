"""The four functions of a backend, in plain PyTorch: any device, one chunk of classes at a time.

A logits tile is [K, N], classes first: the rows of a chunk are then the left factor of every product, and the sums
over classes run down contiguous lines. Every buffer is the caller's and is reused from chunk to chunk.

`bounded` chooses between the two ways to an exponential (see `stream.py`): exp(z) as it is when the logits cannot
overflow, exp(z - running max) otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmargin.kernels.variants import hinge, hinge_slope


@dataclass
class Running:
    """What the forward pass keeps per sample while it walks; None: nobody asked."""

    total: Tensor | None = None  # [N]  sum over j != y of exp(z_ij - maximum), maximum = 0 on the bounded path
    maximum: Tensor | None = None  # [N]  running max, only on the unbounded path
    hardest: Tensor | None = None  # [N]  max over j != y of z_ij, as the tile has it
    hardest_row: Tensor | None = None  # [N]  its position in the walk, -1 at first
    threshold: Tensor | None = None  # [N]  t_i of the hinge
    hinge: Tensor | None = None  # [N]  sum over j != y of relu(z_ij - threshold_i)
    violations: Tensor | None = None  # [N]  how many of them are positive


@dataclass
class Shares:
    """Gradients of numbers that look at one class row a sample: the target's, or the hardest wrong class's."""

    row: Tensor  # [N]  position in the walk, -1 for none
    along: Tensor  # [N, D]  dL/dw' of that row: g_i x_i


class Rows(NamedTuple):
    """A chunk's class rows w', ready for the products."""

    rows: Tensor  # [K, D]  in the compute dtype; as they are if the tile takes 1/|w|
    exact: Tensor  # [K, D]  in the precision of sums if they are unit rows, else `rows`
    inverse: Tensor | None  # [K]  1/|w|, 0 for a zero row, if they are unit rows
    on_tile: bool = False  # 1/|w| goes to the tile instead of the rows, and `exact` is a buffer not filled yet


def prepare_rows(
    weight: Tensor,
    class_ids: Tensor | None,
    start: int,
    stop: int,
    unit: bool,
    on_tile: bool,
    buffer: Tensor,
    wide: Tensor,
) -> Rows:
    """Rows start..stop of the walk, normalised if `unit`, in `buffer` and `wide` (the same for full precision).

    `on_tile`, for weights that are in a low compute dtype already: three passes over [K, D] and the rounding of unit
    rows are saved for one over the tile, [K, N].
    """
    chunk = weight[start:stop] if class_ids is None else weight.index_select(0, class_ids[start:stop])
    rows, exact = buffer[: len(chunk)], wide[: len(chunk)]
    if not unit:
        rows = chunk if chunk.dtype == rows.dtype else rows.copy_(chunk)
        return Rows(rows, rows, None)
    if on_tile:
        return Rows(chunk, exact, inverse_norm(torch.linalg.vector_norm(chunk, dim=1, dtype=exact.dtype)), True)
    # Mixed dtypes in one elementwise call are several times slower on a CPU than a copy first.
    source = chunk if chunk.dtype == exact.dtype else exact.copy_(chunk)
    inverse = inverse_norm(torch.linalg.vector_norm(source, dim=1))
    torch.mul(source, inverse[:, None], out=exact)
    return Rows(exact if rows.dtype == exact.dtype else rows.copy_(exact), exact, inverse)


def reduce_chunk(
    prepared: Rows,
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
    z = logits(prepared, x, bias, target, start, tile, scratch)
    if run.hardest is not None and run.hardest_row is not None:
        value, place = z.max(dim=0)
        better = value > run.hardest
        run.hardest.copy_(torch.where(better | value.isnan(), value, run.hardest))
        run.hardest_row.copy_(torch.where(better, place + start, run.hardest_row))
    if run.threshold is not None and run.hinge is not None and run.violations is not None:
        total, violations = hinge(z, run.threshold, scratch)
        run.hinge += total
        run.violations += violations
    if run.total is None:
        return
    if bounded:
        # A conversion on its own and in place is several times faster than one inside the sum.
        z = z if z.dtype == scratch.dtype else scratch.copy_(z)
        run.total += z.exp_().sum(dim=0)
        if keep and z is not tile:
            tile.copy_(z)
        return
    assert run.maximum is not None
    maximum = torch.maximum(run.maximum, z.amax(dim=0))
    # Where every logit so far is masked the maximum is -inf, and -inf - -inf would be nan.
    shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
    run.total *= torch.exp(run.maximum - shift)
    run.total += torch.sub(z, shift, out=scratch).exp_().sum(dim=0)
    run.maximum.copy_(maximum)


def weigh_chunk(
    prepared: Rows,
    x: Tensor,
    bias: Tensor | None,
    target: Tensor,
    start: int,
    kind: str,
    shift: Tensor,
    tile: Tensor,
    scratch: Tensor,
    ready: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The chunk's share in the gradient, without the factors that only depend on the sample, 0 at the targets.

    kind "exp": exp(z), times 1/|w_j| where the tile takes it; "softmax": exp(z - shift_i) with shift = rest;
    "hinge": 1 where z > shift_i.
    `ready` is the tile that `reduce_chunk` left, if it was retained; it is not written to.

    Returns the share in the compute dtype, for the GEMMs, and in the precision of sums (often the same tensor).
    """
    if kind == "exp":
        if ready is None:
            ready = logits(prepared, x, bias, target, start, tile, scratch).exp_()
        elif prepared.on_tile:
            ready = scratch.copy_(ready)
        if prepared.on_tile and prepared.inverse is not None:
            ready = tile.copy_(ready.mul_(prepared.inverse[:, None]))
        return ready, ready
    z = logits(prepared, x, bias, target, start, tile, scratch) if ready is None else ready
    if kind == "hinge":
        hinge_slope(z, shift, scratch)
    else:
        torch.sub(z, shift, out=scratch).exp_()
    return (scratch if tile.dtype == scratch.dtype else tile.copy_(scratch)), scratch


def finish_rows(
    gradient: Tensor,
    prepared: Rows,
    start: int,
    shares: list[Shares],
    norm_shares: Shares | None,
    mean: tuple[Tensor, Tensor] | None,
    factor: Tensor | None,
) -> Tensor:
    """From A = dL/dw' of a chunk (gradient, in the precision of sums, changed in place) to dL/dw.

    Adds the target rows' shares and the mean's (class weights [K] times one row [D]), then, for unit rows,
    dL/dw = (A - w' (w' . A)) / |w|; where the tile took 1/|w|, A has it already. `factor` undoes a scale that A
    carries and the shares do not.
    """
    stop = start + len(gradient)
    undo = None if factor is None else factor.reciprocal()
    inverse, on_tile = prepared.inverse, prepared.on_tile
    for share in shares:
        sample, place = inside_chunk(share.row, start, stop)
        if len(sample):
            along = share.along.index_select(0, sample)
            along = along if undo is None else along * undo
            along = along * inverse[place, None] if on_tile and inverse is not None else along
            gradient.index_add_(0, place, along)
    if mean is not None:
        class_weight, row = mean
        class_weight = class_weight * inverse if on_tile and inverse is not None else class_weight
        gradient.addr_(class_weight, row if undo is None else row * undo)
    if inverse is not None:
        exact = prepared.exact.copy_(prepared.rows) if on_tile else prepared.exact
        dot = torch.linalg.vecdot(exact, gradient)
        dot = dot * inverse * inverse if on_tile else dot  # w' w'^T = w w^T / |w|^2
        gradient.addcmul_(exact, dot[:, None], value=-1.0)
    rest = factor if on_tile else inverse if factor is None else factor if inverse is None else inverse * factor
    if rest is not None:
        gradient.mul_(rest if rest.ndim == 0 else rest[:, None])
    if norm_shares is not None:
        sample, place = inside_chunk(norm_shares.row, start, stop)
        gradient.index_add_(0, place, norm_shares.along.index_select(0, sample))
    return gradient


# -- what the four are made of -----------------------------------------------------------------------------------


def logits(
    prepared: Rows, x: Tensor, bias: Tensor | None, target: Tensor, start: int, tile: Tensor, scratch: Tensor
) -> Tensor:
    """z = w' x^T (+ bias), -inf at the targets: the sum over j != y leaves them out. In `tile`, or in `scratch`."""
    z = torch.mm(prepared.rows, x.t(), out=tile)
    if prepared.on_tile and prepared.inverse is not None:
        z = scratch.copy_(tile).mul_(prepared.inverse[:, None])
    if bias is not None:
        z += bias[:, None]
    sample, place = inside_chunk(target, start, start + len(z))
    if len(sample):
        z[place, sample] = -torch.inf
    return z


def weighted_sum(prepared: Rows, weights: Tensor) -> Tensor:  # [K, D], [K] -> [D]
    """sum_j weights_j w'_j in the precision of `weights`."""
    if prepared.on_tile and prepared.inverse is not None:
        return (weights * prepared.inverse) @ prepared.rows.to(weights.dtype)
    return weights @ prepared.exact.to(weights.dtype)


def inside_chunk(row: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Samples whose row lies in this chunk, and its place there."""
    sample = ((row >= start) & (row < stop)).nonzero().squeeze(1)
    return sample, row.index_select(0, sample) - start


def inverse_norm(norm: Tensor) -> Tensor:
    """1/norm, and 0 for a row whose norm is 0 (or so small that 1/norm overflows)."""
    smallest = 4.0 * torch.finfo(norm.dtype).tiny
    return torch.where(norm < smallest, torch.inf, norm).reciprocal_()


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and losses: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
