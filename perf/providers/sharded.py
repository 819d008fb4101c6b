"""tritonmargin with its classes sharded over processes on this machine (gloo)."""

from __future__ import annotations

import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

import tritonmargin as tm
from perf import limits, shared
from perf.problem import MOMENTUM, Problem, Tensors
from perf.processes import context
from perf.providers.base import STEP, WHOLE, Gradients, Provider
from perf.providers.ours import Head, head_of
from tritonmargin.parallel import shard_range


class OneRank(Head):
    """What every rank runs: its share of the batch, its range of the classes."""

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        group = dist.group.WORLD
        rank, ranks = dist.get_rank(), dist.get_world_size()
        start, stop = shard_range(problem.classes, rank, ranks)
        own = Tensors(
            tensors.x.detach()[rank::ranks].clone().requires_grad_(),
            tensors.weight.detach()[start:stop],
            tensors.target[rank::ranks],
            None if tensors.momentum is None else tensors.momentum[start:stop],
        )
        Provider.prepare(self, problem, own)
        self.head = head_of(problem, own.weight, process_group=group, gradient_for="sum")
        self.weight = self.head.weight
        self.rows = tm.optim.RowSGD([self.weight], lr=0.0, momentum=MOMENTUM, state_dtype=problem.torch_dtype)
        if own.momentum is not None:
            self.rows.state[self.weight] = {"step": torch.tensor(0), "momentum_buffer": own.momentum}
        self.in_backward = False


class Sharded(Provider):
    """This process is the first rank; the others run the same steps when told to."""

    name, losses = "ours-sharded", OneRank.losses
    title = "tritonmargin, classes sharded over gloo processes (memory: of the first)"
    modes = ("no-grad", "forward", STEP, WHOLE)
    options: ClassVar = {"ranks": 2}

    def supports(self, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return "only measured on CPUs"
        return super().supports(problem)

    def prepare(self, problem: Problem, tensors: Tensors) -> None:
        super().prepare(problem, tensors)
        ranks = int(self.chosen["ranks"])
        threads = max(torch.get_num_threads() // ranks, 1)
        self.folder = tempfile.TemporaryDirectory()
        meeting = f"file://{Path(self.folder.name) / 'meeting'}"
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(1, ranks):
            pipe, end = context().Pipe()
            process = context().Process(
                target=serve, args=(end, rank, ranks, meeting, threads, problem, tensors.files), daemon=True
            )
            process.start()
            end.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        torch.set_num_threads(threads)
        join(0, ranks, meeting)
        self.first = OneRank()
        self.first.prepare(problem, tensors)

    def gradient_bytes(self, mode: str) -> int:
        return self.first.weight.nbytes if mode == STEP else 0

    def forward(self) -> Tensor:
        raise NotImplementedError

    def everyone(self, command: str, mode: str) -> None:
        for pipe in self.pipes:
            pipe.send((command, mode))

    def reset(self, mode: str) -> None:
        self.everyone("reset", mode)
        self.first.reset(mode)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, mode: str) -> Tensor:
        self.everyone("run", mode)
        loss = self.first.run(mode)
        for pipe in self.pipes:
            pipe.recv()
        return loss

    def gradients(self) -> Gradients:
        self.reset(STEP)
        loss = self.run(STEP)
        self.everyone("gradients", STEP)
        parts = [(self.first.x.grad, self.first.weight.grad), *(pipe.recv() for pipe in self.pipes)]
        x = torch.empty_like(self.x)
        for rank, (part, _) in enumerate(parts):
            x[rank :: len(parts)] = torch.as_tensor(part).to(x.dtype)
        return Gradients(loss, x, torch.cat([torch.as_tensor(rows).to(x.dtype) for _, rows in parts]), None)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(2.0)
            process.kill()
        dist.destroy_process_group()
        self.folder.cleanup()


def join(rank: int, ranks: int, meeting: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)


def serve(
    pipe: Connection, rank: int, ranks: int, meeting: str, threads: int, problem: Problem, files: tuple[str, ...]
) -> None:
    """Another rank, until its pipe is closed."""
    torch.set_num_threads(threads)
    limits.limit_memory()
    join(rank, ranks, meeting)
    shape = problem.classes, problem.d
    opened = [shared.tensor_of(path, problem.torch_dtype, *shape) for path in files]
    own = OneRank()
    own.prepare(problem, problem.tensors(0, *opened))
    while True:
        try:
            command, mode = pipe.recv()
        except EOFError:
            return
        answer: Any = None
        if command == "reset":
            own.reset(mode)
        elif command == "run":
            own.run(mode)
        else:
            assert own.x.grad is not None
            assert own.weight.grad is not None
            answer = own.x.grad.float().numpy(), own.weight.grad.float().numpy()
        pipe.send(answer)


PROVIDERS = (Sharded,)
