"""State of all classes, of which each rank holds its rows: a saved part says whose it is, and others refuse it."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tritonmargin.distributed.dtensors import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from tritonmargin.distributed.shard import Shard

ANOTHERS = (
    "That is what torch.save writes on one rank. Save and load a sharded state with tm.checkpoint on all ranks; or let "
    "all ranks call get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict (get_optimizer_state_dict for an optimizer), one of them save what it "
    "returns, and all load that"
)


class Notice:
    """An attribute of a part of a state: who pickles the part, as torch.save does, hears what the file will hold."""

    warned: ClassVar[list[bool]] = []  # once in a process

    def __init__(self, rows: str) -> None:
        self.rows = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Notice:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        if not self.warned:
            self.warned.append(True)
            warnings.warn(
                f"tritonmargin: a sharded head's state is pickled, and this rank has only {self.rows}. Every rank has "
                "to save its own, and to load that. A file of one rank is not enough: see tm.checkpoint",
                stacklevel=2,
            )
        return OrderedDict, ()  # which torch.load knows


def own_rows(name: str, value: Tensor, shard: Shard) -> Tensor:
    """This rank's rows of a tensor of all classes: of a DTensor, which may be split in any way, or of a whole one.

    Raises:
        ValueError: a tensor of other classes, or the part of another rank.
    """
    if len(value) != shard.num_classes:
        raise ValueError(f"{name} has {len(value)} classes, this head {shard.num_classes} on all ranks")
    if is_dtensor(value):
        if not is_whole(value) and not is_of_this_rank(value):
            raise of_another(name, value)  # at once: another rank may have what it needs, and not answer
        if part_of(value) == (shard.start, shard.stop):
            return value.to_local()
    return whole(name, value)[shard.start : shard.stop]


def whole(name: str, value: Tensor) -> Tensor:
    """All of a DTensor, which its ranks gather together.

    Raises:
        ValueError: it is the part of another rank, or of ranks that there are no more.
    """
    if not is_dtensor(value):
        return value
    if is_whole(value):
        return value.to_local()
    if not can_be_gathered(value):
        raise of_another(name, value)
    return value.full_tensor()


def like(name: str, value: Tensor, own: Tensor | None) -> Tensor:
    """A tensor of all classes as `own` has it, which `fully_shard` may have made a DTensor."""
    if not is_dtensor(own):
        return whole(name, value)
    if not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
    if not is_whole(value) and not is_of_this_rank(value):
        raise of_another(name, value)
    return (
        value.redistribute(own.device_mesh, own.placements)
        if value.device_mesh == own.device_mesh
        else like(name, whole(name, value), own)
    )


def of_another(name: str, value: DTensor) -> ValueError:
    part, place = part_of(value), value.device_mesh.get_coordinate()
    rows = "a part" if part is None else f"the rows {part[0]} to {part[1]}"
    return ValueError(
        f"{name} is {rows} of {len(value)} here, as the rank at place {place} of {value.device_mesh.size()} ranks had "
        f"it, and the others' are missing. {ANOTHERS}"
    )


def is_whole(value: DTensor) -> bool:
    return value.device_mesh.size() == 1 or all(each.is_replicate() for each in value.placements)


def part_of(value: DTensor) -> tuple[int, int] | None:
    """The rows [start, stop) that a DTensor holds here, if it is split by rows over one dimension of ranks."""
    from tritonmargin.distributed.shard import shard_range

    place = value.device_mesh.get_coordinate()
    if place is None or len(value.placements) != 1 or not value.placements[0].is_shard(0):
        return None
    return shard_range(len(value), place[0], value.device_mesh.size())


def is_of_this_rank(value: DTensor) -> bool:
    """Whether this rank made it, or one that stood at its place: a DTensor keeps the place of who saved it."""
    mesh = value.device_mesh
    if not dist.is_initialized():
        return False
    here = (mesh.mesh == dist.get_rank()).nonzero().tolist()
    return [list(mesh.get_coordinate() or ())] == here


def can_be_gathered(value: DTensor) -> bool:
    """Whether its ranks are there, and each has its own part; they ask each other."""
    mesh = value.device_mesh
    try:
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    except (RuntimeError, ValueError, KeyError):  # of ranks that there are no more
        return False
    if [dist.get_world_size(group) for group in groups] != [mesh.size(dim) for dim in range(mesh.ndim)]:
        return False
    mine = torch.tensor(is_of_this_rank(value), dtype=torch.int32, device=value.device)
    for group in groups:
        dist.all_reduce(mine, dist.ReduceOp.MIN, group=group)
    return bool(mine)


# -- rows that `fully_shard` has dealt out ---------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """The rows that this rank has, in the same memory: of a DTensor its part.

    Raises:
        TypeError: a DTensor that is not split by rows.
    """
    if not is_dtensor(tensor):
        return tensor
    if any(each.is_partial() or getattr(each, "dim", 0) != 0 for each in tensor.placements):
        raise TypeError(f"tm.optim's optimizers need whole rows on a rank, got a DTensor split as {tensor.placements}")
    return tensor.to_local()


def first_row(weight: Tensor) -> int:
    """A number of this rank's rows, another one for other rows and the same for the same."""
    if is_dtensor(weight):
        place = weight.device_mesh.get_coordinate() or ()
        split = [at for at, each in zip(place, weight.placements, strict=True) if not each.is_replicate()]
        return sum(at * 1009**power for power, at in enumerate(split))
    shard = shard_of(weight)
    return 0 if shard is None else shard.start


def rows_like(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A zero for each row, split as the rows are."""
    zeros = torch.zeros(len(local(weight)), dtype=dtype, device=weight.device)
    if not is_dtensor(weight):
        return zeros
    return type(weight).from_local(zeros, weight.device_mesh, weight.placements, shape=weight.shape[:1], stride=(1,))


# -- torch's optimizers ----------------------------------------------------------------------------------------------

# Those whose state dicts are of all classes, as those of tm.optim's optimizers are.
WATCHED: weakref.WeakSet[Optimizer] = weakref.WeakSet()
HOOK: list[Any] = []


def watch_optimizers() -> None:
    """Look at every optimizer of this process in its first step, from now on: one of torch's may train a shard."""
    if not HOOK:
        HOOK.append(register_optimizer_step_pre_hook(before_step))


def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in WATCHED:
        return
    WATCHED.add(optimizer)
    if hasattr(optimizer, "state_names"):
        return  # of tm.optim
    sharded = [each for group in optimizer.param_groups for each in group["params"] if shard_of(each) is not None]
    if sharded and any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise RuntimeError(
            "tritonmargin: ZeroRedundancyOptimizer gives all ranks the first one's rows of a sharded head. Its state "
            "is sharded already: train it with an optimizer of its own"
        )
    for weight in sharded:  # what was loaded before the first step
        state = optimizer.state.get(weight, {})
        state.update(rows_of_state(state, weight))
    optimizer.register_state_dict_post_hook(of_all_classes)
    optimizer.register_load_state_dict_pre_hook(of_this_rank)


def shard_of(weight: Tensor) -> Shard | None:
    return getattr(weight, "shard", None)


def of_all_classes(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """The state dict that an optimizer has made, with DTensors for the rows of a shard."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for key, weight in enumerate(weights):
        shard, state = shard_of(weight), saved["state"].get(key)
        if shard is not None and state is not None:
            saved["state"][key] = {
                name: shard.as_dtensor(value) if has_rows(value, len(weight), weight) else value
                for name, value in state.items()
            }


def of_this_rank(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
    """A state dict that is to be loaded, with this rank's rows."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    keys = [key for group in given["param_groups"] for key in group["params"]]
    state = dict(given["state"])
    for key, weight in zip(keys, weights, strict=False):
        if key in state and shard_of(weight) is not None:
            state[key] = {**state[key], **rows_of_state(state[key], weight)}
    return {**given, "state": state}


def rows_of_state(state: dict[str, Any], weight: Tensor) -> dict[str, Tensor]:
    """Those entries of one parameter's state that are of all classes, cut to this rank's rows."""
    shard = shard_of(weight)
    assert shard is not None
    return {
        name: own_rows(f"the state's {name!r}", value, shard)
        for name, value in state.items()
        if is_dtensor(value) or (has_rows(value, shard.num_classes, weight) and len(weight) != shard.num_classes)
    }


def has_rows(value: Any, rows: int, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim == weight.ndim and len(value) == rows
