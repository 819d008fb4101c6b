"""Ranks that agree, and fail together: what goes wrong on one of them is raised on all, so that none waits."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

T = TypeVar("T")

_gloo: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
_running: list[Future[Any]] = []
_inherited: set[dist.ProcessGroup] = set()  # those of the process that this one was forked from


def forget_parent() -> None:
    """A forked process has neither the thread that writes for its parent nor those of its parent's process groups."""
    _running.clear()
    if dist.is_available() and dist.is_initialized():
        _inherited.update(_world.pg_map)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_parent)


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
        ValueError, TypeError: this rank is not part of the group, or it is none.
        CheckpointError: the others did not answer within the group's timeout, or the group is of the process that this
            one was forked from.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
        if not (group is None or isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER):
            raise TypeError(f"group must be a torch.distributed process group, got {group!r}")
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
        if group in _inherited:
            raise CheckpointError(
                "this process was forked from one that had initialised torch.distributed, and the group's threads are "
                "there. Save and load in that process; or start this one with 'spawn' or 'forkserver'"
            )
        if group not in _gloo:
            try:
                _gloo[group] = gloo_group(group)
            except Exception as lost:
                raise CheckpointError(
                    f"rank {dist.get_rank(group)}: lost contact with the other ranks: {lost}"
                ) from lost
        self.group = _gloo[group]
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """What is raised inside is raised here, and the other ranks hear of it where they `gather` next."""
        try:
            yield
        except (TypeError, ValueError) as error:
            with contextlib.suppress(CheckpointError):
                self.gather(partial(fail, error))
            raise

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
        from torch.distributed.checkpoint import CheckpointException  # slow to import

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


def fail(error: Exception) -> None:
    raise error


def gloo_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the ranks of `group`, made by them alone, which waits for them as long as `group` does."""
    members, timeout = dist.get_process_group_ranks(group), timeout_of(group)
    if len(members) == dist.get_world_size():
        return dist.new_group(backend="gloo", timeout=timeout)
    # The group gets a name from its members and from the number of groups that the process is in. Where the numbers
    # differ, its ranks would wait for each other under different names.
    own = len(_world.pg_names)
    numbers: list[Any] = [None] * len(members)
    dist.all_gather_object(numbers, own, group=group)
    for _ in range(max(numbers) - own):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    return dist.new_group(members, timeout, backend="gloo", use_local_synchronization=True)


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """What the group was made with; None, torch's default, where its backend does not say."""
    for device in group._device_types:
        options: Any = getattr(group._get_backend(device), "options", None)
        if hasattr(options, "_timeout"):
            found: timedelta = options._timeout
            return found
    return None


class Background(Future[T]):
    """The result of work in a thread of this process. A process that is forked from it has no such thread."""

    def __init__(self) -> None:
        super().__init__()
        self.process, self.finished = os.getpid(), False

    def run(self, work: Callable[[], T]) -> None:
        try:
            self.set_result(work())
        except BaseException as error:
            self.set_exception(error)
        self.finished = True

    def check_process(self) -> None:
        if os.getpid() != self.process and not self.finished:
            raise CheckpointError("this process was forked while its parent saved: only the parent has the result")

    def result(self, timeout: float | None = None) -> T:
        self.check_process()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.check_process()
        return super().exception(timeout)


def in_background(work: Callable[[], T]) -> Future[T]:
    """Do `work` in a thread. There is one at a time: whoever begins something waits for what is running (`Ranks`)."""
    future: Background[T] = Background()
    future.add_done_callback(tell)
    _running[:] = [future]
    threading.Thread(target=future.run, args=(work,), name="tritonmargin").start()
    return future


def tell(future: Future[Any]) -> None:
    """A training that never asks its futures hears of a failure all the same."""
    error = future.exception()
    if error is not None:
        warnings.warn(f"tritonmargin: {error}", stacklevel=2)


def causes(error: BaseException, rank: int) -> dict[int, str]:
    """What went wrong on which rank; torch.distributed.checkpoint tells every rank of the failures of all."""
    if hasattr(error, "failures"):  # its CheckpointException
        return {failed: describe(cause) for failed, (cause, _) in error.failures.items()}
    return {rank: describe(error)}


def describe(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


# -- heads of one group ----------------------------------------------------------------------------------------------


def check_agreement(group: dist.ProcessGroup, description: dict[str, object]) -> None:
    """ValueError on every rank, naming the difference, unless all ranks of the group describe themselves alike.

    A description with an "error" tells the others why this rank raises one.

    Raises:
        RuntimeError: within the group's timeout, where other ranks do not answer: they died, or made no head of this
            group.
    """
    everyone: list[dict[str, object]] = [{} for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather_object(everyone, description, group=group)
    except RuntimeError as lost:
        members = dist.get_process_group_ranks(group)
        leave_word(members)
        raise RuntimeError(
            f"process_group: this rank's group is of the ranks {members}, and not all of them made a head with a group "
            f"of the same ranks: {lost}"
        ) from lost
    for rank, other in enumerate(everyone):
        if "error" in other and "error" not in description:
            raise ValueError(f"process_group: rank {rank} has an error: {other['error']}")
        for name, value in everyone[0].items():
            if "error" not in everyone[0] and "error" not in other and other.get(name) != value:
                raise ValueError(f"process_group: {name} is {other.get(name)!r} on rank {rank}, {value!r} on rank 0")


# In the store through which the ranks found each other: who waited in vain for a rank, and in which group.
WORD = "tritonmargin/waited_for/"
# The groups in which this rank waited in vain itself: their errors are no news to it.
WAITED: set[tuple[int, ...]] = set()


def leave_word(members: list[int]) -> None:
    """Tell ranks that made a head of another group, or of none, and so did not wait as this one did: see `Lookout`."""
    own = dist.get_rank()
    WAITED.add(tuple(members))
    with contextlib.suppress(RuntimeError):  # whoever kept the store is gone
        for rank in members:
            if rank != own:
                dist.distributed_c10d._get_default_store().set(f"{WORD}{rank}", json.dumps([own, members]))


# Under it, for each rank: what another one of its group waited for, and is not waiting for any more.
GAVE_UP = "tritonmargin/gave_up/"


def gave_up(group: dist.ProcessGroup, where: str, lost: RuntimeError) -> RuntimeError:
    """The error of a rank whose exchange with the others failed; they hear of it with their own, if they call later."""
    own, members = dist.get_rank(), dist.get_process_group_ranks(group)
    heard = asked(f"{GAVE_UP}{own}")
    with contextlib.suppress(RuntimeError):  # whoever kept the store is gone
        for rank in members:
            if rank != own:
                dist.distributed_c10d._get_default_store().set(f"{GAVE_UP}{rank}", f"rank {own} gave up in {where}. ")
    return RuntimeError(
        f"tritonmargin: rank {own} waited for other ranks in {where}, in vain: {lost}. {heard or ''}All ranks "
        f"{members} must call a sharded head equally often, in evaluation too; a rank without samples passes none"
    )


class Lookout:
    """Whether another rank gave up on this one, because their heads are of different groups.

    A rank alone in its group has no one to ask when it makes its head: others may make theirs much later or never. So
    it looks for what they left while it trains, once a second at most, and not any more once the store fails or is
    slow: a store that is gone must not hold up who does not need it.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.next = -math.inf

    def look(self) -> None:
        """Raises RuntimeError, once, if so."""
        if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
            return
        if self.group is not None and dist.get_world_size(self.group) == dist.get_world_size():
            return  # all ranks are in it, and agreed
        begin = time.monotonic()
        if begin < self.next:
            return
        word = asked(f"{WORD}{dist.get_rank()}")
        self.next = math.inf if word is None or time.monotonic() > begin + 1.0 else begin + 1.0
        if word:
            rank, members = json.loads(word)
            if tuple(members) not in WAITED:
                own = "none" if self.group is None else f"the ranks {dist.get_process_group_ranks(self.group)}"
                raise RuntimeError(
                    f"process_group: rank {rank} waited for {members} to make a head of one group with it; this rank's "
                    f"head is of {own}"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Lookout:
        return Lookout(self.group)  # a process group cannot be copied


def asked(key: str) -> str | None:
    """What the store has under a key, which it then has no more; "" for nothing, None for a store that is gone."""
    store = dist.distributed_c10d._get_default_store()
    under = store
    while isinstance(under, dist.PrefixStore):
        under = under.underlying_store
    if isinstance(under, dist.FileStore) and not os.path.exists(under.path):  # type: ignore[attr-defined]
        return None  # it would be waited for
    try:
        if not store.check([key]):
            return ""
        word = store.get(key).decode()
        store.delete_key(key)
        return word
    except RuntimeError:
        return None
