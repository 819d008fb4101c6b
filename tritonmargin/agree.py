"""Ranks that fail together: what goes wrong on one of them is raised on all, so that none waits for another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.distributed_c10d import _world

T = TypeVar("T")

_gloo: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
_thread = ThreadPoolExecutor(1, thread_name_prefix="tritonmargin")
_running: list[Future[Any]] = []


class CheckpointError(RuntimeError):
    """Something could not be written or read; raised on every rank, with the ranks that failed and the causes."""


class Ranks:
    """The processes that work together: those of a group, or this one alone.

    They talk through a gloo group of their own, made once for each group, so that what a background thread says does
    not mix with the collectives of a training step. Work in the background is waited for first: one talk at a time.

    Args:
        group: the process group; None: the default one, or this process alone if torch.distributed is not initialised.
        alone: this process alone, whatever is initialised.

    Raises:
        ValueError: this rank is not part of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
        wait(_running)
        _running.clear()  # what failed holds on to its copy of the state
        self.group: dist.ProcessGroup | None = None
        self.rank, self.world_size = 0, 1
        if alone or not (dist.is_available() and dist.is_initialized()):
            return
        group = dist.group.WORLD if group is None else group
        assert group is not None
        if dist.get_rank(group) < 0:
            raise ValueError("group: this rank is not part of it")
        if group not in _gloo:
            _gloo[group] = gloo_group(group)
        self.group = _gloo[group]
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; what it returned on this one.

        Raises:
            CheckpointError: on every rank, if work raised on any; it names the ranks and the causes.
        """
        results: list[T] = []
        self.gather(lambda: results.append(work()))
        return results[0]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; what it returned on each. Raises as `together` does."""
        result: T | None = None
        failures: dict[int, str] = {}
        error: BaseException | None = None
        try:
            result = work()
        except (Exception, CheckpointException) as raised:
            error, failures = raised, causes(raised, self.rank)
        outcomes: list[Any] = [(result, failures)]
        if self.group is not None:
            gathered: list[Any] = [None] * self.world_size
            try:
                dist.all_gather_object(gathered, outcomes[0], group=self.group)
                outcomes = gathered
            except Exception as lost:
                failures.setdefault(self.rank, f"lost contact with the other ranks: {lost}")
        merged = {rank: cause for _, failed in outcomes for rank, cause in failed.items()}
        if merged:
            raise CheckpointError("; ".join(f"rank {rank}: {merged[rank]}" for rank in sorted(merged))) from error
        return [result for result, _ in outcomes]


def gloo_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the ranks of `group`, made by them alone."""
    members = dist.get_process_group_ranks(group)
    if len(members) == dist.get_world_size():
        return dist.new_group(backend="gloo")
    # The group gets a name from its members and from the number of groups that the process is in. Where the numbers
    # differ, its ranks would wait for each other under different names.
    own = len(_world.pg_names)
    numbers: list[Any] = [None] * len(members)
    dist.all_gather_object(numbers, own, group=group)
    for _ in range(max(numbers) - own):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    return dist.new_group(members, backend="gloo", use_local_synchronization=True)


def in_background(work: Callable[[], T]) -> Future[T]:
    """Do `work` in the one background thread."""
    future = _thread.submit(work)
    future.add_done_callback(tell)
    _running[:] = [future]
    return future


def tell(future: Future[Any]) -> None:
    """A training that never asks its futures hears of a failure all the same."""
    error = future.exception()
    if error is not None:
        warnings.warn(f"tritonmargin: {error}", stacklevel=2)


def causes(error: BaseException, rank: int) -> dict[int, str]:
    """What went wrong on which rank; torch.distributed.checkpoint tells every rank of the failures of all."""
    if isinstance(error, CheckpointException):
        return {failed: describe(cause) for failed, (cause, _) in error.failures.items()}
    return {rank: describe(error)}


def describe(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
