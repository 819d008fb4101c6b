"""Clipping by the norm of all gradients, where ranks hold the rows of different classes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tritonmargin.arguments import check_flag
from tritonmargin.distributed.agreement import gave_up
from tritonmargin.distributed.dtensors import is_dtensor
from tritonmargin.margins.numbers import as_float
from tritonmargin.optim.row_optimizer import NoGradient, rows_of


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` that knows of sharded heads: the same norm on all ranks, that of one process.

        norm = (sum of |g|^p over all gradients)^(1/p);   g *= min(1, max_norm / (norm + 1e-6))

    Rows of a head with a `process_group` count once each, whichever rank has them; so does everything else, which all
    ranks have alike, such as a backbone in DistributedDataParallel. DTensors, such as parameters of `fully_shard`,
    count as the whole tensors that they are. All ranks have to call it with the same parameters, with a gradient or
    without. It is one exchange of a number for each group.

    Args:
        parameters: whose gradients are clipped in place, dense or sparse.
        max_norm: the largest norm, >= 0.
        norm_type: p > 0; inf: the largest magnitude.
        error_if_nonfinite: raise if the norm is nan or inf, on all ranks, before any gradient is changed.
        foreach: see torch.

    Returns:
        The norm before clipping, on the gradients' device.

    Raises:
        ValueError: norm_type or max_norm out of range.
        TypeError: an argument of another type; a flat parameter of FullyShardedDataParallel, which has a
            `clip_grad_norm_` of its own.
        RuntimeError: `error_if_nonfinite`; or a weight without a gradient because of `update_in_backward`.
    """
    parameters = parameters_of(parameters)
    p, max_norm = number("norm_type", norm_type, "> 0"), number("max_norm", max_norm, ">= 0")
    check_flag("error_if_nonfinite", error_if_nonfinite)
    if foreach is not None:
        check_flag("foreach", foreach)
    norms = [norm for norm in norms_of(parameters, p, foreach) if norm is not None]
    if not norms:
        return torch.zeros(())
    together = torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms])
    total = torch.linalg.vector_norm(together, p).to(largest_dtype(norms))
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the norm of the gradients is {total.item()}, so they cannot be clipped")
    dense = [each for each in parameters if each.grad is not None and not each.grad.is_sparse]
    for split in (False, True):  # torch takes no list of both kinds
        alike = [each for each in dense if is_dtensor(each.grad) == split]
        clip_grads_with_norm_(alike, max_norm, total, foreach)
    for each in parameters:
        if each.grad is not None and each.grad.is_sparse:
            each.grad._values().mul_(torch.clamp(max_norm / (total + 1e-6), max=1.0))
    return total


def parameters_of(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be a tensor or an iterable of them, got {parameters!r}")
    found = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for each in found:
        if not isinstance(each, Tensor):
            raise TypeError(f"parameters must hold tensors, got {type(each).__name__}")
    return found


def number(name: str, value: float, words: str) -> float:
    """A number, also of a tensor or an array, inf too."""
    found = as_float(value)
    if found is None:
        raise TypeError(f"{name} must be a number {words}, got {value!r}")
    if not (found > 0.0 or (found == 0.0 and words == ">= 0")):
        raise ValueError(f"{name} must be a number {words}, got {value}")
    return found


def norms_of(parameters: list[Tensor], p: float, foreach: bool | None) -> list[Tensor | None]:
    """One norm for each kind of parameter: what all ranks have, DTensors of each mesh, shards of each group."""
    kinds: dict[Any, list[Tensor]] = {}
    for each in parameters:
        if getattr(each, "_is_flat_param", False):
            raise TypeError("a flat parameter of FullyShardedDataParallel: call the wrapper's own clip_grad_norm_")
        shard, grad = getattr(each, "shard", None), each.grad
        kind = shard.group if shard is not None else grad.device_mesh if is_dtensor(grad) else None
        found = kinds.setdefault(kind, [])
        if isinstance(grad, NoGradient):
            grad.norm()  # which says why there is none
        if grad is not None:
            found.append(rows_of(grad)[1] if grad.is_sparse else grad)
        elif shard is not None:
            found.append(each.new_zeros(()))  # other ranks may have one
    norms = []
    for kind, grads in kinds.items():
        norm = get_total_norm(grads, p, foreach=foreach) if grads else None
        if is_dtensor(norm):
            norm = norm.full_tensor()
        norms.append(over_ranks(norm, p, kind) if isinstance(kind, dist.ProcessGroup) and norm is not None else norm)
    return norms


def over_ranks(norm: Tensor, p: float, group: dist.ProcessGroup) -> Tensor:
    """The norm of what all ranks of the group have."""
    exact = norm.double()
    numbers = torch.stack([exact.nan_to_num(nan=0.0, posinf=torch.inf), exact.isnan().double()])
    numbers = numbers if math.isinf(p) else numbers**p
    try:
        dist.all_reduce(numbers, dist.ReduceOp.MAX if math.isinf(p) else dist.ReduceOp.SUM, group=group)
    except RuntimeError as lost:
        raise gave_up(group, "tm.clip_grad_norm_", lost) from lost
    total, missing = numbers if math.isinf(p) else numbers ** (1.0 / p)
    return torch.where(missing > 0, torch.nan, total).to(norm.dtype)


def largest_dtype(tensors: list[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for each in tensors[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype
