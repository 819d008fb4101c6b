"""How a loss is computed: labels, ranks, class pass, margin and objective, reduction."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tritonmargin import checks, reference
from tritonmargin.backends.precision import accumulate, precision_of
from tritonmargin.backends.registry import KernelError, backend_after, current_backend, load_backend
from tritonmargin.class_pass.exp_range import is_bounded
from tritonmargin.class_pass.op import class_pass, forward_mode, seen_as_ops
from tritonmargin.distributed.settings import Settings
from tritonmargin.distributed.single import SINGLE, Single
from tritonmargin.labels import ActiveClasses, Labels, sampling_offset
from tritonmargin.margins import Margin, TargetRows
from tritonmargin.margins.base import logit_of
from tritonmargin.objectives import OBJECTIVES, smoothed, with_slope
from tritonmargin.rows import own_numbers, scaled_rows, target_numbers
from tritonmargin.spec import LossInputs, LossOptions, PassInputs, PassOutput, PassSpec, Stats

if TYPE_CHECKING:
    from tritonmargin.backends.types import Backend
    from tritonmargin.distributed.shard import Batch, Shard
    from tritonmargin.distributed.single import SingleBatch
    from tritonmargin.optim.row_optimizer import RowOptimizer
    from tritonmargin.sampling import Sampler

SETTINGS = 3  # what `gathered` compares between ranks


def compute_loss(
    inputs: LossInputs,
    margin: Margin,
    options: LossOptions,
    *,
    ranks: Shard | Single = SINGLE,
    sampler: Sampler | None = None,
    updater: RowOptimizer | None = None,
    also: Mapping[str, object] | None = None,
    names: Mapping[str, str] = checks.NAMES,
) -> Tensor | tuple[Tensor, Stats]:
    """`margin_cross_entropy`, and what only a module can ask for.

    ranks: a `Shard`: `weight`, `bias` and `class_weight` are this rank's rows of its classes, class_ids numbers among
        them, and the loss that of all ranks' samples; with reduction "none" of this rank's.
    sampler: draws class_ids when the labels of all ranks are known.
    updater: an optimizer that updates the rows of `weight` while backward finishes their gradient.
    also: settings that must be alike on all ranks, beside those that are given here.
    names: what errors call the inputs.
    """
    try:
        labels, compute, backend = validated(inputs, margin, options, ranks, updater, names)
    except (TypeError, ValueError):
        ranks.announce_error(inputs.weight, SETTINGS)
        raise
    if backend == "reference":
        return by_reference(inputs, margin, options, labels, sampler)
    with without_autocast(inputs.embeddings.device.type):
        samples = gathered(inputs, labels, margin, options, ranks, sampler, compute, also or {})
        drawn = sampler is not None
        if sampler is not None:
            rows = inputs.weight.shape[0]
            inputs = inputs._replace(class_ids=sampler.draw(samples.labels.to_draw, rows))
        active = ActiveClasses(samples.labels, inputs.weight.shape[0], inputs.class_ids, drawn)
        call = Call(inputs, margin, options, ranks, samples, active, compute, updater)
        loss = fused_loss(call, backend)
        stats = None
        if loss is None:
            numbers = sample_numbers(call, backend)
            loss, stats = reduced(call, numbers), statistics(call, numbers) if options.return_stats else None
        if updater is not None and loss.requires_grad:
            # Of all ranks' samples: what is refused on one is on all.
            loss.register_hook(partial(updater.refuse_scaled, inputs.weight))
        if options.reduction == "none":
            loss = samples.batch.keep_own(loss)
        if sampler is not None:
            sampler.advance()  # not if something above raised
    return loss if stats is None else (loss, stats)


@dataclass(frozen=True)
class Call:
    """One loss, ready for the class pass."""

    inputs: LossInputs  # as given; class_ids drawn or given
    margin: Margin
    options: LossOptions
    ranks: Shard | Single
    samples: Samples
    active: ActiveClasses
    compute: torch.dtype  # of the products
    updater: RowOptimizer | None

    @property
    def labels(self) -> Labels:
        return self.samples.labels

    @property
    def others(self) -> str:
        """Which output of the class pass the objective looks at."""
        return OBJECTIVES[self.options.objective].others

    @property
    def sums(self) -> torch.dtype:
        """The dtype of sums and of the loss."""
        return accumulate(self.compute)


class Samples(NamedTuple):
    """The samples of all ranks."""

    embeddings: Tensor  # [N, D]
    labels: Labels
    batch: Batch | SingleBatch


# -- validate, gather ------------------------------------------------------------------------------------------------


def validated(
    inputs: LossInputs,
    margin: Margin,
    options: LossOptions,
    ranks: Shard | Single,
    updater: RowOptimizer | None,
    names: Mapping[str, str],
) -> tuple[Labels, torch.dtype, str]:
    """The labels, the dtype of the products and the name of the backend.

    Raises:
        ValueError, TypeError: an argument that does not fit, named.
    """
    checks.check_inputs(inputs, not ranks.is_single, names)
    checks.check_margin(margin)
    if updater is not None:
        updater.check_weight(inputs.weight)
        updater.check_not_tied(inputs.weight, inputs.embeddings)
    embeddings, weight = inputs.embeddings, inputs.weight
    labels = Labels(inputs.target, ranks.classes(weight), options.ignore_index, ranks)
    device = embeddings.device.type
    autocast = torch.is_autocast_enabled(device)
    if updater is not None and autocast:
        checks.check_no_scaler(torch.get_autocast_dtype(device))
    compute = torch.promote_types(embeddings.dtype, weight.dtype)
    if compute != torch.float64 and autocast:
        compute = torch.get_autocast_dtype(device)
    backend = current_backend(embeddings.device, compute)
    if backend != "reference" and forward_mode((embeddings, weight, inputs.bias)):
        raise NotImplementedError(
            "tritonmargin: the loss has no forward mode (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad); "
            'use reverse mode, or tm.use_backend("reference") on small problems'
        )
    if backend == "reference" and not (ranks.is_single and updater is None):
        raise ValueError("the reference backend has neither process groups nor update_in_backward")
    return labels, compute, backend


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Nothing at all where there is none: to enter a context takes longer than to launch a kernel."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def by_reference(
    inputs: LossInputs, margin: Margin, options: LossOptions, labels: Labels, sampler: Sampler | None
) -> Tensor | tuple[Tensor, Stats]:
    class_ids = inputs.class_ids if sampler is None else sampler.draw(labels.number, inputs.weight.shape[0])
    result = reference.margin_cross_entropy(
        inputs.embeddings, inputs.weight, inputs.target, margin, bias=inputs.bias, class_ids=class_ids,
        class_weight=inputs.class_weight, ignore_index=options.ignore_index, label_smoothing=options.label_smoothing,
        reduction=options.reduction, objective=options.objective, sparse_grad=options.sparse_grad,
        return_stats=options.return_stats, logq_correction=options.logq_correction,
    )  # fmt: skip
    if sampler is not None:
        sampler.advance()
    return result


def gathered(
    inputs: LossInputs,
    labels: Labels,
    margin: Margin,
    options: LossOptions,
    ranks: Shard | Single,
    sampler: Sampler | None,
    compute: torch.dtype,
    also: Mapping[str, object],
) -> Samples:
    """Embeddings and labels of all ranks: alone as they are; else in the dtype of sums, ignored ones as zeros."""
    settings = Settings(margin, options, 1.0 if sampler is None else sampler.rate, also)
    if isinstance(ranks, Single):
        return Samples(inputs.embeddings, labels, ranks.batch(inputs.embeddings, None, settings))
    x = zeros_if_ignored(inputs.embeddings, labels, compute)
    sampling = {"class_ids": inputs.class_ids is not None, "a sample of the classes": sampler is not None}
    outside = checks.outside(inputs.target, ranks.num_classes, options.ignore_index)
    batch = ranks.batch(x, outside, settings, statistics=options.return_stats, **sampling)
    return Samples(batch.gather_rows(x), labels.gathered(batch), batch)


def zeros_if_ignored(embeddings: Tensor, labels: Labels, compute: torch.dtype) -> Tensor:
    return torch.where(labels.valid[:, None], embeddings, 0.0).to(accumulate(compute))


# -- class pass ------------------------------------------------------------------------------------------------------


def fused_loss(call: Call, backend: str) -> Tensor | None:
    """The whole loss by the backend, if it can: for one rank, objective "softmax", no statistics. None: it cannot."""
    if not call.ranks.is_single or call.options.return_stats or call.options.objective != "softmax":
        return None
    if seen_as_ops(call.inputs):
        return None  # a compiler makes few kernels of the numbers per sample by itself
    try:
        return load_backend(backend).fused(call.inputs, call.margin, call.options, call.compute, call.updater)
    except KernelError as error:
        backend_after(error, backend)
        return None


class Numbers(NamedTuple):
    """What is known per sample, [N] each, of all ranks and all of their classes."""

    t: Tensor  # the target's logit after the margin, bias included
    plain: Tensor  # the same without the margin
    moved: Tensor | None  # what the margin adds, for label smoothing
    rest: Tensor
    hinge: Tensor
    violations: Tensor
    hardest: Tensor  # max_{j != y} z_j
    hardest_class: Tensor  # -1 where there is no other class
    class_factor: Tensor | None  # weight of the sample's class
    mean: Mean | None  # for label smoothing


class Mean(NamedTuple):
    """The smoothed part: sums over the active classes with weights a_c, which carry 1/C."""

    logit: Tensor  # [N]  sum_c a_c z_c without margins
    own: Tensor  # [N]  a_y
    total: Tensor | float  # [N]  sum_c a_c


def sample_numbers(call: Call, name: str) -> Numbers:
    """Everything that goes through the classes, and the margin."""
    try:
        return from_pass(call, load_backend(name), name)
    except KernelError as error:
        return from_pass(call, backend_after(error, name), "torch")


def from_pass(call: Call, backend: Backend, name: str) -> Numbers:
    inputs, options, ranks = call.inputs, call.options, call.ranks
    rows = rows_for(call, backend)
    offset, highest = None, 0.0
    if options.logq_correction:
        offset, highest = sampling_offset(call.active, call.sums)
    class_factor = None
    if inputs.class_weight is not None:
        class_factor = own_numbers(inputs.class_weight.detach(), call.labels.own, call.sums)
    mean_weight = smoothing_weight(call) if options.label_smoothing else None
    given = PassInputs(
        x=rows.x, weight=inputs.weight, target=rows.target, class_ids=inputs.class_ids, bias=inputs.bias,
        mean_weight=mean_weight, threshold=threshold(call, rows) if call.others == "hinge" else None,
        offset=offset,
    )  # fmt: skip
    out = class_pass(given, pass_spec(call, rows, backend, name, highest), call.updater)
    norm = call.samples.batch.own_part(out.embedding_norm if rows.norm is None else rows.norm)
    hardest, hardest_class = hardest_of(out, given)
    if hardest.shape[0]:
        hardest, hardest_class = ranks.hardest(hardest, hardest_class)
    product, weight_norm, own_bias, class_factor = ranks.all_sums(
        out.target_product, out.target_norm, None if inputs.bias is None else out.target_bias, class_factor
    )
    t = target_logit(call, product, weight_norm, norm)
    hinging = call.others == "hinge"
    return Numbers(
        t=with_bias(t, own_bias),
        plain=with_bias(product, own_bias),
        # Not t - plain: a bias may be infinite.
        moved=None if mean_weight is None else t - product,
        rest=ranks.logsumexp(out.rest) if wants_rest(call) else out.rest,
        hinge=ranks.all_sum(out.hinge) if hinging else out.hinge,
        violations=ranks.all_sum(out.violations) if hinging else out.violations,
        hardest=hardest,
        hardest_class=hardest_class,
        class_factor=class_factor,
        mean=None if mean_weight is None else mean_numbers(call, out, mean_weight),
    )


class PassRows(NamedTuple):
    """Embeddings and labels as a backend takes them."""

    x: Tensor  # [N, D]
    target: Tensor  # [N]
    norm: Tensor | None  # [N]  |x_i|; None: the backend gives it
    embeddings: dict[str, Any]  # of PassSpec: what the backend has to do to them


def rows_for(call: Call, backend: Backend) -> PassRows:
    """The one place that decides who normalises: the backend, or PyTorch, with its autograd."""
    margin, labels, embeddings = call.margin, call.labels, call.samples.embeddings
    if not backend.normalises:
        x, norm = scaled_rows(zeros_if_ignored(embeddings, labels, call.compute), margin, call.ranks)
        return PassRows(x, call.active.position, norm, {})
    target = {"ignore_index": labels.ignore_index, "first_class": call.ranks.start}
    scale = margin.scale_on(embeddings.device) if margin.unit_embeddings else 1.0
    if isinstance(scale, Tensor):  # it may have a gradient
        x, norm = scaled_rows(zeros_if_ignored(embeddings, labels, call.compute), margin, call.ranks)
        return PassRows(x, labels.target, norm, target)
    return PassRows(
        embeddings, labels.target, None, target | {"unit_embeddings": margin.unit_embeddings, "scale": scale}
    )


def wants_rest(call: Call) -> bool:
    return call.others == "rest" or call.options.return_stats


def pass_spec(call: Call, rows: PassRows, backend: Backend, name: str, highest_offset: float) -> PassSpec:
    inputs, margin, options = call.inputs, call.margin, call.options
    taken = (call.samples.embeddings, inputs.weight, inputs.bias, rows.x)
    needs_grad = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in taken)
    bounded = call.others != "hinge" and wants_rest(call) and inputs.bias is None
    retain = options.retain_bytes
    if not (needs_grad and call.others != "hardest"):
        retain = 0
    elif not retain and not backend.normalises:
        retain = -1
    return PassSpec(
        unit_weight=margin.unit_weight,
        bounded=bounded and is_bounded(margin.logit_bound + highest_offset, call.active.count, call.sums),
        want_rest=wants_rest(call),
        want_hardest=call.others == "hardest" or options.return_stats,
        sparse=options.sparse_grad,
        dtype=call.compute,
        precision=precision_of(call.compute, inputs.weight),
        memory_budget=-1 if options.memory_budget is None else options.memory_budget,
        chunk_bytes=options.chunk_bytes or 0,
        retain_bytes=retain,
        backend=name,
        **rows.embeddings,
    )


def threshold(call: Call, rows: PassRows) -> Tensor:
    """t, which the hinge has to know before the class pass; its gradient is put back in `reduced`."""
    with torch.no_grad():
        x, norm = rows.x, rows.norm
        if norm is None:
            x, norm = scaled_rows(zeros_if_ignored(rows.x, call.labels, call.compute), call.margin)
        product, weight_norm = target_numbers(x, call.inputs.weight, call.labels.own, call.margin)
        bias = call.inputs.bias
        own_bias = None if bias is None else own_numbers(bias, call.labels.own, call.sums)
        product, weight_norm, own_bias = call.ranks.all_sums(product, weight_norm, own_bias)
        return with_bias(target_logit(call, product, weight_norm, norm), own_bias)


def target_logit(call: Call, product: Tensor, weight_norm: Tensor, norm: Tensor) -> Tensor:
    """t without the bias, [N]."""
    margin = call.margin
    scale = margin.scale_on(product.device) if margin.unit_embeddings else norm
    if not margin.unit_weight:
        scale = scale * weight_norm
    rows = TargetRows(product, norm, weight_norm, scale, call.labels.class_number)
    return logit_of(margin, rows).to(product.dtype)


def with_bias(logit: Tensor, bias: Tensor | None) -> Tensor:
    return logit if bias is None else logit + bias


def smoothing_weight(call: Call) -> Tensor:  # [C]
    """a_c of the mean: 1 or the class's weight, divided by the number of active classes of all ranks."""
    class_weight = call.inputs.class_weight
    one = torch.ones((), dtype=call.sums, device=call.inputs.weight.device)
    a = one if class_weight is None else class_weight.detach().to(call.sums)
    a = a / call.ranks.all_sum(torch.full_like(one, call.active.count)).clamp(min=1)
    return a.expand(call.inputs.weight.shape[0])  # one number, or C of them that are there already


def hardest_of(out: PassOutput, given: PassInputs) -> tuple[Tensor, Tensor]:
    """max_{j != y} z_j and its class, [N]: -inf and -1 where there is no other class; empty if nobody asked."""
    logit, row, ids = out.hardest_product, out.hardest_row, given.class_ids
    if not row.numel():
        return logit, row
    index = row.clamp(min=0)
    found = index if ids is None or not len(ids) else ids[index]
    if given.offset is not None and len(given.offset):
        logit = logit + given.offset[index]
    return logit, torch.where(row >= 0, found, -1)


def mean_numbers(call: Call, out: PassOutput, a: Tensor) -> Mean:
    own, total = own_numbers(a, call.labels.own, a.dtype), None
    if call.inputs.class_weight is not None:
        active = a if call.inputs.class_ids is None else a[call.inputs.class_ids]
        total = active.sum().expand_as(out.mean_logit)
    logit, own, total = call.ranks.all_sums(out.mean_logit, own, total)
    return Mean(logit, own, 1.0 if total is None else total)  # a sum of equal numbers is off by more than a rounding


# -- objective, reduction, statistics --------------------------------------------------------------------------------


def reduced(call: Call, numbers: Numbers) -> Tensor:
    """The loss of the objective, weighted, smoothed and reduced; with reduction "none" of all ranks' samples."""
    options, valid, t = call.options, call.labels.valid, numbers.t
    found = numbers.rest if call.others == "rest" else numbers.hardest
    if call.others == "hinge":
        found = with_slope(numbers.hinge, t, -numbers.violations)  # d/dt sum_j relu(z_j - t) = -violations
    loss = OBJECTIVES[options.objective].loss(t, found)
    if numbers.class_factor is None:
        factor = valid.to(call.sums)
    else:
        factor = torch.where(valid, numbers.class_factor.to(call.sums), 0.0)
        loss = loss * factor
    if numbers.mean is not None and numbers.moved is not None:
        mean = numbers.mean
        logit = mean.logit + numbers.moved * mean.own
        loss = smoothed(loss, t, numbers.rest, logit, mean.total, options.label_smoothing)
    loss = torch.where(valid, loss, 0.0)
    if options.reduction == "mean":
        return loss.sum() / factor.sum()
    return loss.sum() if options.reduction == "sum" else loss


@torch.no_grad()
def statistics(call: Call, numbers: Numbers) -> Stats:
    """Of this rank's samples."""
    valid = call.labels.valid
    # One rank may have all of its few classes active.
    fewer = torch.full((), call.active.count < call.inputs.weight.shape[0], device=valid.device)
    stats = Stats(
        target_logit=torch.where(valid, numbers.t, torch.nan),
        rest_logsumexp=torch.where(valid, numbers.rest, torch.nan),
        hardest_class=torch.where(valid, numbers.hardest_class, -1),
        hardest_logit=torch.where(valid, numbers.hardest, torch.nan),
        correct=valid & (numbers.plain > numbers.hardest),
        sampled=call.ranks.somewhere(fewer).expand_as(valid).clone(),
    )
    return stats if call.ranks.is_single else Stats(*(each[call.samples.batch.own] for each in stats))
