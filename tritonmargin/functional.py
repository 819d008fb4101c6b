"""The losses as functions: gather the target's numbers, apply the margin, stream the rest, apply the objective."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonmargin import checks, reference
from tritonmargin.kernels import current_backend
from tritonmargin.kernels.torch_ops import accumulate, inverse_norm
from tritonmargin.margins import Margin, Softmax, TargetRows
from tritonmargin.objectives import OBJECTIVES, smoothed
from tritonmargin.optim import RowOptimizer
from tritonmargin.parallel import Shard, all_sum, all_sums, scale_gradient
from tritonmargin.sampling import Sampler
from tritonmargin.stream import Streamed, stream
from tritonmargin.walk import is_bounded


class Stats(NamedTuple):
    """What one pass knows about each sample; all [N], detached. Ignored rows: nan, nan, -1, nan, False."""

    target_logit: Tensor  # t, after the margin, bias included
    rest_logsumexp: Tensor  # log sum_{j != y} exp(z_j)
    hardest_class: Tensor  # int64 class number of the largest z_j, j != y; -1 where there is no other class
    hardest_logit: Tensor  # that z_j
    correct: Tensor  # bool: the target's logit before the margin is above hardest_logit
    sampled: Tensor  # bool, the same for all: rest and hardest are about a sample of the classes, so is `correct`


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
    logq_correction: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy (or a hinge) over C classes with a margin on the sample's own, without the N x C logits.

    With z_ij = x'_i . w'_j + b_j, x' and w' the embeddings and class weights normalised and scaled as the margin says,
    and t_i = margin(z_iy):

        "softmax"    softplus(rest_i - t_i) = -log(e^{t_i} / (e^{t_i} + sum_{j != y} e^{z_ij}))
        "lse-hinge"  relu(rest_i - t_i),            rest_i = log sum_{j != y} e^{z_ij}
        "max-hinge"  relu(max_{j != y} z_ij - t_i)
        "hinge"      sum_{j != y} relu(z_ij - t_i), the multi-class SVM

    Products are computed in the dtype of autocast if it is on, else in the common dtype of embeddings and weight; sums
    and the loss in float32, or float64 if an input is float64. float16, which does not hold
    exp(64), is multiplied as float32; by the kernels, on GPUs that have it, as TF32, which has float16's 11 significant
    bits, whatever torch's setting for float32. The loss can be differentiated once.

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
        retain_bytes: keep up to so many bytes of logits from forward to backward, which then need not be recomputed;
            whole chunks of them.
        chunk_bytes: how much memory a chunk of classes may take; default: a third of the last-level cache on a CPU; on
            a GPU that of a quarter of the classes, between 64 and 512 MB and at most a 128th of the GPU's.
        return_stats: also return `Stats`, from the same pass.
        logq_correction: class_ids are a uniform sample of S classes that holds the P distinct targets: adds
            log((C - P)/(S - P)) to the logits of the walked classes that are nobody's target, so that the sum of
            exp(z) over the sample estimates the one over all classes without bias. Also in `Stats`.

    Returns:
        A scalar, or [N] for "none"; with return_stats a pair (loss, Stats).

    Raises:
        ValueError, TypeError: an argument that does not fit, named, before any work. Labels and ids are looked at on
            the CPU always, on a GPU only with the environment variable TRITONMARGIN_DEBUG=1 (it costs a sync).
        RuntimeError: when the gradient is differentiated again.
    """
    return loss_of(
        embeddings, weight, target, margin, bias, class_ids, sub_centers, class_weight, ignore_index, label_smoothing,
        reduction, objective, sparse_grad, retain_bytes, chunk_bytes, return_stats, logq_correction,
    )  # fmt: skip


def loss_of(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: Margin,
    bias: Tensor | None,
    class_ids: Tensor | Sampler | None,
    sub_centers: int,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    objective: str,
    sparse_grad: bool,
    retain_bytes: int,
    chunk_bytes: int | None,
    return_stats: bool,
    logq_correction: bool,
    updater: RowOptimizer | None = None,
    shard: Shard | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    """`margin_cross_entropy`, and what only a module can ask for.

    class_ids: also a `Sampler`, which draws them when the targets of all ranks are known.
    updater: an optimizer that updates the rows of `weight` while backward finishes their gradient.
    shard: `weight`, `bias` and `class_weight` are this rank's rows of `shard.num_classes` classes, class_ids numbers
        among them, and the loss that of all ranks' samples; with reduction "none" of this rank's.
    """
    ids = None if isinstance(class_ids, Sampler) else class_ids
    try:
        checks.check_call(
            embeddings, weight, target, margin, bias, ids, class_weight, ignore_index, label_smoothing, reduction,
            objective, sub_centers, retain_bytes, chunk_bytes, logq_correction, updater, shard is not None,
        )  # fmt: skip
        num_classes = weight.shape[0] if shard is None else shard.num_classes
        label = checks.positions(target, None, num_classes, ignore_index)
        device = embeddings.device.type
        if updater is not None and torch.is_autocast_enabled(device):
            checks.check_no_scaler(torch.get_autocast_dtype(device))
        compute = torch.promote_types(embeddings.dtype, weight.dtype)
        if compute != torch.float64 and torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        backend = current_backend(embeddings.device, compute)
        if backend == "reference" and (shard is not None or updater is not None):
            raise ValueError("the reference backend has neither process groups nor update_in_backward")
    except (TypeError, ValueError):
        if shard is not None:
            shard.announce_error(weight.device, alike=3)
        raise
    if backend == "reference":
        if isinstance(class_ids, Sampler):
            class_ids = class_ids.draw(label, num_classes)
        return reference.margin_cross_entropy(
            embeddings, weight, target, margin, bias=bias, class_ids=class_ids, class_weight=class_weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction, objective=objective,
            sparse_grad=sparse_grad, return_stats=return_stats, logq_correction=logq_correction,
        )  # fmt: skip

    with torch.autocast(device, enabled=False):
        x = torch.where((label >= 0)[:, None], embeddings, 0.0).to(accumulate(compute))
        batch = None
        if shard is not None:
            sampling = {"class_ids": ids is not None, "a sample of the classes": isinstance(class_ids, Sampler)}
            outside = checks.outside(target, num_classes, ignore_index)
            batch = shard.batch(x, outside, statistics=return_stats, **sampling)
            x = scale_gradient(x, shard.world_size) if shard.gradient_for == "ddp" else x
        x, norm = scaled_rows(x, margin)
        if batch is not None:
            x, norm, label = batch.gather_rows(x), batch.gather_numbers(norm), batch.gather(label)
        valid = label >= 0
        # The class's place among this rank's rows; -1: another rank's, or ignored.
        own = label if shard is None else shard.own_labels(label)
        if isinstance(class_ids, Sampler):
            class_ids = class_ids.draw(own, weight.shape[0])
        row = own if class_ids is None else walk_positions(own, class_ids, weight.shape[0], shard, ids is not None)
        label = label.clamp(min=0)
        walked = weight.shape[0] if class_ids is None else class_ids.shape[0]
        offset, highest_offset = (
            sampling_offset(row, walked, weight.shape[0], x.dtype) if logq_correction else (None, 0.0)
        )
        own_bias = None if bias is None else own_numbers(bias, own, x.dtype)
        class_factor = None if class_weight is None else own_numbers(class_weight.detach(), own, x.dtype)

        others = OBJECTIVES[objective].others
        want_rest = others == "rest" or return_stats
        threshold = None
        if others == "hinge":
            # The stream has to know t before it walks; its gradient is put back below.
            with torch.no_grad():
                product, weight_norm = target_numbers(x, weight, own, margin)
                product, weight_norm, before = all_sums(shard, product, weight_norm, own_bias)
                threshold, _ = target_logit(margin, product, weight_norm, norm, label, before)
        mean_weight = None
        if label_smoothing:
            mean_weight = x.new_ones(()) if class_weight is None else class_weight.detach().to(x.dtype)
            mean_weight = mean_weight / all_sum(shard, x.new_full((), walked)).clamp(min=1)
            mean_weight = mean_weight.expand(weight.shape[0])  # one number, or C of them that are there already
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
            offset=offset,
            unit=margin.unit_weight,
            bounded=others != "hinge"
            and want_rest
            and bias is None
            and is_bounded(margin.logit_bound + highest_offset, walked, x.dtype),
            want_rest=want_rest,
            want_hardest=others == "hardest" or return_stats,
            sparse=sparse_grad,
            dtype=compute,
            chunk_bytes=chunk_bytes or 0,
            retain_bytes=retain_bytes if needs_grad and others != "hardest" else 0,
            backend=backend,
            updater=updater,
        )
        hardest, hardest_class = hardest_of(out, bias, offset, class_ids)
        product, weight_norm, own_bias, class_factor = all_sums(
            shard, out.target_product, out.target_norm, own_bias, class_factor
        )
        rest, hinge, violations = out.rest, out.hinge, out.violations
        if shard is not None:
            rest = shard.logsumexp(rest) if want_rest else rest
            hinge, violations = (all_sum(shard, each) if others == "hinge" else each for each in (hinge, violations))
            if len(hardest):
                hardest, hardest_class = shard.hardest(hardest, hardest_class)
        t, plain = target_logit(margin, product, weight_norm, norm, label, own_bias)

        found = rest if others == "rest" else hardest
        if others == "hinge":
            # d/dt sum_j relu(z_j - t) = -violations. The value is the stream's alone.
            found = hinge - violations * (t - t.detach())
        loss = OBJECTIVES[objective].loss(t, found)
        if class_factor is None:
            class_factor = valid.to(norm.dtype)
        else:
            class_factor = torch.where(valid, class_factor.to(norm.dtype), 0.0)
            loss = loss * class_factor
        if mean_weight is not None:
            mean, own_share, total = mean_numbers(out, own, bias, class_ids, mean_weight)
            mean, own_share, total = all_sums(shard, mean, own_share, total.expand_as(mean))
            loss = smoothed(loss, t, rest, mean + (t - plain) * own_share, total, label_smoothing)
        loss = torch.where(valid, loss, 0.0)
        if reduction == "mean":
            loss = loss.sum() / class_factor.sum()
        elif reduction == "sum":
            loss = loss.sum()
        if updater is not None and loss.requires_grad:
            # Of all ranks' samples: what is refused on one is on all.
            loss.register_hook(partial(updater.refuse_scaled, weight))
        if reduction == "none" and batch is not None:
            loss = batch.keep_own(loss)
        if not return_stats:
            return loss
        sampled = torch.full((), walked < weight.shape[0], device=x.device)
        if shard is not None:  # one rank may have walked all of its few classes
            sampled = shard.all_max(sampled.to(torch.int32)) > 0
        stats = statistics(t, plain, rest, hardest, hardest_class, valid, sampled)
        return loss, stats if batch is None else Stats(*(each[batch.own] for each in stats))


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
    length = norm.detach()
    length = length.masked_fill(length < 4.0 * torch.finfo(x.dtype).tiny, torch.inf)
    if isinstance(margin.s, Tensor):  # it may have a gradient
        return margin.s * UnitRows.apply(x, length, 1.0), norm
    return UnitRows.apply(x, length, margin.s), norm


class UnitRows(torch.autograd.Function):
    """y = s x/|x| from x and |x|, which has no gradient of its own, in half of autograd's operations.

    dL/dx = (s g - y (y . g)/s)/|x|. A zero row is given the length inf: y and dL/dx are 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, length: Tensor, s: float) -> Tensor:
        return x / length[:, None] * s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, length, ctx.s = inputs
        ctx.save_for_backward(output, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, length = ctx.saved_tensors
        along = torch.linalg.vecdot(rows, grad) / ctx.s
        return (grad * ctx.s).addcmul(rows, along[:, None], value=-1.0) / length[:, None], None, None


def target_numbers(x: Tensor, weight: Tensor, own: Tensor, margin: Margin) -> tuple[Tensor, Tensor]:
    """x . w'_y and |w_y|, [N] each, from gathered rows; 0 where the class is not here."""
    if not len(weight):
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    rows = torch.where(own[:, None] >= 0, weight.index_select(0, own.clamp(min=0)).to(x.dtype), 0.0)
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


def walk_positions(own: Tensor, class_ids: Tensor, classes: int, shard: Shard | None, given: bool) -> Tensor:
    """`checks.positions` among the ids that a user gave, an error on one rank is one on all; or among those drawn."""
    if not given:  # sorted, and every label is among them: nothing to look at
        return torch.searchsorted(class_ids, own).masked_fill_(own < 0, -1)
    if shard is None:
        return checks.positions(own, class_ids, classes, -1)
    row, error = own, None
    try:
        row = checks.positions(own, class_ids, classes, -1)
    except ValueError as raised:
        error = raised
    shard.agree(error, own.device)
    return row


def own_numbers(vector: Tensor, own: Tensor, dtype: torch.dtype) -> Tensor:  # [C], [N] -> [N]
    """The numbers of the samples' classes, 0 where a class is not here."""
    if not len(vector):
        return own.new_zeros(own.shape, dtype=dtype)
    # Not index_select: its backward adds with atomics on a GPU.
    return torch.where(own >= 0, vector[own.clamp(min=0)].to(dtype), 0.0)


def hardest_of(
    out: Streamed, bias: Tensor | None, offset: Tensor | None, class_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """max_{j != y} z_j and its class, [N]: -inf and -1 where there is no other class; empty if nobody asked."""
    logit, row = out.hardest_product, out.hardest_row
    if not row.numel():
        return logit, row
    place = row.clamp(min=0)
    found = place if class_ids is None or not len(class_ids) else class_ids[place]
    if bias is not None and len(bias):
        logit = logit + bias[found].to(logit.dtype)
    if offset is not None and len(offset):
        logit = logit + offset[place]
    return logit, torch.where(row >= 0, found, -1)


def sampling_offset(row: Tensor, walked: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """log((C - P)/(S - P)) for each walked class that is nobody's target, 0 for the P others; and its bound."""
    positive = torch.zeros(walked + 1, dtype=torch.bool, device=row.device)
    positive[row] = True  # -1, no class, is the last place
    positive = positive[:walked]
    positives = positive.sum()
    negatives = (walked - positives).clamp(min=1).to(dtype)
    offset = torch.log((classes - positives).to(dtype) / negatives)
    highest = math.log(max(classes, 1) / max(walked - len(row), 1))
    return torch.where(positive, 0.0, offset), highest


def mean_numbers(
    out: Streamed, own: Tensor, bias: Tensor | None, class_ids: Tensor | None, a: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_c a_c z_c without margins [N], a_y [N], and sum_c a_c, over the walked classes; a carries 1/C."""
    walked = a if class_ids is None else a[class_ids]
    mean = out.mean_product
    if bias is not None:
        mean = mean + (walked * (bias if class_ids is None else bias[class_ids])).sum()
    return mean, own_numbers(a, own, a.dtype), walked.sum()


@torch.no_grad()
def statistics(
    t: Tensor, plain: Tensor, rest: Tensor, hardest: Tensor, hardest_class: Tensor, valid: Tensor, sampled: Tensor
) -> Stats:
    return Stats(
        target_logit=torch.where(valid, t, torch.nan),
        rest_logsumexp=torch.where(valid, rest, torch.nan),
        hardest_class=torch.where(valid, hardest_class, -1),
        hardest_logit=torch.where(valid, hardest, torch.nan),
        correct=valid & (plain > hardest),
        sampled=sampled.expand_as(valid).clone(),
    )
