"""A provider's own process: it prepares one size under a memory limit, and runs what it is told to.

On a GPU several steps are enqueued before the first is waited for (a backlog), with a CUDA event around each. A step so
takes the larger of the CPU's time, which launches it, and of the GPU's: as in training. A CUDA graph is one launch.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import pkgutil
import statistics
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch

from perf import providers
from perf.providers.base import GRAPHS, Provider
from perf.suite import accuracy, memory
from perf.suite.problem import Problem, matmul_precision

BACKLOG = 0.1  # seconds of work that are enqueued together
FEWEST, MOST, LONG = 3, 20, 0.5  # steps of a backlog; one alone where it takes so many seconds


@functools.cache
def context() -> Any:
    """Processes that start in milliseconds: forked from one that has imported everything and computed nothing."""
    # torch.cuda.is_available() must not start CUDA in the process that is forked: its children could not use it then.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    found = multiprocessing.get_context("forkserver")
    names = [f"perf.providers.{module.name}" for module in pkgutil.iter_modules(providers.__path__)]
    others = ["torch._dynamo", "triton", "pytorch_metric_learning.losses"]  # what is not installed is passed over
    found.set_forkserver_preload(["perf.suite.worker", *names, *others])
    return found


class Failed(RuntimeError):
    """What a worker could not do, in a line."""


class Worker:
    """The process, seen from the one that measures. After it died, `alive` is False."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.pipe, end = context().Pipe()
        self.process = context().Process(target=serve, args=(end, name, threads, providers.class_of(name).source))
        self.process.start()
        end.close()
        self.alive = True

    def ask(self, command: str, *arguments: Any, timeout: float | None = None) -> Any:
        """The answer to a command, or Failed; a process that takes longer than `timeout` seconds is stopped."""
        self.tell(command, *arguments)
        return self.answer(timeout)

    def tell(self, command: str, *arguments: Any) -> None:
        if not self.alive:
            raise Failed("its process is gone")
        with contextlib.suppress(ConnectionError):  # `answer` says that it died
            self.pipe.send((command, arguments))

    def answer(self, timeout: float | None = None) -> Any:
        try:
            if not self.pipe.poll(timeout):
                self.stop()
                raise Failed(f"stopped after {timeout:.0f} s")
            good, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.stop()
            raise Failed(f"its process died (exit code {self.process.exitcode})") from None
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


def serve(pipe: Connection, name: str, threads: int, source: str) -> None:
    """Answer (whether it went well, answer or reason) until the pipe is closed."""
    torch.set_num_threads(threads)
    if source:
        providers.load_file(source)
    desk, problem = Desk(name), Problem(1, 1, 1)
    while True:
        try:
            command, arguments = pipe.recv()
        except (EOFError, ConnectionError, KeyboardInterrupt):
            return
        try:
            problem = next((each for each in arguments if isinstance(each, Problem)), problem)
            if not problem.on_gpu:  # CUDA maps far more memory than it uses
                memory.limit_memory()
            with matmul_precision(problem.dtype):
                answer = True, getattr(desk, command)(*arguments)
        except KeyboardInterrupt:
            return
        except Exception as error:
            answer = False, in_a_line(error)
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
            gc.collect()
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()  # nothing on a CPU
        pipe.send(answer)


def in_a_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    if "can't allocate memory" in text[0] or isinstance(error, MemoryError) or "out of memory" in text[0]:
        return "out of memory: " + text[0].rpartition("DefaultCPUAllocator: ")[2][:120]
    return f"{type(error).__name__}: {text[0][:200]}"


class Desk:
    """What a worker can be asked."""

    provider: Provider

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: dict[str, tuple[Callable[[], object], int]] = {}  # on a GPU: a mode's step, and how many together
        self.cold = False  # whether the GPU's memory was given back after the last step

    def fresh(self, problem: Problem, files: tuple[str, ...]) -> Provider:
        provider = providers.make(self.name)
        opened = [memory.tensor_of(path, problem.torch_dtype, problem.classes, problem.d) for path in files]
        provider.prepare(problem, problem.tensors(*opened))
        return provider

    def ahead(self, problem: Problem, modes: list[str]) -> None:
        """On a GPU: compile what the check and the steps will need."""
        for size in (accuracy.small(problem), problem):
            provider = self.fresh(size, ())
            for mode in dict.fromkeys(GRAPHS.get(mode, mode) for mode in modes):
                provider.reset(mode)
                provider.run(mode)
            del provider
            gc.collect()
            torch.cuda.empty_cache()

    def check(self, problem: Problem, files: tuple[str, ...]) -> dict[str, float]:
        """Its errors at `accuracy.small(problem)`; the files are of that size."""
        return accuracy.errors(self.fresh(problem, files), problem)

    def supports(self, problem: Problem) -> str:
        return providers.make(self.name).supports(problem)

    def prepare(self, problem: Problem, files: tuple[str, ...]) -> None:
        self.provider = self.fresh(problem, files)

    def step(self, mode: str) -> tuple[float, float]:
        """Seconds and loss."""
        provider, plain = self.provider, GRAPHS.get(mode, mode)
        provider.reset(plain)
        gc.disable()
        try:
            if provider.problem.on_gpu:
                took, result = self.steps_on_gpu(mode)
            else:
                begin = time.perf_counter()
                result = provider.run(mode)
                took = time.perf_counter() - begin
        finally:
            gc.enable()
        loss = float(result.detach()) if result.ndim == 0 else float("nan")
        provider.reset(plain)
        return took, loss

    def steps_on_gpu(self, mode: str) -> tuple[float, object]:
        """The median of several steps, none of which is waited for; and the last one's result."""
        provider, device, plain = self.provider, self.provider.problem.device, GRAPHS.get(mode, mode)

        def launched() -> object:
            provider.reset(plain)
            return provider.run(plain)

        if mode not in self.calls:  # its first step: what it compiles is not measured
            self.calls.clear()  # a graph's memory is its own as long as it exists
            call = captured(launched) if mode in GRAPHS else launched
            call()
            self.calls[mode] = call, backlog_length(backlog(call, device, 1)[0][0])
        call, count = self.calls[mode]
        if self.cold:
            call()
        times, result = backlog(call, device, count)
        # Others need the GPU's memory too: what the allocator only holds in reserve goes back if it is much.
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        self.cold = spare > torch.cuda.mem_get_info(device)[1] / 16
        if self.cold:
            torch.cuda.empty_cache()
        return statistics.median(times), result

    def peak(self, mode: str) -> dict[str, float]:
        return memory.peak(self.provider, mode)


def backlog(call: Callable[[], object], device: str, count: int) -> tuple[list[float], object]:
    """Seconds of each of `count` calls on a GPU, none of which is waited for; and what the last returned."""
    torch.cuda.synchronize(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        result = call()
        mark.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairwise(marks)], result


def backlog_length(took: float) -> int:
    """How many steps of `took` seconds to enqueue together."""
    return 1 if took > LONG else max(FEWEST, min(MOST, int(BACKLOG / max(took, 1e-9))))


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A call that replays `step` from a CUDA graph, and returns what the captured one returned.

    It runs beside the default stream first, so that kernels are compiled and buffers made before they are captured.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> object:
        graph.replay()
        return result

    return replay
