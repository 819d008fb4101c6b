"""Functions run on several real processes, with gloo between them.

They are forked from a process that has imported what they need and computed nothing: to import it takes seconds.
"""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# What ranks import when they first need it, too. Those that are missing are passed over.
USED = ["tritonmargin.checkpoint", "tritonmargin.distributed.shard", "torch._dynamo", "torch.distributed.fsdp"]
CONTEXT.set_forkserver_preload(["tritonmargin", *USED, "pytest", "examples.glyphs.partial_fc"])
SECONDS = 60.0
WORLD = 4  # ranks of the fixture `pool`
D = 5


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = SECONDS) -> list[Any]:
    """What function(*args) returns on each rank of a new process group; what it raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        results = CONTEXT.SimpleQueue()
        arguments = (world_size, os.path.join(folder, "meet"), timeout, results, function, args)
        processes = [CONTEXT.Process(target=one_rank, args=(rank, *arguments)) for rank in range(world_size)]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        errors: list[str] = []
        end = time.monotonic() + timeout + SECONDS
        # A rank that has a lot to say waits until it is read.
        while any(process.is_alive() for process in processes) or not results.empty():
            if not results.empty():
                rank, value, error = results.get()
                found[rank] = value
                errors += [f"rank {rank}: {error}"] if error else []
            elif time.monotonic() > end:
                errors.append("a rank hangs")
                for process in processes:
                    process.kill()
                break
            else:
                time.sleep(0.02)
        assert not errors, "\n".join(errors)
        return [found.get(rank) for rank in range(world_size)]


@functools.cache
def first_ranks(count: int) -> dist.ProcessGroup:
    """A group of the first ranks; made by all of them, in the same order."""
    return dist.new_group(list(range(count)))


def matrix(c: int, seed: int) -> torch.Tensor:  # [C, D]
    """The same on every rank."""
    return torch.randn(c, D, generator=torch.Generator().manual_seed(seed), device="cpu")


def names(folder: Path | str) -> list[str]:
    return sorted(os.listdir(folder))


def one_rank(
    rank: int, world_size: int, meeting: str, timeout: float, results: Any, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Pool:
    """Ranks that stay for the tests of a file: `pool(function, *args)` is function(rank, *args) of each rank."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size, self.folder = world_size, folder
        self.started, self.processes, self.pipes = 0, [], []

    def start(self) -> None:
        self.started += 1
        for rank in range(self.world_size):
            pipe, end = CONTEXT.Pipe()
            where = f"file://{self.folder}/meeting_{self.started}"
            process = CONTEXT.Process(target=serve, args=(rank, self.world_size, where, end), daemon=True)
            process.start()
            end.close()
            self.processes.append(process)
            self.pipes.append(pipe)

    def __call__(self, function, *args, may_die: tuple[int, ...] = ()) -> list:
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results, failures = [None] * self.world_size, []
        waiting = dict(zip(self.pipes, range(self.world_size), strict=True))
        while waiting:
            # When one has failed, the others may wait for it.
            ready = multiprocessing.connection.wait(list(waiting), 2.0 if failures else SECONDS)
            if not ready:
                failures += [f"rank {rank}: no answer" for rank in waiting.values()]
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    results[rank], failure = pipe.recv()
                except (EOFError, ConnectionError):
                    failure = None if rank in may_die else "died"
                failures += [f"rank {rank}: {failure}"] if failure else []
        if failures or may_die:
            self.stop()
        assert not failures, "\n".join(failures)
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def serve(rank: int, world_size: int, where: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((function(rank, *args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
