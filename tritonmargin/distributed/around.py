"""What is around a head when it is called: a wrapper that takes its rows for its own, or several ranks and nobody."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tritonmargin.compiling import untraced

if TYPE_CHECKING:
    from tritonmargin.modules import MarginSoftmaxLoss

ALONE = (
    "tritonmargin: this head is inside neither DistributedDataParallel nor fully_shard and has no process_group, so "
    "its copies on the ranks drift apart unless you average its gradients (docs/distributed.md); if you do, "
    "warnings.filterwarnings('ignore', 'tritonmargin: this head') ends this"
)
WARNED: list[bool] = []  # once in a process is enough


class Around:
    """Looks for a wrapper around one head whenever it is called on ranks, and refuses what does not go together."""

    def __init__(self) -> None:
        self.ddp: weakref.ref[DistributedDataParallel] | None = None
        self.names: dict[str, str] = {}  # of the head's tensors that this ddp has: how it calls them

    def __reduce__(self) -> tuple[type[Around], tuple[()]]:
        return Around, ()  # a copy of a head is somewhere else

    def check(self, head: MarginSoftmaxLoss) -> None:
        """To be called in forward.

        Raises:
            RuntimeError: the head is inside of a wrapper that does not go together with its options.
        """
        if head.shard is not None and getattr(head.weight, "shard", None) is not head.shard:
            raise RuntimeError(
                "tritonmargin: the head's weight is not the parameter that it made. fully_shard takes each rank's "
                "rows for parts of one tensor: a head with a process_group stays outside, wrap the backbone alone. To "
                "give a head other rows, copy them into head.weight"
            )
        learns = torch.is_grad_enabled() and head.weight.requires_grad
        names = self.names_in_ddp(head)
        if is_fully_sharded(head):
            check_fully_sharded(head, learns)
        elif names:
            check_ddp(head, learns, names)
        elif learns and head.shard is None:
            warn_alone(head.weight)

    def names_in_ddp(self, head: MarginSoftmaxLoss) -> dict[str, str]:
        """Which of the head's tensors the DistributedDataParallel has whose forward is running, and their names."""
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None:
            return {}
        if self.ddp is None or self.ddp() is not ddp:
            own = {id(getattr(head, name)): name for name in ("weight", "bias", "class_weight")}
            every = [*ddp.module.named_parameters(), *ddp.module.named_buffers()]
            ignored = getattr(ddp, "parameters_to_ignore", ())
            self.names = {own[id(each)]: name for name, each in every if id(each) in own and name not in ignored}
            if not ddp.broadcast_buffers:
                self.names.pop("class_weight", None)
            self.ddp = weakref.ref(ddp)
        return self.names

    @untraced  # it would be traced for one answer
    def somewhere(self, head: MarginSoftmaxLoss, flag: Tensor) -> Tensor:
        """Whether the flag is set on some rank of the DistributedDataParallel that has the weight, if there is one."""
        if "weight" not in self.names_in_ddp(head):
            return flag
        ddp: Any = DistributedDataParallel._get_active_ddp_module()
        if ddp._join_config.enable:
            refuse(
                "DistributedDataParallel.join(), where ranks that have no more samples do not answer",
                "on_nonfinite, which asks all ranks,",
                "Look at the loss yourself",
            )
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=ddp.process_group)
        return flag


def is_fully_sharded(head: MarginSoftmaxLoss) -> bool:
    """Whether FSDP has put another parameter in the place of the head's own."""
    return getattr(head, "_is_fsdp_managed_module", False) and not hasattr(head.weight, "sampled")


def check_fully_sharded(head: MarginSoftmaxLoss, learns: bool) -> None:
    if head._updater is not None:
        refuse(
            "fully_shard, which gathers its rows for each step and drops them",
            "update_in_backward",
            "Call RowSGD or RowAdamW without update_in_backward, or keep the head outside and shard its classes with "
            "process_group=",
        )
    if learns and head.sparse_grad:
        refuse(
            "fully_shard, which averages dense gradients",
            "sparse_grad=True",
            "Leave it out, or keep the head outside and shard its classes with process_group=",
        )
    if learns and head.on_nonfinite is not None:
        refuse(
            "fully_shard, where the other ranks would wait for one that does not go back",
            f"on_nonfinite={head.on_nonfinite!r}",
            "Look at the loss of all ranks yourself: dist.all_reduce of loss.isfinite()",
        )


def check_ddp(head: MarginSoftmaxLoss, learns: bool, names: dict[str, str]) -> None:
    apart = head.shard is not None or (head._updater is not None and "weight" in names)
    if apart:
        raise RuntimeError(
            f"tritonmargin: the head is inside DistributedDataParallel, which gives all ranks the first one's "
            f"{next(iter(names.values()))} and averages gradients: a head with a process_group, or with "
            "update_in_backward, stays outside. Wrap the backbone alone"
        )
    if learns and head.sparse_grad and "weight" in names:
        refuse(
            "DistributedDataParallel, which averages dense gradients",
            "sparse_grad=True",
            "Leave it out, or keep the head outside and shard its classes with process_group=",
        )


def refuse(wrapper: str, option: str, instead: str) -> NoReturn:
    raise RuntimeError(f"tritonmargin: the head is inside {wrapper}: {option} does not go with it. {instead}")


def warn_alone(weight: Tensor) -> None:
    """Where nobody is known to average the gradients of this weight. A hook on it may well do that."""
    hooked = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    if not WARNED and dist.get_world_size() > 1 and not hooked:
        WARNED.append(True)
        warnings.warn(ALONE, stacklevel=5)
