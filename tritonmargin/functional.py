"""The losses as functions."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from tritonmargin.checks import NAMES
from tritonmargin.loss import compute_loss
from tritonmargin.margins import Margin, Softmax
from tritonmargin.spec import LossInputs, LossKeywords, LossOptions, Stats

# What torch calls the tensors of `linear_cross_entropy`.
LINEAR = NAMES | {"embeddings": "input", "weight": "linear_weight", "bias": "linear_bias", "class_weight": "weight"}


@overload
def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: Margin,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LossKeywords],
) -> Tensor: ...
@overload
def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: Margin,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, Stats]: ...
@overload
def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    margin: Margin,
    *,
    return_stats: bool,
    **options: Unpack[LossKeywords],
) -> Tensor | tuple[Tensor, Stats]: ...
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
    memory_budget: int | None = None,
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
    and the loss in float32, or float64 if an input is float64. float16 does not hold exp(64): the kernels put powers of
    two aside, and the torch backend multiplies it as float32. The loss can be differentiated once.

    Args:
        embeddings: [N, D] floating.
        weight: [C, D] floating, one row a class.
        target: [N] integer class numbers in [0, C), or `ignore_index`.
        margin: a `Margin`, e.g. `tm.ArcFace(m=0.5, s=64)`; `tm.Softmax()` for none.
        bias: [C], added to every logit, to the target's after the margin.
        class_ids: [S] int64, sorted, unique: the only active classes, as if the others did not exist (Partial FC).
            Every target must be among them; targets stay class numbers.
        sub_centers: rows per class; only 1 in this version.
        class_weight: [C], multiplies the loss of the class's samples.
        ignore_index: samples with this target add nothing to loss and gradients, whatever their embedding holds.
        label_smoothing: eps in [0, 1], for objective "softmax": (1 - eps) loss + eps/C sum_c -log p_c, over the active
            classes, as torch's cross_entropy does on the logits with t in the target's place.
        reduction: "mean" (divided by the valid samples' class weights; nan if there is none), "sum", "none" ([N]).
        objective: see above.
        sparse_grad: the gradient of weight is a sparse COO tensor of the active rows only.
        retain_bytes: keep up to so many bytes of logits from forward to backward, which then need not be recomputed;
            whole chunks of them. 0: on a CPU all of them, where they fit half of `memory_budget` and chunk_bytes is
            not given.
        memory_budget: bytes that a step may take beside inputs, gradients and [N, D] numbers: for the gradient of a
            chunk's logits, and for copies of class rows that are kept for backward where the products cannot take W as
            it is. Default: a 64th of the GPU's memory. On a CPU for a chunk and for logits that are retained; default:
            a third of the last-level cache. More is fewer and larger products; it never changes the accuracy.
        chunk_bytes: the size of a chunk of classes by itself, in bytes.
        return_stats: also return `Stats`, from the same pass.
        logq_correction: class_ids are a uniform sample of S classes that holds the P distinct targets: adds
            log((C - P)/(S - P)) to the logits of the active classes that are nobody's target, so that the sum of
            exp(z) over the sample estimates the one over all classes without bias. Also in `Stats`.

    Returns:
        A scalar, or [N] for "none"; with return_stats a pair (loss, Stats).

    Raises:
        ValueError, TypeError: an argument that does not fit, named, before any work. Labels and ids are looked at on
            the CPU always, on a GPU only with the environment variable TRITONMARGIN_DEBUG=1 (it costs a sync).
        RuntimeError: when the gradient is differentiated again.
    """
    inputs = LossInputs(embeddings, weight, target, bias, class_ids, class_weight)
    options = LossOptions(
        ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction, objective=objective,
        sub_centers=sub_centers, sparse_grad=sparse_grad, retain_bytes=retain_bytes, chunk_bytes=chunk_bytes,
        memory_budget=memory_budget,
        return_stats=return_stats, logq_correction=logq_correction,
    )  # fmt: skip
    return compute_loss(inputs, margin, options)


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
    x, y = (input[None], target[None]) if single else (input, target)
    options = LossOptions(
        ignore_index=-100 if ignore_index is None else ignore_index, label_smoothing=label_smoothing,
        reduction=reduction,
    )  # fmt: skip
    inputs = LossInputs(x, linear_weight, y, linear_bias, None, weight)
    loss = compute_loss(inputs, Softmax(), options, names=LINEAR)
    assert isinstance(loss, Tensor)
    return loss[0] if single and reduction == "none" else loss
