"""The losses as functions: gather the target's numbers, apply the margin, stream the rest, apply the objective."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritonmargin import checks, reference
from tritonmargin.kernels import current_backend
from tritonmargin.kernels.torch_ops import accumulate, inverse_norm
from tritonmargin.margins import Margin, Softmax, TargetRows
from tritonmargin.objectives import OBJECTIVES, smoothed
from tritonmargin.stream import Streamed, stream
from tritonmargin.walk import is_bounded


class Stats(NamedTuple):
    """What one pass knows about each sample; all [N], detached. Ignored rows: nan, nan, -1, nan, False."""

    target_logit: Tensor  # t, after the margin, bias included
    rest_logsumexp: Tensor  # log sum_{j != y} exp(z_j)
    hardest_class: Tensor  # int64 class number of the largest z_j, j != y; -1 where there is no other class
    hardest_logit: Tensor  # that z_j
    correct: Tensor  # bool: the target's logit before the margin is above hardest_logit


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: Margin,
    *,
    bias: Tensor | None = None,
    class_ids: Tensor | None = None,
    sub_centers: int = 1,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    objective: str = "softmax",
    sparse_grad: bool = False,
    retain_bytes: int = 0,
    chunk_bytes: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy (or a hinge) over C classes with a margin on the sample's own, without the N x C logits.

    With z_ij = x'_i . w'_j + b_j, x' and w' the embeddings and class weights normalised and scaled as the margin says,
    and t_i = margin(z_iy):

        "softmax"    softplus(rest_i - t_i) = -log(e^{t_i} / (e^{t_i} + sum_{j != y} e^{z_ij}))
        "lse-hinge"  relu(rest_i - t_i),            rest_i = log sum_{j != y} e^{z_ij}
        "max-hinge"  relu(max_{j != y} z_ij - t_i)
        "hinge"      sum_{j != y} relu(z_ij - t_i), the multi-class SVM

    Products are computed in the dtype of autocast if it is on, else in the common dtype of embeddings and weight
    (float16 in float32 on the torch backend: exp(64) does not fit); sums and the loss in float32, or float64 if an
    input is float64. The loss can be differentiated once.

    Args:
        embeddings: [N, D] floating.
        weight: [C, D] floating, one row a class.
        target: [N] integer class numbers in [0, C), or `ignore_index`.
        margin: a `Margin`, e.g. `tm.ArcFace(m=0.5, s=64)`; `tm.Softmax()` for none.
        bias: [C], added to every logit, to the target's after the margin.
        class_ids: [S] int64, sorted, unique: the only classes to walk, as if the others did not exist (Partial FC).
            Every target must be among them; targets stay class numbers.
        sub_centers: rows per class; only 1 in this version.
        class_weight: [C], multiplies the loss of the class's samples.
        ignore_index: samples with this target add nothing to loss and gradients, whatever their embedding holds.
        label_smoothing: eps in [0, 1], for objective "softmax": (1 - eps) loss + eps/C sum_c -log p_c, over the walked
            classes, as torch's cross_entropy does on the logits with t in the target's place.
        reduction: "mean" (divided by the kept samples' class weights; nan if none is kept), "sum", "none" ([N]).
        objective: see above.
        sparse_grad: the gradient of weight is a sparse COO tensor of the walked rows only.
        retain_bytes: keep up to so many bytes of logits from forward to backward, which then need not be recomputed.
        chunk_bytes: how much memory a chunk of classes may take; default: a third of the last-level cache.
        return_stats: also return `Stats`, from the same pass.

    Returns:
        A scalar, or [N] for "none"; with return_stats a pair (loss, Stats).

    Raises:
        ValueError, TypeError: an argument that does not fit, named, before any work. Labels and ids are looked at on
            the CPU always, on a GPU only with the environment variable TRITONMARGIN_DEBUG=1 (it costs a sync).
        RuntimeError: when the gradient is differentiated again.
    """
    checks.check_call(
        embeddings, weight, target, margin, bias, class_ids, class_weight, ignore_index, label_smoothing, reduction,
        objective, sub_centers, retain_bytes, chunk_bytes,
    )  # fmt: skip
    compute = torch.promote_types(embeddings.dtype, weight.dtype)
    device = embeddings.device.type
    if compute != torch.float64 and torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
    backend = current_backend(embeddings.device, compute)
    if backend == "reference":
        return reference.margin_cross_entropy(
            embeddings, weight, target, margin, bias=bias, class_ids=class_ids, class_weight=class_weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction, objective=objective,
            sparse_grad=sparse_grad, return_stats=return_stats,
        )  # fmt: skip

    with torch.autocast(device, enabled=False):
        row = checks.positions(target, class_ids, weight.shape[0], ignore_index)
        valid = row >= 0
        label = torch.where(valid, target, 0).long()
        x, norm = scaled_rows(torch.where(valid[:, None], embeddings, 0.0).to(accumulate(compute)), margin)
        # Not index_select: its backward adds with atomics on a GPU.
        own_bias = None if bias is None else bias[label].to(x.dtype)
        walked = weight.shape[0] if class_ids is None else class_ids.shape[0]

        others = OBJECTIVES[objective].others
        want_rest = others == "rest" or return_stats
        threshold = None
        if others == "hinge":
            # The stream has to know t before it walks; its gradient is put back below.
            with torch.no_grad():
                product, weight_norm = target_numbers(x, weight, label, margin)
                threshold, _ = target_logit(margin, product, weight_norm, norm, label, own_bias)
        mean_weight = None
        if label_smoothing:
            ones = torch.ones(weight.shape[0], dtype=x.dtype, device=x.device)
            mean_weight = (ones if class_weight is None else class_weight.detach().to(x.dtype)) / max(walked, 1)
        needs_grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
        )
        out = stream(
            x,
            weight,
            row,
            class_ids=class_ids,
            bias=bias,
            class_weight=mean_weight,
            threshold=threshold,
            unit=margin.unit_weight,
            bounded=others != "hinge"
            and want_rest
            and bias is None
            and is_bounded(margin.logit_bound, walked, x.dtype),
            want_rest=want_rest,
            want_hardest=others == "hardest" or return_stats,
            sparse=sparse_grad,
            dtype=torch.float32 if compute == torch.float16 else compute,
            chunk_bytes=chunk_bytes or 0,
            retain_bytes=retain_bytes if needs_grad and others != "hardest" else 0,
            backend=backend,
        )
        t, plain = target_logit(margin, out.target_product, out.target_norm, norm, label, own_bias)
        hardest = hardest_logit(out, bias, class_ids)

        if others == "hinge":
            # d/dt sum_j relu(z_j - t) = -violations. The value is the stream's alone.
            found = out.hinge - out.violations * (t - t.detach())
        else:
            found = out.rest if others == "rest" else hardest
        class_factor = torch.ones_like(norm) if class_weight is None else class_weight.detach()[label].to(norm.dtype)
        class_factor = torch.where(valid, class_factor, 0.0)
        loss = OBJECTIVES[objective].loss(t, found) * class_factor
        if mean_weight is not None:
            loss = smoothed(
                loss, t, out.rest, *mean_logit(out, t, plain, label, bias, class_ids, mean_weight), label_smoothing
            )
        loss = torch.where(valid, loss, 0.0)
        if reduction == "mean":
            loss = loss.sum() / class_factor.sum()
        elif reduction == "sum":
            loss = loss.sum()
        if not return_stats:
            return loss
        return loss, statistics(t, plain, out, hardest, valid, class_ids)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` with class numbers as target, streamed.

    The cross-entropy of logits input @ linear_weight^T + linear_bias, its values and options.

    Args:
        input: [N, D], or [D] for a single sample.
        linear_weight: [C, D].
        target: [N] integer class numbers, or a scalar for a single sample. Class probabilities are not supported.
        linear_bias: [C].
        weight: [C] class weights.
        reduction, ignore_index, label_smoothing: as `torch.nn.functional.cross_entropy`; ignore_index None is -100.

    Raises:
        ValueError, TypeError: as `margin_cross_entropy`.
    """
    single = isinstance(input, Tensor) and isinstance(target, Tensor) and input.ndim == 1 and target.ndim == 0
    loss = margin_cross_entropy(
        input[None] if single else input,
        linear_weight,
        target[None] if single else target,
        Softmax(),
        bias=linear_bias,
        class_weight=weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    assert isinstance(loss, Tensor)
    return loss[0] if single and reduction == "none" else loss


def scaled_rows(x: Tensor, margin: Margin) -> tuple[Tensor, Tensor]:  # [N, D] -> [N, D], [N]
    """The rows that the stream multiplies with: s x/|x| (0 for a zero row) or x itself; and |x|."""
    norm = torch.linalg.vector_norm(x, dim=1)
    if not margin.unit_embeddings:
        return x, norm
    # Divide by 1 where the norm is 0: 0/0 must appear neither in the value nor in the gradient.
    small = norm < 4.0 * torch.finfo(x.dtype).tiny
    unit = torch.where(small[:, None], 0.0, x / torch.where(small, 1.0, norm)[:, None])
    return margin.s * unit, norm


def target_numbers(x: Tensor, weight: Tensor, label: Tensor, margin: Margin) -> tuple[Tensor, Tensor]:
    """x . w'_y and |w_y|, [N] each, from gathered rows."""
    rows = weight.index_select(0, label).to(x.dtype)
    norm = torch.linalg.vector_norm(rows, dim=1)
    product = (x * rows).sum(dim=1)
    return (product * inverse_norm(norm) if margin.unit_weight else product), norm


def target_logit(
    margin: Margin, product: Tensor, weight_norm: Tensor, norm: Tensor, label: Tensor, own_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """t and the logit without the margin, [N] each, bias included."""
    scale: float | Tensor = margin.s if margin.unit_embeddings else norm
    if not margin.unit_weight:
        scale = scale * weight_norm
    rows = TargetRows(product, norm, weight_norm, scale, label)
    t = margin.target_logit(rows).to(product.dtype)
    return (t, product) if own_bias is None else (t + own_bias, product + own_bias)


def hardest_logit(out: Streamed, bias: Tensor | None, class_ids: Tensor | None) -> Tensor:
    """max_{j != y} z_j, [N], -inf where there is no other class."""
    if bias is None or not out.hardest_row.numel():
        return out.hardest_product
    return out.hardest_product + bias[class_of(out.hardest_row.clamp(min=0), class_ids)].to(out.rest.dtype)


def class_of(row: Tensor, class_ids: Tensor | None) -> Tensor:
    """Class numbers of positions in the walk."""
    return row if class_ids is None else class_ids[row]


def mean_logit(
    out: Streamed, t: Tensor, plain: Tensor, label: Tensor, bias: Tensor | None, class_ids: Tensor | None, a: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_c a_c z_c with z_y = t, [N], and sum_c a_c, over the walked classes; a carries 1/C."""
    walked = a if class_ids is None else a[class_ids]
    mean = out.mean_product + (t - plain) * a[label]
    if bias is not None:
        mean = mean + (walked * (bias if class_ids is None else bias[class_ids])).sum()
    return mean, walked.sum()


@torch.no_grad()
def statistics(
    t: Tensor, plain: Tensor, out: Streamed, hardest: Tensor, valid: Tensor, class_ids: Tensor | None
) -> Stats:
    row = out.hardest_row
    classes = torch.where(row >= 0, class_of(row.clamp(min=0), class_ids) if row.numel() else row, -1)
    return Stats(
        target_logit=torch.where(valid, t, torch.nan),
        rest_logsumexp=torch.where(valid, out.rest, torch.nan),
        hardest_class=torch.where(valid, classes, -1),
        hardest_logit=torch.where(valid, hardest, torch.nan),
        correct=valid & (plain > hardest),
    )
