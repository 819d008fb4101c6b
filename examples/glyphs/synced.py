"""BatchNorm with the statistics of all ranks' samples, over gloo: torch's SyncBatchNorm exists on GPUs only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synced(network: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """The network with its BatchNorms replaced; their parameters and buffers stay, under the names they have."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, SyncedBatchNorm(child, group))
    return network


class SyncedBatchNorm(nn.Module):
    """A BatchNorm of any number of dimensions; ranks may have different numbers of samples."""

    def __init__(self, like: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__()
        if not like.affine or not like.track_running_stats or like.momentum is None:
            raise ValueError(f"a BatchNorm with weights and running means is expected, got {like}")
        self.weight, self.bias = like.weight, like.bias
        self.eps, self.momentum, self.group = like.eps, like.momentum, group
        for name, buffer in like.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        count, mean, variance = statistics(x.detach(), self.group)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        return Normalise.apply(x, self.weight, self.bias, count, mean, variance, self.eps, self.group)


def statistics(x: Tensor, group: dist.ProcessGroup) -> tuple[float, Tensor, Tensor]:
    """How many numbers a channel has on all ranks, and their mean and variance [C]."""
    over = [0, *range(2, x.ndim)]
    wide = x.float()
    sums = torch.cat([wide.sum(over), torch.tensor([float(x.numel() // x.shape[1])])])
    dist.all_reduce(sums, group=group)
    count = float(sums[-1])
    if count < 2:
        raise ValueError("the variance of one number a channel is not defined")
    mean = sums[:-1] / count
    squares = (wide - along(mean, x)).square().sum(over)
    dist.all_reduce(squares, group=group)
    return count, mean, squares / count


def along(numbers: Tensor, x: Tensor) -> Tensor:
    """[C] as what broadcasts over x [N, C, ...]."""
    return numbers.reshape(-1, *[1] * (x.ndim - 2))


class Normalise(torch.autograd.Function):
    """y = weight (x - mean) / std + bias, where mean and std depend on the x of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, count: float, mean: Tensor, variance: Tensor, eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        over, scale = [0, *range(2, x.ndim)], (variance + ctx.eps).rsqrt()
        unit, wide = (x.float() - along(mean, x)) * along(scale, x), grad.float()
        own = torch.stack([wide.sum(over), (wide * unit).sum(over)])
        shared = own.clone()
        dist.all_reduce(shared, group=ctx.group)
        shared /= ctx.count
        dx = (wide - along(shared[0], x) - unit * along(shared[1], x)) * along(weight * scale, x)
        return dx.to(x.dtype), own[1], own[0], None, None, None, None, None
