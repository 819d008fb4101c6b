"""Functions run on several real processes, with gloo between them."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """What function(*args) returns on each rank of a new process group; what it raises is raised here."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        arguments = (world_size, os.path.join(folder, "meet"), timeout, results, function, args)
        processes = [context.Process(target=one_rank, args=(rank, *arguments)) for rank in range(world_size)]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        errors: list[str] = []
        end = time.monotonic() + timeout + 60.0
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
