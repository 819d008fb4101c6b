"""Memory: what is free, a limit that the kernel enforces, buffers that processes share, and the peak of a step.

The peak is that of the running sum of allocations and frees: torch.profiler's record of them on a CPU, the allocator's
own count on a GPU.
"""

import contextlib
import itertools
import math
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from perf.providers.base import Provider
from perf.suite.machine import memory_bytes

RESERVE = 1 << 30  # bytes that are never given away: this process, the system, the page cache of the moment
CGROUP = Path("/sys/fs/cgroup")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


def field(path: Path, name: str, unit: int = 1024) -> int:
    """Bytes that a file of `name: number` lines says; 0 if it is not there."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:?\s+(\d+)", path.read_text(), re.MULTILINE)
        return int(found[1]) * unit if found else 0
    return 0


def available_bytes() -> int:
    """Memory that can still be had, in this machine or container."""
    free = field(Path("/proc/meminfo"), "MemAvailable") or memory_bytes() // 2
    with contextlib.suppress(OSError, ValueError):
        most, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - used + field(CGROUP / "memory.stat", "inactive_file", unit=1))
    return free


def limit_memory() -> None:
    """Let this process allocate what is free now and no more; beyond it, allocations fail."""
    left, held = max(available_bytes() - RESERVE, RESERVE // 4), field(Path("/proc/self/status"), "VmData")
    if held:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = held + left if hard == resource.RLIM_INFINITY else min(held + left, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextlib.contextmanager
def file_of(size: int) -> Iterator[str]:
    """The path of a file of `size` bytes, for this process and those that it starts.

    A file in memory (memfd) has no name and no limit of its own, and goes when its last user goes.
    """
    with open(os.memfd_create("tritonmargin-perf"), "wb") as file:
        file.truncate(size)
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


def tensor_of(path: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def peak(provider: Provider, mode: str) -> dict[str, float]:
    """Megabytes (10^6) of one step: `peak_mb` beyond W, its state and the inputs, `beyond_mb` without dW as well."""
    gradient, device = provider.gradient_bytes(mode), provider.problem.device
    provider.reset(mode)
    if provider.problem.on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        provider.run(mode)
        most = torch.cuda.max_memory_allocated(device) - before
        without = most - gradient
    else:
        events = allocations(lambda: provider.run(mode))
        most, without = peak_without(events, 0), peak_without(events, gradient)
    provider.reset(mode)
    return {"peak_mb": most / 1e6, "beyond_mb": without / 1e6}


def allocations(call: Callable[[], object], scratch: bool = True) -> list[int]:
    """Bytes of every allocation (> 0) and free (< 0) of CPU memory during `call`, in order.

    Without `scratch`, what a product allocates and frees within itself is left out: a CPU without bfloat16 products
    keeps its sums in a float32 copy of the result, another does not.
    """
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with quiet_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    products = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in PRODUCTS]
    for start, end in [] if scratch else products:
        within = [entry for entry in memory if start <= entry[0] <= end]
        for free in [entry for entry in within if entry[1] < 0]:
            made = next((entry for entry in within if entry[1] == -free[1]), None)
            if made in memory:
                memory.remove(made)
                memory.remove(free)
    return [size for _, size in memory]


def peak_without(events: Iterable[int], gradient: int) -> int:
    """The peak of the running sum, where the last allocation of the gradient's size does not count: that is it."""
    changes = list(events)
    if gradient and gradient in changes:
        changes[len(changes) - 1 - changes[::-1].index(gradient)] = 0
    return max(0, *itertools.accumulate(changes, initial=0))


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side writes to stderr when it starts and stops."""
    before = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
