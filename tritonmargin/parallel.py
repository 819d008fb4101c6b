"""Classes sharded over the ranks of a process group: what a loss exchanges, and the gradients of the exchanges.

Every rank owns a contiguous range of class rows and computes the loss of the whole, global batch: what follows from
N-vectors is replicated on all ranks, bit for bit, and only the walk over the classes is split. So three kinds of
exchange are enough, and each has an obvious gradient, given that the upstream gradient of a replicated number is the
same on every rank:

    gather_rows     embeddings of all ranks.   Gradient: each rank used its own classes, the sum is scattered back
    gather_numbers  numbers of all samples.    Gradient: replicated, a rank keeps its samples'
    all_sum         numbers that one rank has. Gradient: replicated, as it is

A batch may have another size on every rank, and none at all on some. Collectives are all_gather, reduce_scatter and
all_reduce of padded, equal shapes, as NCCL asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.distributed.tensor import Shard as Split

GRADIENT_FOR = ("ddp", "sum")


def shard_range(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """The classes [start, stop) of a rank, split as `torch.chunk` and DTensor's `Shard(0)` do: 10 over 4 is 3, 3, 3, 1."""
    size = -(-num_classes // world_size)
    return min(rank * size, num_classes), min((rank + 1) * size, num_classes)


class Shard:
    """The range of classes that this rank owns, and the exchanges with the other ranks.

    Args:
        num_classes: C, of all ranks.
        group: the process group, or None for the default one.
        gradient_for: "sum": the gradient of embeddings is that of the loss. "ddp": world_size times it, because
            DistributedDataParallel and FSDP divide the gradients of a backbone by the number of ranks.
    """

    def __init__(self, num_classes: int, group: dist.ProcessGroup | None = None, gradient_for: str = "ddp") -> None:
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("process_group: this rank is not part of it")
        self.num_classes = num_classes
        self.start, self.stop = shard_range(num_classes, self.rank, self.world_size)
        self.gradient_for = gradient_for

    # -- samples of all ranks ------------------------------------------------------------------------------------

    def batch(self, embeddings: Tensor) -> Batch:
        """How many samples each rank has."""
        counts = self.gather_objectless(torch.tensor([len(embeddings)], device=embeddings.device))
        return Batch(self, [int(count) for count in counts.tolist()])

    def gather_objectless(self, own: Tensor) -> Tensor:  # [K] -> [world_size K]
        out = own.new_empty(self.world_size * len(own))
        dist.all_gather_into_tensor(out, own.contiguous(), group=self.group)
        return out

    # -- numbers per sample, replicated --------------------------------------------------------------------------

    def all_sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks; its gradient is replicated."""
        return AllSum.apply(numbers, self.group)  # type: ignore[no-any-return]

    def all_max(self, numbers: Tensor) -> Tensor:
        """The largest over ranks, without a gradient."""
        numbers = numbers.detach().clone()
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers

    def all_min(self, numbers: Tensor) -> Tensor:
        """The smallest over ranks, without a gradient."""
        numbers = numbers.detach().clone()
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.group)
        return numbers

    def logsumexp(self, rest: Tensor) -> Tensor:
        """log of the sum of exp(rest) over ranks."""
        highest = self.all_max(rest)
        shift = torch.where(highest.isinf(), 0.0, highest)  # no class anywhere: -inf, and its gradient 0
        total = self.all_sum(torch.exp(rest - shift))
        return shift + total.log()

    # -- parameters ----------------------------------------------------------------------------------------------

    def mesh(self, device: torch.device) -> DeviceMesh:
        if not hasattr(self, "_mesh"):
            self._mesh = DeviceMesh.from_group(self.group, device.type)
        return self._mesh

    def as_dtensor(self, own: Tensor) -> DTensor:
        """The rank's rows as a part of the tensor [C, ...] of all classes; shares their memory."""
        shape = torch.Size((self.num_classes, *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        mesh = self.mesh(own.device)
        return DTensor.from_local(own, mesh, [Split(0)], run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True)
class Batch:
    """One step's samples: `counts[r]` of rank r, in the order of the ranks."""

    shard: Shard
    counts: list[int]

    @property
    def own(self) -> slice:
        """This rank's samples among all."""
        start = sum(self.counts[: self.shard.rank])
        return slice(start, start + self.counts[self.shard.rank])

    def gather_rows(self, x: Tensor) -> Tensor:
        """All ranks' rows; the gradient is the sum over ranks, each rank's own rows of it."""
        return GatherRows.apply(x, self)  # type: ignore[no-any-return]

    def gather_numbers(self, numbers: Tensor) -> Tensor:
        """All ranks' numbers; the gradient is replicated."""
        return GatherNumbers.apply(numbers, self)  # type: ignore[no-any-return]

    def keep_own(self, numbers: Tensor) -> Tensor:
        """This rank's numbers of replicated ones; the gradients of all ranks together are the replicated gradient."""
        return KeepOwn.apply(numbers, self)  # type: ignore[no-any-return]

    def gather(self, own: Tensor) -> Tensor:
        """[own count, ...] -> [all, ...], without a gradient. Shorter batches are padded on the way."""
        group, longest = self.shard.group, max(self.counts)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        out = own.new_empty(self.shard.world_size * longest, *own.shape[1:])
        dist.all_gather_into_tensor(out, padded, group=group)
        if len(set(self.counts)) == 1:
            return out
        return torch.cat([part[:count] for part, count in zip(out.split(longest), self.counts, strict=True)])

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """[all, ...] -> this rank's rows of the sum over ranks."""
        group, longest = self.shard.group, max(self.counts)
        if len(set(self.counts)) > 1:
            padded = rows.new_zeros(self.shard.world_size, longest, *rows.shape[1:])
            for part, own in zip(padded, rows.split(self.counts), strict=True):
                part[: len(own)] = own
            rows = padded.flatten(0, 1)
        out = rows.new_empty(longest, *rows.shape[1:])
        dist.reduce_scatter_tensor(out, rows.contiguous(), group=group)
        return out[: self.counts[self.shard.rank]]


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return batch.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.batch.scatter_sum(grad), None


class GatherNumbers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, batch: Batch) -> Tensor:
        ctx.own = batch.own
        return batch.gather(numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own], None


class KeepOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return numbers[batch.own].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.batch.gather(grad), None


class AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
        numbers = numbers.clone()
        dist.all_reduce(numbers, group=group)
        return numbers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
