"""Peak memory of one step, in the process that runs it.

Two measurements:

    rss        how far the resident set grows over what it was before the step. The kernel's count (VmHWM): libraries'
               own buffers and the allocator's slack are in it.
    profiler   torch.profiler's record of every allocation and free: the peak of their running sum; and the same with
               the gradient of W taken out from the moment it is allocated.

On a GPU both are the allocator's peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from perf.providers.base import Provider

STATUS = Path("/proc/self/status")
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # and where their two operands begin


def peak(provider: Provider, mode: str) -> dict[str, float]:
    """Megabytes (10^6) of one step: `peak_mb` beyond W, its state and the inputs, `beyond_mb` without dW as well."""
    gradient = provider.gradient_bytes(mode)
    provider.reset(mode)
    if provider.problem.device.startswith("cuda"):
        most = device_peak(provider, mode)
        return {"peak_mb": most / 1e6, "beyond_mb": (most - gradient) / 1e6}
    events = allocations(lambda: provider.run(mode))
    provider.reset(mode)
    return {"peak_mb": peak_without(events, 0) / 1e6, "beyond_mb": peak_without(events, gradient) / 1e6}


# -- resident set ------------------------------------------------------------------------------------------------


def resident_growth(call: Callable[[], object]) -> int:
    """Bytes that the peak resident set during `call` lies above the resident set before it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back first
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from here
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before, 0)


def resident(name: str) -> int:
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        raise RuntimeError("the resident set is read from /proc/self/status, which this system does not have") from None


# -- the profiler's record ---------------------------------------------------------------------------------------


def allocations(call: Callable[[], object], scratch: bool = True) -> list[int]:
    """Bytes of every allocation (> 0) and free (< 0) of CPU memory during `call`, in order.

    Without `scratch`, what a product allocates and frees within itself is left out: a CPU without bfloat16 products
    keeps its sums in a float32 copy of the result, another does not.
    """
    with (
        quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    memory = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    if not scratch:
        for start, end in [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in PRODUCTS]:
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
    if gradient:
        places = [place for place, size in enumerate(changes) if size == gradient]
        if places:
            changes[places[-1]] = 0
    held = most = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side writes to stderr when it starts and stops."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def device_peak(provider: Provider, mode: str) -> int:
    """Bytes that the GPU's allocator held at the peak of a step, above what it held before."""
    device = provider.problem.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    provider.run(mode)
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device) - before
    provider.reset(mode)
    return most
