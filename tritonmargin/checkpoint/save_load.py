"""Writing and reading a checkpoint together, on all ranks."""

from __future__ import annotations

import copy
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tritonmargin.arguments import check_flag, check_integer, check_name, check_path
from tritonmargin.checkpoint.manifest import (
    PARTIAL,
    check_metadata,
    check_names,
    clear,
    complete_steps,
    fingerprint,
    name_of,
    problem,
    prune,
    publish,
    read_manifest,
)
from tritonmargin.distributed.agreement import CheckpointError, Ranks, describe, in_background
from tritonmargin.distributed.dtensors import is_dtensor

# -- saving ------------------------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike[str],
    state: MutableMapping[str, Any],
    step: int,
    *,
    group: dist.ProcessGroup | None = None,
    keep: int = 2,
    asynchronous: bool = False,
) -> Future[Path]:
    """Write the checkpoint `folder/step_{step:010d}`; to be called by all ranks of the group.

    If anything fails on any rank, all ranks raise, nothing is left of the new checkpoint, and earlier ones stay as
    they are. A checkpoint of the same step is replaced once the new one is complete. What killed saves have left is
    removed, so only one job at a time may save into a folder.

    Args:
        folder: of all checkpoints of a run; made if missing.
        state: dicts and lists of tensors, DTensors and Python values, nested. Tensors may be on any device.
        step: number of the checkpoint.
        group: its ranks write; None: the default group, or this process alone without torch.distributed. The first
            save or load of a group makes a gloo group of the same ranks, for what they have to say to each other. It
            has the group's timeout: that long the ranks that are done with their part wait for one that is slow, or
            gone.
        keep: that many checkpoints remain, those of the highest steps; the one just written always does.
        asynchronous: copy the state to the CPU, return, and write in a background thread: one more copy of the
            rank's part of the state in host memory, and training may go on and change it. The thread has the gloo
            group for itself. The next save or load waits for it; wait for it, too, before you destroy process groups.
            A failure is also a warning, for those who never ask the future.

    Returns:
        A future of the checkpoint's path. With `asynchronous`, ask it for its `result()`, which raises what went
        wrong; without, it is done.

    Raises:
        CheckpointError: on all ranks, with the rank that failed and the cause.
        TypeError, ValueError: an argument that does not fit; on the other ranks CheckpointError.
    """
    ranks = Ranks(group)
    with ranks.heard():
        check_path("folder", folder)
        check_state(state)
        check_integer("step", step, 0)
        check_integer("keep", keep, 1)
        check_flag("asynchronous", asynchronous)
    prepared: Future[dict[str, Any]] = Future()
    try:
        leaves = leaves_at(slots(state))
        prepared.set_result({key: copied(leaf) for key, leaf in leaves.items()} if asynchronous else leaves)
    except Exception as error:  # raised where all ranks hear of it
        prepared.set_exception(error)
    work = partial(write, ranks, Path(folder) / name_of(step), prepared, step, keep)
    if asynchronous:
        return in_background(work)
    done: Future[Path] = Future()
    done.set_result(work())
    return done


def write(ranks: Ranks, path: Path, prepared: Future[dict[str, Any]], step: int, keep: int) -> Path:
    """The checkpoint of prepared leaves, on all ranks."""
    unfinished = path.with_name(path.name + PARTIAL)

    def prepare() -> tuple[dict[str, str], str]:
        names = described(prepared.result()) if ranks.rank == 0 else {}
        if ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear(path.parent)
            unfinished.mkdir()
        return names, path.name

    def compare() -> None:
        if path.name != name:
            raise CheckpointError(f"it is {path.name} here and {name} on rank 0: all ranks have to save the same step")
        different = set(names) ^ set(prepared.result())
        if different:
            raise CheckpointError(
                f"state has {min(different)!r} here or on rank 0 only: names must be the same on all ranks"
            )
        for leaf, words in described(prepared.result()).items():
            if words != names[leaf]:
                raise CheckpointError(
                    f"{leaf!r} is {words} here and {names[leaf]} on rank 0: one of them would be kept. What differs "
                    "between ranks has to be a DTensor, as the state of tm.optim's optimizers is"
                )

    def write_leaves() -> None:
        with no_warning():
            dcp.save(
                prepared.result(),
                storage_writer=Writer(unfinished, per_thread_copy_ahead=0),  # no CUDA streams in the background
                # What every rank has is that of the first, as DistributedDataParallel has it: a BatchNorm's buffers
                # differ, and must not be of one rank here and of another one there.
                planner=dcp.DefaultSavePlanner(
                    flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
                ),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )

    def sign() -> dict[str, dict[str, int]]:
        own = [name for name in os.listdir(unfinished) if writer_of(name, ranks) == ranks.rank]
        return {name: fingerprint(unfinished / name) for name in own}

    def finish() -> None:
        if ranks.rank == 0:
            publish(unfinished, path, step, ranks.world_size, files)
            prune(path.parent, step, keep)

    try:
        names, name = ranks.gather(prepare)[0]
        ranks.together(compare)
        ranks.together(write_leaves)
        files = {name: found for own in ranks.gather(sign) for name, found in own.items()}
        ranks.together(finish)
    except CheckpointError as error:
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"checkpoint {path} was not written: {error}") from error
    return path


class Writer(dcp.FileSystemWriter):
    """What fails while a file is written is told with what came before: torch.save has an error of its own for it."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            before = "" if error.__context__ is None else f" (after {describe(error.__context__)})"
            raise CheckpointError(f"{describe(error)}{before}") from error


def described(leaves: dict[str, Any]) -> dict[str, str]:
    """What has to be the same on all ranks of a leaf that only one of them writes."""
    plain = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and not is_dtensor(leaf)}
    return dict.fromkeys(leaves, "") | {name: f"{tuple(leaf.shape)} {leaf.dtype}" for name, leaf in plain.items()}


def writer_of(name: str, ranks: Ranks) -> int:
    """The rank that wrote a file and has it in its cache: torch.distributed.checkpoint names them `__{rank}_...`."""
    found = re.match(r"__(\d+)_", name)
    return int(found[1]) if found and int(found[1]) < ranks.world_size else 0


def copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


# -- loading -----------------------------------------------------------------------------------------------------------


def load(
    folder: str | os.PathLike[str],
    state: MutableMapping[str, Any],
    *,
    step: int | None = None,
    group: dist.ProcessGroup | None = None,
    resize: str | None = None,
) -> int | None:
    """Read a checkpoint into `state`, in place; to be called by all ranks of the group, as many as there are now.

    Sizes and checksums of all files, and the names and shapes in `state`, are checked first: if they do not fit, all
    ranks raise and nothing is changed. Only load checkpoints that you trust: Python values are pickled, and whoever can
    write a checksum can write them. What names the tensors, `.metadata`, is read without running code.

    Every tensor of the checkpoint needs a tensor in `state` to go to, cast to its dtype and device, and the other way
    round (torch's optimizers have their tensors after their first step); an entry at the top of `state` may be left
    out. Python values are replaced, dicts and lists of them in place. Besides `state`, a rank holds one tensor of the
    checkpoint at a time, as large as one saving rank's part of it.

    Args:
        folder: of all checkpoints of a run.
        state: as given to `save`.
        step: of the checkpoint; None: the newest complete one.
        group: its ranks read; as in `save`.
        resize: "grow": where `state` has more rows than the checkpoint, the first rows are loaded and the others left
            as they are. None: other shapes are an error. Fewer rows always are.

    Returns:
        The step of the checkpoint, None if there is none.

    Raises:
        CheckpointError: a file is damaged or missing, names or shapes do not fit; with the steps of the other complete
            checkpoints.
        TypeError, ValueError: an argument that does not fit; on the other ranks CheckpointError.
    """
    ranks = Ranks(group)
    with ranks.heard():
        check_path("folder", folder)
        check_state(state)
        if resize is not None:
            check_name("resize", resize, ("grow",))
        if step is not None:
            check_integer("step", step, 0)
    # What the first rank sees counts: another save may be at work.
    steps = ranks.gather(lambda: complete_steps(Path(folder)) if ranks.rank == 0 else {})[0]
    if step is None and not steps:
        return None
    chosen = max(steps) if step is None else step
    path = Path(folder) / steps.get(chosen, name_of(chosen))
    try:
        if chosen not in steps:
            raise CheckpointError("no such checkpoint, or not a complete one")
        read(ranks, path, state, chosen, resize)
    except CheckpointError as error:
        others = ", ".join(str(other) for other in steps if other != chosen) or "none"
        raise CheckpointError(
            f"checkpoint {path} was not loaded: {error} (other complete checkpoints, to be loaded with step=: {others})"
        ) from error
    return chosen


def read(ranks: Ranks, path: Path, state: MutableMapping[str, Any], step: int, resize: str | None) -> None:
    """One checkpoint, on all ranks."""
    reader = dcp.FileSystemReader(path)

    def check_files() -> None:
        files = read_manifest(path, step)
        check_names(path, files)
        largest_first = sorted(files, key=lambda name: (-files[name]["size"], name))
        problems = [problem(path / name, files[name]) for name in largest_first[ranks.rank :: ranks.world_size]]
        if any(problems):
            raise CheckpointError(", ".join(filter(None, problems)))
        if ranks.rank == 0:
            check_metadata(path)

    def check_leaves() -> dict[str, tuple[Any, Any]]:
        places = slots(state)
        check_fit(leaves_at(places), state, reader, resize)
        return places

    def read_leaves() -> None:
        with no_warning():
            dcp.load(
                leaves,
                storage_reader=reader,
                planner=Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )

    ranks.together(check_files)
    places = ranks.together(check_leaves)
    leaves = leaves_at(places)
    ranks.together(read_leaves)
    for key, (container, index) in places.items():
        put(container, index, leaves[key])


class Planner(dcp.DefaultLoadPlanner):
    """Reads the rows that a checkpoint has into tensors that may have more; `check_fit` has looked at the shapes."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        for key, leaf in state_dict.items():
            if isinstance(leaf, Tensor):
                metadata.state_dict_metadata[key].size = leaf.size()  # type: ignore[union-attr]
        super().set_up_planner(state_dict, metadata, is_coordinator)


def check_fit(
    leaves: dict[str, Any], state: Mapping[str, Any], reader: dcp.FileSystemReader, resize: str | None
) -> None:
    """CheckpointError unless leaves and checkpoint have the same names, kinds and, but for more rows, shapes."""
    saved = reader.read_metadata().state_dict_metadata
    asked = [key for key in saved if any(key == top or key.startswith(f"{top}.") for top in state)]
    problems = []
    for key in asked:
        if key not in leaves and not any(key.startswith(f"{part}.") for part in leaves):
            problems.append(f"{key!r} is in the checkpoint and not in state")
    for key, leaf in leaves.items():
        there = saved.get(key)
        below = [name for name in asked if name.startswith(f"{key}.")]
        if below:
            problems.append(
                f"{key!r} has no tensors in state but in the checkpoint, such as {below[0]!r}. An optimizer of "
                "torch's makes them in its first step. Before that, call torch.distributed.checkpoint.state_dict."
                "get_optimizer_state_dict(model, optimizer) and then its state_dict()"
            )
        elif there is None:
            problems.append(f"{key!r} is in state and not in the checkpoint")
        elif isinstance(leaf, Tensor) != isinstance(there, TensorStorageMetadata):
            kinds = ("a tensor", "a Python value") if isinstance(leaf, Tensor) else ("a Python value", "a tensor")
            problems.append(f"{key!r} is {kinds[0]} in state and {kinds[1]} in the checkpoint")
        elif isinstance(leaf, Tensor) and isinstance(there, TensorStorageMetadata):
            ours, theirs = tuple(leaf.shape), tuple(there.size)
            if ours == theirs:
                continue
            grows = bool(ours) and bool(theirs) and ours[1:] == theirs[1:] and ours[0] > theirs[0]
            if not (grows and resize == "grow"):
                hint = ", pass resize='grow' to load the first rows" if grows else ""
                problems.append(f"{key!r} has shape {theirs} in the checkpoint and {ours} in state{hint}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(", ".join(problems[:5]) + more)


def put(container: Any, index: Any, value: Any) -> None:
    """Dicts and lists are filled anew, so that others who hold them see the values."""
    old = container[index]
    if isinstance(old, dict) and isinstance(value, dict):
        old.clear()
        old.update(value)
    elif isinstance(old, list) and isinstance(value, list):
        old[:] = value
    elif not isinstance(value, Tensor):
        container[index] = value


# -- state -------------------------------------------------------------------------------------------------------------


def slots(state: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Where the leaves are, as (container, index): tensors, and parts of the state without any tensor.

    A part without a tensor, such as an optimizer's param_groups, is one leaf, so that it comes back as it was: with
    keys that are no strings, with tuples, with lists of another length.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for index, value in state.items() if isinstance(state, Mapping) else enumerate(state):
        key = f"{prefix}{index}"
        inner = holds_tensors(key, value) and not isinstance(value, Tensor)
        for name, slot in (slots(value, f"{key}.") if inner else {key: (state, index)}).items():
            if name in found:
                raise CheckpointError(f"state has two entries of the name {name!r}")
            found[name] = slot
    return found


def leaves_at(places: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {key: container[index] for key, (container, index) in places.items()}


def holds_tensors(key: str, value: Any) -> bool:
    if hasattr(value, "state_dict"):
        raise CheckpointError(f"{key!r} is a {type(value).__name__}: put its state_dict() into state")
    if isinstance(value, tuple) and any(holds_tensors(key, entry) for entry in value):
        raise CheckpointError(f"{key!r} is a tuple of tensors: make it a list")
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return isinstance(value, Tensor) or any(holds_tensors(key, entry) for entry in inner)


def check_state(state: Any) -> None:
    if not isinstance(state, MutableMapping):
        raise TypeError(f"state must be a dict, got {type(state).__name__}")


@contextmanager
def no_warning() -> Iterator[None]:
    """torch.distributed.checkpoint warns when there is only one process, which is fine here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
