"""The class pass forward, in PyTorch: one visit to every chunk of classes.

    rows, logits, sums      1 product a chunk

Target numbers come from one gathered row a sample, never through a tile: they are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritonmargin.backends.precision import operands
from tritonmargin.backends.torch_ops import Running, new_tile, reduce_logits
from tritonmargin.class_pass.chunks import Chunks, retained_of
from tritonmargin.class_pass.exp_range import finite
from tritonmargin.spec import PassInputs, PassOutput, PassSpec


class Saved(NamedTuple):
    """What backward needs beside the inputs. Empty tensors: not made."""

    total: Tensor  # [N]  sum of exp(z - shift)
    shift: Tensor  # [N]  the largest z, 0 where it is -inf; empty on the bounded path: 0
    hardest_row: Tensor  # [N]
    mean_row: Tensor  # [D]  sum_j a_j w'_j
    target_rows: Tensor  # [N, D]  w'_y, 0 where there is no target
    retained: Tensor  # [R, N]  tiles of the first R classes
    inverse: Tensor  # [C]  1/|w_j| of the pass's rows, where w' are unit rows


def run_forward(inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, Saved]:
    x = inputs.x
    with torch.autocast(x.device.type, enabled=False):
        chunks = Chunks(inputs, spec)
        run = running(inputs, spec, chunks)
        count = retained_of(chunks.n, chunks.d, chunks.classes, spec)
        retained = new_tile(chunks.x, count, chunks.dtype)
        # Where a tile is read again after a difference, the difference needs a buffer of its own.
        again = spec.want_rest and inputs.threshold is not None
        scratch = chunks.scratch(separate=again)
        wide = chunks.scratch(separate=True) if chunks.adds_wide and again else scratch
        keeps_p = inputs.threshold is None and chunks.retains_p(count)
        mean_row = x.new_zeros(0 if inputs.mean_weight is None else chunks.d)
        inverse = x.new_empty(chunks.classes if spec.unit_weight else 0)
        for start, stop in chunks.ranges():
            rows = chunks.rows(start, stop)
            if rows.inverse is not None:
                inverse[start:stop] = rows.inverse
            a = chunks.select(inputs.mean_weight, start, stop)
            if a is not None:
                mean_row += a @ rows.exact.to(chunks.acc)
            if spec.want_rest or spec.want_hardest or inputs.threshold is not None:
                keep = stop <= count
                tile = retained[start:stop] if keep else chunks.tile_buffer[: stop - start]
                z = chunks.logits(chunks.product(rows, tile), start, stop, wide[: stop - start])
                work = tile if keep and keeps_p and tile.dtype == scratch.dtype else scratch[: stop - start]
                reduce_logits(z, start, spec.bounded, tile, work, keep and keeps_p, run)
        return results(inputs, chunks, run, mean_row, retained, inverse)


def running(inputs: PassInputs, spec: PassSpec, chunks: Chunks) -> Running:
    """The sums that are asked for, before the first class."""
    threshold = inputs.threshold
    run = Running(threshold=None if threshold is None else threshold.contiguous())
    if spec.want_rest:
        run.total = chunks.per_sample(0.0)
        run.maximum = None if spec.bounded else chunks.per_sample(-torch.inf)
    if spec.want_hardest:
        run.hardest, run.hardest_row = chunks.per_sample(-torch.inf), chunks.per_sample(-1, torch.int64)
    if threshold is not None:
        run.hinge, run.violations = chunks.per_sample(0.0), chunks.per_sample(0.0)
    return run


def results(
    inputs: PassInputs, chunks: Chunks, run: Running, mean_row: Tensor, retained: Tensor, inverse: Tensor
) -> tuple[PassOutput, Saved]:
    x = inputs.x
    # Each output is a tensor of its own, asked for or not: autograd tells outputs apart by the tensor.
    rest, total, shift, norm, bias, mean_logit, hinge, violations, hardest_product = (x.new_empty(0) for _ in range(9))
    hardest_row = chunks.target.new_empty(0)
    if run.total is not None:
        total, rest = run.total, run.total.log()
        if run.maximum is not None:
            shift = finite(run.maximum)
            rest = rest + shift
    if run.hardest is not None and run.hardest_row is not None:
        hardest, hardest_row = run.hardest, run.hardest_row
        product = (x * chunks.gather(hardest_row)[0]).sum(dim=1)
        if inputs.bias is not None:
            product = product + chunks.bias_at(hardest_row)
        hardest_product = torch.where((hardest_row < 0) | hardest.isnan(), hardest, product)
    if inputs.mean_weight is not None:
        mean_logit = x @ mean_row
        if inputs.bias is not None:
            a, b = (chunks.select(each, 0, chunks.classes) for each in (inputs.mean_weight, inputs.bias))
            assert a is not None
            assert b is not None
            mean_logit = mean_logit + (a * b).sum()
    if inputs.bias is not None:
        bias = chunks.bias_at(chunks.target)
    target_rows, target_norm = chunks.gather(chunks.target)
    out = PassOutput(
        rest=rest,
        target_product=(x * target_rows).sum(dim=1),
        target_norm=target_norm,
        target_bias=bias,
        embedding_norm=norm,
        mean_logit=mean_logit,
        hinge=hinge if run.hinge is None else run.hinge,
        violations=violations if run.violations is None else run.violations,
        hardest_product=hardest_product,
        hardest_row=hardest_row,
    )
    return out, Saved(total, shift, hardest_row, mean_row, target_rows, retained, inverse)


def fake_forward(inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, Saved]:
    """Empty tensors like those of `run_forward`."""
    x, target = inputs.x, inputs.target
    n, d = x.shape
    classes = inputs.weight.shape[0] if inputs.class_ids is None else inputs.class_ids.shape[0]
    hinging, hardest = inputs.threshold is not None, n if spec.want_hardest else 0
    out = PassOutput(
        rest=x.new_empty(n if spec.want_rest else 0),
        target_product=x.new_empty(n),
        target_norm=x.new_empty(n),
        target_bias=x.new_empty(0 if inputs.bias is None else n),
        embedding_norm=x.new_empty(0),
        mean_logit=x.new_empty(0 if inputs.mean_weight is None else n),
        hinge=x.new_empty(n if hinging else 0),
        violations=x.new_empty(n if hinging else 0),
        hardest_product=x.new_empty(hardest),
        hardest_row=target.new_empty(hardest),
    )
    saved = Saved(
        total=x.new_empty(n if spec.want_rest else 0),
        shift=x.new_empty(n if spec.want_rest and not spec.bounded else 0),
        hardest_row=target.new_empty(hardest),
        mean_row=x.new_empty(0 if inputs.mean_weight is None else d),
        target_rows=x.new_empty(n, d),
        retained=new_tile(x, retained_of(n, d, classes, spec), operands(spec.dtype)),
        inverse=x.new_empty(classes if spec.unit_weight else 0),
    )
    return out, saved
