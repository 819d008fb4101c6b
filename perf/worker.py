"""A case's own process: it prepares one provider at one size, under a memory limit, and runs what it is told to."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from perf import correct, limits, peaks, shared
from perf.clock import seconds
from perf.problem import Problem
from perf.processes import context
from perf.providers import make
from perf.providers.base import Provider


class Failed(RuntimeError):
    """What a worker could not do, in a line."""


class Worker:
    """The process, seen from the one that measures. `ask` raises Failed; after it died, `alive` is False."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.pipe, end = context().Pipe()
        self.process = context().Process(target=serve, args=(end, name, threads))
        self.process.start()
        end.close()
        self.alive = True

    def ask(self, command: str, *arguments: Any, timeout: float | None = None) -> Any:
        """The answer to a command; a process that takes longer than `timeout` seconds is stopped."""
        if not self.alive:
            raise Failed("its process is gone")
        try:
            self.pipe.send((command, arguments))
            if not self.pipe.poll(timeout):
                self.stop()
                raise Failed(f"stopped after {timeout:.0f} s")
            good, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.stop()
            code = self.process.exitcode
            raise Failed(f"its process died (exit code {code})") from None
        if not good:
            raise Failed(answer)
        return answer

    def stop(self) -> None:
        self.alive = False
        self.pipe.close()
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve(pipe: Connection, name: str, threads: int) -> None:
    """Answer (whether it went well, answer or reason) until the pipe is closed."""
    torch.set_num_threads(threads)
    device = "cpu"
    desk = Desk(name)
    while True:
        try:
            command, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            desk.close()
            return
        try:
            device = next((each.device for each in arguments if isinstance(each, Problem)), device)
            if device == "cpu":  # CUDA maps far more memory than it uses
                limits.limit_memory()
            answer = True, getattr(desk, command)(*arguments)
        except KeyboardInterrupt:
            return
        except Exception as error:
            answer = False, in_a_line(error)
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
            gc.collect()
        pipe.send(answer)


def in_a_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    if "can't allocate memory" in text[0] or isinstance(error, MemoryError) or "out of memory" in text[0]:
        return "out of memory: " + text[0].rpartition("DefaultCPUAllocator: ")[2][:120]
    return f"{type(error).__name__}: {text[0][:200]}"


def touch(tensor: torch.Tensor) -> None:
    """So that a shared file's pages are this process's own before they would be counted."""
    tensor.detach().sum()


class Desk:
    """What a worker can be asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.provider: Provider | None = None

    @property
    def ready(self) -> Provider:
        assert self.provider is not None
        return self.provider

    def supports(self, problem: Problem) -> str | None:
        return make(self.name).supports(problem)

    def check(self, problem: Problem, files: tuple[str, ...]) -> dict[str, float]:
        """Its errors at `correct.small(problem)`; the files are of that size."""
        provider = self.fresh(problem, files)
        try:
            return correct.errors(provider, problem)
        finally:
            provider.close()

    def prepare(self, problem: Problem, files: tuple[str, ...]) -> None:
        self.provider = self.fresh(problem, files)
        touch(self.provider.weight)

    def hold_state(self) -> None:
        """Of the optimiser: only a step that updates needs the memory."""
        if self.ready.momentum is not None:
            touch(self.ready.momentum)

    def fresh(self, problem: Problem, files: tuple[str, ...]) -> Provider:
        provider = make(self.name)
        opened = [shared.tensor_of(path, problem.torch_dtype, problem.classes, problem.d) for path in files]
        provider.prepare(problem, problem.tensors(0, *opened)._replace(files=files))
        return provider

    def step(self, mode: str) -> tuple[float, float]:
        """Seconds and loss."""
        provider = self.ready
        provider.reset(mode)
        gc.disable()
        try:
            took, result = seconds(lambda: provider.run(mode), provider.problem.device)
        finally:
            gc.enable()
        assert isinstance(result, torch.Tensor)
        loss = float(result.detach()) if result.ndim == 0 else float("nan")
        provider.reset(mode)
        return took, loss

    def first(self, mode: str) -> tuple[float, float, float]:
        """Seconds, loss, and the megabytes by which the resident set grew."""
        found: list[tuple[float, float]] = []
        call: Callable[[], None] = lambda: found.append(self.step(mode))  # noqa: E731
        grown = 0 if self.ready.problem.device.startswith("cuda") else peaks.resident_growth(call)
        if not found:
            call()
        return *found[0], grown / 1e6

    def peak(self, mode: str) -> dict[str, float]:
        return peaks.peak(self.ready, mode)

    def close(self) -> None:
        if self.provider is not None:
            self.provider.close()
