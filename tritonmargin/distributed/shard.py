"""Classes sharded over the ranks of a process group: what a loss exchanges, and the gradients of the exchanges.

Every rank owns a contiguous range of class rows and computes the loss of the whole, global batch: what follows from
N-vectors is replicated on all ranks, bit for bit, and only the class pass is split. So three kinds of
exchange are enough, and each has an obvious gradient, given that the upstream gradient of a replicated number is the
same on every rank:

    gather_rows  embeddings of all ranks.    Gradient: each rank used its own classes, the sum is scattered back
    own_part     numbers made of gathered rows on every rank. Gradient: replicated, a rank keeps its samples'
    all_sum      numbers that one rank has.  Gradient: replicated, as it is

A batch may have another size on every rank, and none at all on some. Collectives are all_gather, reduce_scatter and
all_reduce of padded, equal shapes, as NCCL asks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from tritonmargin.checks import looks_at_values
from tritonmargin.distributed.agreement import check_agreement, gave_up
from tritonmargin.distributed.settings import Fingerprint, Settings
from tritonmargin.distributed.state import Notice, watch_optimizers

# torch 2.13 has new names for them, and warns at the old ones.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# How many heads were made for a group.
heads_of: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


def shard_range(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """The classes [start, stop) of a rank, as `torch.chunk` and DTensor's `Shard(0)` split: 10 over 4 is 3, 3, 3, 1."""
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

    is_single = False

    def __init__(self, num_classes: int, group: dist.ProcessGroup | None = None, gradient_for: str = "ddp") -> None:
        self.group = dist.distributed_c10d._get_default_group() if group is None else group
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("process_group: this rank is not part of it")
        self.num_classes = num_classes
        self.number = 0  # which head of the group this is, in the order in which they were made
        self.calls = 0  # of this head and its copies
        self.fingerprint = Fingerprint()
        self.start, self.stop = shard_range(num_classes, self.rank, self.world_size)
        self.gradient_for = gradient_for
        self._meshes: dict[str, DeviceMesh] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # a process group cannot be copied, and a copy of a head is in the same one

    def classes(self, weight: Tensor) -> int:
        """C, of which `weight` has this rank's rows."""
        return self.num_classes

    def join(self) -> None:
        """Called by all ranks when they have made a head alike: it gets its number in the group."""
        self.number = heads_of[self.group] = heads_of.get(self.group, 0) + 1
        watch_optimizers()

    def run(self, collective: Callable[..., Any], *tensors: Any, call: int = 0) -> None:
        """A collective of the group; call: the call of the head whose backward it is, 0: it is of the latest forward.

        Raises:
            RuntimeError: another rank did not take part. It names the head, its call and the rank that waited.
        """
        try:
            collective(*tensors, group=self.group)
        except RuntimeError as lost:
            part = f"the backward of call {call}" if call else f"call {self.calls}"
            where = f"{part} of head {self.number} of this process group ({self.num_classes} classes)"
            raise gave_up(self.group, where, lost) from lost

    # -- samples of all ranks ------------------------------------------------------------------------------------

    @torch.compiler.disable  # a compiler would make a new graph for every call, and for every number of a margin
    def batch(self, x: Tensor, outside: Tensor | None, settings: Settings, **alike: bool) -> Batch:
        """How many samples each rank has. Waits for the device: sizes of tensors follow from it.

        x: what will be gathered. outside: whether some label is no class, if nobody has looked yet. settings: what
        decides about the loss. alike: what all ranks must have alike, or their collectives would not match.

        Raises:
            RuntimeError: on every rank, when they call different heads, or ask for different things, or one of them
                had an error or a label that is no class.
            ValueError: on every rank, when settings differ.
        """
        self.calls += 1
        alike = {"float64 numbers": x.dtype == torch.float64, "gradients": torch.is_grad_enabled(), **alike}
        named = settings.named(look=looks_at_values(x.device))
        row = [len(x), x.requires_grad, False, self.number, self.fingerprint.of(named), *alike.values()]
        everyone = self.exchange(row, x.device, outside)
        self.check_alike(everyone, list(alike))
        if any(other[4] != row[4] for other in everyone):
            check_agreement(self.group, named)
        return Batch(self, [count for count, *_ in everyone], any(needed for _, needed, *_ in everyone), self.calls)

    def check_alike(self, everyone: list[list[int]], alike: list[str]) -> None:
        """RuntimeError unless all ranks want the same of the same head; everyone: what they exchanged."""
        for rank, (count, _, wrong, *_) in enumerate(everyone):
            if count < 0:
                raise RuntimeError(
                    f"tritonmargin: rank {rank} of the process group had an error before the loss, see there"
                )
            if wrong:
                raise RuntimeError(
                    f"tritonmargin: rank {rank} of the process group has a target that is none of the "
                    f"{self.num_classes} classes"
                )
        for rank, (_, _, _, number, _, *settings) in enumerate(everyone):
            if number != everyone[0][3]:
                raise RuntimeError(
                    f"tritonmargin: rank {rank} of the process group calls head {number} of those made for it, rank 0 "
                    f"head {everyone[0][3]}: all ranks must call their heads in the same order"
                )
            for name, value, first in zip(alike, settings, everyone[0][5:], strict=True):
                if value != first:
                    ranks = (
                        f"rank {rank} {'does' if value else 'does not'} and rank 0 {'does' if first else 'does not'}"
                    )
                    raise RuntimeError(f"tritonmargin: all ranks must ask for {name} or none: {ranks}")

    @torch.compiler.disable
    def announce_error(self, weight: Tensor, alike: int) -> None:
        """Instead of `batch` with `alike` settings: the other ranks raise rather than wait for this one.

        weight: on the device that the group exchanges on; the error may be that another tensor is not.
        """
        self.calls += 1
        self.exchange([-1, False, False, self.number, 0] + [False] * (2 + alike), weight.device)

    def agree(self, error: Exception | None, device: torch.device) -> None:
        """Raise on every rank if one of them has an error."""
        failed = [bool(other) for (other,) in self.exchange([error is not None], device)]
        if error is not None:
            raise error
        if any(failed):
            raise RuntimeError(f"tritonmargin: rank {failed.index(True)} of the process group had an error, see there")

    def exchange(self, row: list[int], device: torch.device, outside: Tensor | None = None) -> list[list[int]]:
        """The rows of all ranks; outside: the third number, where it is known on the device alone."""
        own = torch.tensor(row, dtype=torch.int64, device=device)
        if outside is not None:
            own[2] = outside  # on the device: the exchange waits for it anyway
        out = own.new_empty(self.world_size * len(own))
        self.run(all_gather, out, own)
        rows: list[list[int]] = out.view(self.world_size, -1).tolist()
        return rows

    def own_labels(self, label: Tensor) -> Tensor:
        """Class numbers among this rank's rows, -1 for other ranks' classes and for -1."""
        return torch.where((label >= self.start) & (label < self.stop), label - self.start, -1)

    # -- numbers per sample, replicated --------------------------------------------------------------------------

    def all_sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks; its gradient is replicated."""
        (found,) = AllSums.apply(self, numbers)
        return found

    def all_sums(self, *numbers: Tensor | None) -> Any:
        """`all_sum` of several tensors [N] in one exchange; None stays None."""
        sums = iter(AllSums.apply(self, *(each for each in numbers if each is not None)))
        return tuple(None if each is None else next(sums) for each in numbers)

    def somewhere(self, flag: Tensor) -> Tensor:
        """Whether the flag is set on some rank."""
        return self.all_max(flag.to(torch.int32)) > 0

    def all_max(self, numbers: Tensor) -> Tensor:
        """The largest over ranks, without a gradient."""
        numbers = numbers.detach().clone()
        self.run(dist.all_reduce, numbers, dist.ReduceOp.MAX)
        return numbers

    def all_min(self, numbers: Tensor) -> Tensor:
        """The smallest over ranks, without a gradient."""
        numbers = numbers.detach().clone()
        self.run(dist.all_reduce, numbers, dist.ReduceOp.MIN)
        return numbers

    def shared(self, number: Tensor) -> Tensor:
        """A number that all ranks have alike and each uses for its own classes: its gradient is the sum over ranks."""
        return SharedNumber.apply(number, self)

    def logsumexp(self, rest: Tensor) -> Tensor:
        """log of the sum of exp(rest) over ranks."""
        return AllLogSumExp.apply(rest, self)

    def hardest(self, logit: Tensor, own_class: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit over ranks and its class number, the lowest of equal ones; own_class is this rank's."""
        highest = self.all_max(logit)
        absent = torch.iinfo(torch.int64).max
        found = torch.where((logit == highest) & (own_class >= 0), own_class + self.start, absent)
        lowest = self.all_min(found)
        # The gradient goes to the rank that has the class. What is nan anywhere is nan everywhere.
        mine = ((found == lowest) & (lowest != absent)) | logit.isnan()
        value = self.all_sum(torch.where(mine, logit, 0.0))
        nobody = (lowest == absent) & ~value.isnan()
        return torch.where(nobody, -torch.inf, value), torch.where(lowest == absent, -1, lowest)

    # -- parameters ----------------------------------------------------------------------------------------------

    def mesh(self, device: torch.device) -> DeviceMesh:
        if device.type not in self._meshes:
            self._meshes[device.type] = DeviceMesh.from_group(self.group, device.type)
        return self._meshes[device.type]

    def as_dtensor(self, own: Tensor) -> DTensor:
        """The rank's rows as a part of the tensor [C, ...] of all classes; shares their memory."""
        shape = torch.Size((self.num_classes, *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        mesh = self.mesh(own.device)
        part = DTensor.from_local(own, mesh, [Split(0)], run_check=False, shape=shape, stride=stride)
        if self.world_size > 1:
            part.notice = Notice(f"rows {self.start} to {self.stop} of {self.num_classes}")  # type: ignore[attr-defined]
        return part

    def as_replica(self, own: Tensor) -> DTensor:
        """What all ranks hold alike, as the one tensor that it is; shares its memory."""
        return DTensor.from_local(own, self.mesh(own.device), [Replicate()], run_check=False)


@dataclass(frozen=True)
class Batch:
    """One step's samples: `counts[r]` of rank r, in the order of the ranks."""

    shard: Shard
    counts: list[int]
    needs_gradient: bool = False  # whether some rank's rows do: then all ranks take part in it
    call: int = 0  # of the head, for who waits in its backward

    @property
    def own(self) -> slice:
        """This rank's samples among all."""
        start = sum(self.counts[: self.shard.rank])
        return slice(start, start + self.counts[self.shard.rank])

    def gather_rows(self, x: Tensor) -> Tensor:
        """All ranks' rows; the gradient is the sum over ranks, each rank's own rows of it, as `gradient_for` says."""
        if self.needs_gradient and not x.requires_grad:
            x = x.detach().requires_grad_()
        factor = self.shard.world_size if self.shard.gradient_for == "ddp" else 1
        return GatherRows.apply(x, self, factor)

    def own_part(self, numbers: Tensor) -> Tensor:
        """Replicated numbers of gathered rows, as they are; a rank's gradient is that of its own samples.

        Every rank has the gradient of all samples, and `gather_rows` sums over ranks: each may count once.
        """
        return OwnPart.apply(numbers, self)

    def keep_own(self, numbers: Tensor) -> Tensor:
        """This rank's numbers of replicated ones; the gradients of all ranks together are the replicated gradient."""
        return KeepOwn.apply(numbers, self)

    def gather(self, own: Tensor, call: int = 0) -> Tensor:
        """[own count, ...] -> [all, ...], without a gradient. Shorter batches are padded on the way."""
        longest = max(self.counts)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        out = own.new_empty(self.shard.world_size * longest, *own.shape[1:])
        self.shard.run(all_gather, out, padded, call=call)
        if len(set(self.counts)) == 1:
            return out
        return torch.cat([part[:count] for part, count in zip(out.split(longest), self.counts, strict=True)])

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """[all, ...] -> this rank's rows of the sum over ranks."""
        longest = max(self.counts)
        if len(set(self.counts)) > 1:
            padded = rows.new_zeros(self.shard.world_size, longest, *rows.shape[1:])
            for part, own in zip(padded, rows.split(self.counts), strict=True):
                part[: len(own)] = own
            rows = padded.flatten(0, 1)
        out = rows.new_empty(longest, *rows.shape[1:])
        self.shard.run(reduce_scatter, out, rows.contiguous(), call=self.call)
        return out[: self.counts[self.shard.rank]]


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, factor: int) -> Tensor:
        ctx.batch, ctx.factor = batch, factor
        return batch.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows = ctx.batch.scatter_sum(grad)
        return (rows if ctx.factor == 1 else rows * ctx.factor), None, None


class OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, batch: Batch) -> Tensor:
        ctx.own = batch.own
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = torch.zeros_like(grad)
        own[ctx.own] = grad[ctx.own]
        return own, None


class KeepOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return numbers[batch.own].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.batch.gather(grad, ctx.batch.call), None


class SharedNumber(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: Tensor, shard: Shard) -> Tensor:
        ctx.shard, ctx.call = shard, shard.calls
        return number.view_as(number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        ctx.shard.run(dist.all_reduce, total, call=ctx.call)
        return total, None


class AllLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: Tensor, shard: Shard) -> Tensor:
        highest = shard.all_max(rest)
        shift = torch.where(highest == -torch.inf, 0.0, highest)  # no class anywhere
        total = torch.exp(rest - shift)
        shard.run(dist.all_reduce, total)
        everywhere = shift + total.log()
        ctx.save_for_backward(rest, everywhere)
        return everywhere

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rest, everywhere = ctx.saved_tensors
        shift = torch.where(everywhere == -torch.inf, 0.0, everywhere)
        return grad * torch.exp(rest - shift), None


class AllSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Shard, *numbers: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a sum that nobody differentiates has no gradient, rather than zeros
        sums = torch.stack(numbers)
        shard.run(dist.all_reduce, sums)
        return tuple(each.clone() for each in sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads
