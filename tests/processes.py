"""Ranks for tests: processes with a gloo group that stay for the tests of a file, as starting them takes seconds."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 60.0


class Pool:
    """`pool(function, *args)` calls function(rank, *args) on every rank; the results."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size, self.folder = world_size, folder
        self.started, self.processes, self.pipes = 0, [], []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.started += 1
        for rank in range(self.world_size):
            pipe, end = context.Pipe()
            where = f"file://{self.folder}/meeting_{self.started}"
            process = context.Process(target=serve, args=(rank, self.world_size, where, end), daemon=True)
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
