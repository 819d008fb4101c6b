"""Every loss again, the slow obvious way: with the full N x C logits and ordinary autograd. The oracle of the tests.

Nothing here is shared with the class pass or with the margins' own formulas: each margin of `MARGINS` has its target
cosine written a second time below. It computes in float64 if embeddings or weight are float64, else in float32: float16
and bfloat16 inputs are upcast first and autocast is off, so a result is as exact as the inputs as given allow, and not
what plain PyTorch would compute in the low precision. Arguments are those of `tm.margin_cross_entropy`, and are
checked as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonmargin.checks import check_inputs, check_margin, check_tensor, positions
from tritonmargin.margins import (
    ArcFace,
    ASoftmax,
    CombinedMargin,
    CosFace,
    L2Softmax,
    LSoftmax,
    Margin,
    NormFace,
    Softmax,
    SphereFaceR,
    TargetRows,
)
from tritonmargin.margins.base import logit_of
from tritonmargin.spec import LossInputs, LossKeywords, LossOptions, Stats


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
    """`tm.margin_cross_entropy` from full logits, O(N C) memory; its docstring has the formulas and the arguments.

    `sparse_grad` and what is said of memory change nothing: the gradient of weight is always dense.
    """
    options = LossOptions(
        ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction, objective=objective,
        sub_centers=sub_centers, sparse_grad=sparse_grad, retain_bytes=retain_bytes, chunk_bytes=chunk_bytes,
        memory_budget=memory_budget, return_stats=return_stats, logq_correction=logq_correction,
    )  # fmt: skip
    check_call(LossInputs(embeddings, weight, target, bias, class_ids, class_weight), margin, options)
    dtype = torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else torch.float32
    with torch.autocast(embeddings.device.type, enabled=False):
        # Ignored samples and classes that are not active are left out here and take part in nothing below.
        kept = (target.long() != ignore_index).nonzero()[:, 0]  # [K]
        classes = torch.arange(len(weight), device=weight.device) if class_ids is None else class_ids  # [S]
        y = target[kept].long()  # [K]  class numbers
        own = classes == y[:, None]  # [K, S]  the target's column of each sample
        column = torch.searchsorted(classes, y)  # [K]  the same as positions
        x, w = embeddings[kept].to(dtype), weight[classes].to(dtype)  # [K, D], [S, D]
        b = x.new_zeros(len(classes)) if bias is None else bias[classes].to(dtype)  # [S]
        a = x.new_ones(len(classes)) if class_weight is None else class_weight[classes].detach().to(dtype)  # [S]

        x_used = margin.s * unit_rows(x) if margin.unit_embeddings else x
        w_used = unit_rows(w) if margin.unit_weight else w
        z = x_used @ w_used.T + b  # [K, S]
        plain = (x_used * w_used[column]).sum(dim=1)  # [K]  the target's logit without margin and bias
        t = target_logit(margin, x, w[column], plain, y, kept, len(target)) + b[column]  # [K]
        full = torch.where(own, t[:, None], z)  # [K, S]  the logits with the margin in
        if logq_correction:
            positive = torch.isin(classes, y)  # [S]
            ratio = (len(weight) - positive.sum()).to(dtype) / (~positive).sum()
            z = z + torch.where(positive, 0.0, ratio.log())
        others = z.masked_fill(own, -math.inf)  # [K, S]

        if len(classes) < 2:
            loss = 0.0 * t  # nobody to exceed t; the log of an empty sum has no gradient
        else:
            loss = a[column] * per_sample(objective, t, others)
            if label_smoothing:
                spread = (a * -F.log_softmax(full, dim=1)).sum(dim=1) / len(classes)
                loss = (1.0 - label_smoothing) * loss + label_smoothing * spread
        if reduction == "mean":
            result = loss.sum() / a[column].sum()
        elif reduction == "sum":
            result = loss.sum()
        else:
            result = loss.new_zeros(len(target)).index_put((kept,), loss)
        if not return_stats:
            return result
        return result, statistics(t, plain + b[column], others, classes, kept, len(target), len(classes) < len(weight))


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
    """`tm.linear_cross_entropy` from full logits: input [N, D] with target [N], or [D] with a scalar target."""
    check_tensor("input", input)
    check_tensor("target", target)
    loss = margin_cross_entropy(
        input if input.ndim == 2 else input[None],
        linear_weight,
        target.reshape(-1),
        Softmax(),
        bias=linear_bias,
        class_weight=weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    assert isinstance(loss, Tensor)
    return loss[0] if input.ndim == 1 and reduction == "none" else loss


def check_call(inputs: LossInputs, margin: Margin, options: LossOptions) -> None:
    check_inputs(inputs, sharded=False)
    check_margin(margin)
    positions(inputs.target, inputs.class_ids, len(inputs.weight), options.ignore_index)


def per_sample(objective: str, t: Tensor, others: Tensor) -> Tensor:  # [K], [K, S] with -inf at the target -> [K]
    """The derivation, from the hinges to the softmax."""
    if objective == "hinge":
        return (others - t[:, None]).relu().sum(dim=1)
    if objective == "max-hinge":
        return (others.max(dim=1).values - t).relu()
    rest = others.logsumexp(dim=1)
    if objective == "lse-hinge":
        return (rest - t).relu()
    return -F.logsigmoid(t - rest)  # = log(e^rest + e^t) - t without the cancellation where t is far above


@torch.no_grad()
def statistics(t: Tensor, plain: Tensor, others: Tensor, classes: Tensor, kept: Tensor, n: int, sampled: bool) -> Stats:
    """Stats of the kept samples at their places, nan, -1 and False elsewhere."""
    if len(classes) < 2:
        hardest_logit, hardest_class = torch.full_like(t, -math.inf), torch.full_like(kept, -1)
        rest = hardest_logit
    else:
        hardest_logit, column = others.max(dim=1)  # the first of equal maxima
        hardest_class, rest = classes[column], others.logsumexp(dim=1)
    nan = t.new_full((n,), math.nan)
    return Stats(
        target_logit=nan.index_put((kept,), t),
        rest_logsumexp=nan.index_put((kept,), rest),
        hardest_class=kept.new_full((n,), -1).index_put((kept,), hardest_class),
        hardest_logit=nan.index_put((kept,), hardest_logit),
        correct=kept.new_zeros(n, dtype=torch.bool).index_put((kept,), plain > hardest_logit),
        sampled=kept.new_full((n,), sampled, dtype=torch.bool),
    )


def unit_rows(x: Tensor) -> Tensor:
    """x_i/|x_i|; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0)


# -- the margins' target logits, a second time ---------------------------------------------------------------------


def target_logit(
    margin: Margin, x: Tensor, w: Tensor, plain: Tensor, y: Tensor, kept: Tensor, n: int
) -> Tensor:  # [K, D], [K, D], [K], [K], [K] -> [K]
    """t without the bias: the product as it is, or s |x| |w| phi(cos) with those norms that are not divided out."""
    if type(margin) in WITHOUT_MARGIN:
        return plain
    x_norm, w_norm = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(w, dim=1)
    scale = margin.s if margin.unit_embeddings else x_norm
    if not margin.unit_weight:
        scale = scale * w_norm
    if type(margin) not in TARGET_COSINE:
        return users_own(margin, plain, x_norm, w_norm, scale, y, kept, n)
    cos = (unit_rows(x) * unit_rows(w)).sum(dim=1)
    phi = TARGET_COSINE[type(margin)](margin, cos)
    if margin.gradient == "straight-through":
        phi = phi.detach() + (cos - cos.detach())
    return scale * phi


def users_own(
    margin: Margin,
    plain: Tensor,
    x_norm: Tensor,
    w_norm: Tensor,
    scale: float | Tensor,
    y: Tensor,
    kept: Tensor,
    n: int,
) -> Tensor:  # [K]
    """A margin that this file has no formula for is asked itself, about all N samples, as `TargetRows` promises."""

    def everywhere(numbers: Tensor) -> Tensor:  # [K] -> [N], zeros at ignored samples
        return numbers.new_zeros(n).index_put((kept,), numbers)

    rows = TargetRows(
        product=everywhere(plain),
        embedding_norm=everywhere(x_norm),
        weight_norm=everywhere(w_norm),
        scale=everywhere(scale) if isinstance(scale, Tensor) and scale.ndim else scale,
        target=everywhere(y),
    )
    return logit_of(margin, rows)[kept].to(plain.dtype)


def finite_slope(phi: Callable[[Tensor], Tensor], cos: Tensor) -> Tensor:  # [K] -> [K]
    """phi(cos) of an arccos, whose slope is infinite at +-1: there it is taken one eps inside, the value is exact."""
    if not cos.requires_grad:
        return phi(cos.clamp(-1.0, 1.0))
    edge = 1.0 - torch.finfo(cos.dtype).eps
    at_end = cos.detach().abs() >= edge
    with torch.enable_grad():
        beside = cos.detach().clamp(-edge, edge).requires_grad_()
        (slope,) = torch.autograd.grad(phi(beside).sum(), beside)
    end = phi(cos.detach().clamp(-1.0, 1.0)) + slope * (cos - cos.detach())
    return torch.where(at_end, end, phi(torch.where(at_end, 0.0, cos)))


def number(value: float | Tensor, cos: Tensor) -> Tensor:
    """A margin's number as a tensor: in float64 like its own, or the learned one."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device=cos.device)


def cosface(margin: Any, cos: Tensor) -> Tensor:
    return cos - margin.m


def arcface(margin: Any, cos: Tensor) -> Tensor:
    """cos(theta + m) up to theta = pi - m."""

    def phi(c: Tensor) -> Tensor:
        theta, m = torch.acos(c), number(margin.m, c)
        beyond = {
            "cos-mm": c - m * torch.sin(m),
            "continuous": c - 1.0 + torch.cos(m),  # cos(pi - m) = -cos m
            "raw": torch.cos(theta + m),
            "clip": torch.full_like(c, -1.0),
            "easy": c,
        }[margin.beyond_pi]
        usual = c > 0 if margin.beyond_pi == "easy" else theta + m <= math.pi
        return torch.where(usual, torch.cos(theta + m), beyond)

    return finite_slope(phi, cos)


def combined(margin: Any, cos: Tensor) -> Tensor:
    """cos(m1 theta + m2) - m3 up to theta0 = (pi - m2)/m1."""

    def phi(c: Tensor) -> Tensor:
        m1, m2, m3 = (number(value, c) for value in (margin.m1, margin.m2, margin.m3))
        alpha = m1 * torch.acos(c) + m2
        theta0 = (math.pi - m2) / m1
        beyond = {
            "cos-mm": c - (math.pi - theta0) * torch.sin(theta0),  # sin(pi - theta0) = sin theta0
            "continuous": c - torch.cos(theta0) - 1.0,
            "raw": torch.cos(alpha),
            "clip": torch.full_like(c, -1.0),
            "easy": c,
        }[margin.beyond_pi]
        usual = c > 0 if margin.beyond_pi == "easy" else alpha <= math.pi
        return torch.where(usual, torch.cos(alpha), beyond) - m3

    return finite_slope(phi, cos)


def multiplicative(margin: Any, cos: Tensor) -> Tensor:
    """(lam cos + psi)/(1 + lam) with the multiple angle formula of Liu et al. (2016), equation 7: a polynomial.

    cos(m theta) = sum_n (-1)^n binom(m, 2n) cos^(m - 2n) (1 - cos^2)^n, with slope m^2 at theta = 0. No arccos.
    """
    m, lam = margin.m, margin.lam
    multiple = torch.zeros_like(cos)
    for n in range(m // 2 + 1):
        multiple = multiple + (-1) ** n * math.comb(m, 2 * n) * cos ** (m - 2 * n) * (1.0 - cos**2) ** n
    k = torch.zeros_like(cos)
    for i in range(1, m):  # theta has passed i pi/m
        k = k + (cos <= math.cos(i * math.pi / m))
    psi = (-1.0) ** k * multiple - 2.0 * k
    return (lam * cos + psi) / (1.0 + lam)


def sphereface_r(margin: Any, cos: Tensor) -> Tensor:
    """psi with a real m: (-1)^k cos(m theta) - 2k, k = how many of pi/m, 2 pi/m, ... < pi theta has passed."""

    def phi(c: Tensor) -> Tensor:
        theta, m = torch.acos(c), margin.m
        k = torch.zeros_like(c)
        for i in range(1, math.ceil(float(m))):
            k = k + (m * theta.detach() >= i * math.pi)
        return (-1.0) ** k * torch.cos(m * theta) - 2.0 * k

    return finite_slope(phi, cos)


# By exact class: a user's subclass may have another formula.
WITHOUT_MARGIN = (Softmax, L2Softmax, NormFace)
TARGET_COSINE: dict[type[Margin], Callable[[Any, Tensor], Tensor]] = {
    CosFace: cosface,
    ArcFace: arcface,
    CombinedMargin: combined,
    LSoftmax: multiplicative,
    ASoftmax: multiplicative,
    SphereFaceR: sphereface_r,
}
