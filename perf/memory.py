"""Peak memory of one step beyond W, its gradient and the inputs, in a process of its own.

Two measurements, of two steps of the same process:

    rss        how far the resident set grows over what it was before the first step of this size, minus the gradient
               of W. The kernel's count (VmHWM): libraries' own buffers and the allocator's slack are in it.
    profiler   torch.profiler's record of every allocation and free: the peak of their running sum, with the gradient
               of W taken out from the moment it is allocated.

On a GPU both are the allocator's peak. `python -m perf.memory '{...}'` prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch

from perf.problem import Problem
from perf.providers import discover
from perf.providers.base import Provider
from perf.tables import Row, Table
from perf.timing import Say, title

STATUS = Path("/proc/self/status")
NO_GRADIENT = ("forward", "no-grad", "frozen W")


def measure(table: Table, say: Say = print) -> pd.DataFrame:
    """One line per row of the table."""
    lines = []
    for number, row in enumerate(table.rows):
        say(f"{table.name}: {number + 1}/{len(table.rows)} {row.provider}, {row.problem.title}")
        problem = row.problem
        numbers = in_subprocess(row)
        lines.append({
            "table": table.name, "provider": row.provider, "title": title(row.provider), "dtype": problem.dtype,
            "N": problem.n, "D": problem.d, "C": problem.classes, "mode": row.mode, "device": problem.device,
            **numbers,
            "weight_mb": problem.weight_bytes / 1e6, "logits_mb": problem.n * problem.classes * problem.itemsize / 1e6,
        })  # fmt: skip
    return pd.DataFrame(lines)


def in_subprocess(row: Row) -> dict[str, object]:
    """`peaks` of the row in a fresh process; a note instead of numbers where it could not run."""
    found, skipped = discover()
    if row.provider not in found:
        return {"note": "; ".join(f"{file}: {why}" for file, why in skipped.items()) or "no such provider"}
    reason = found[row.provider]().supports(row.problem)
    if reason:
        return {"note": reason}
    order = {"problem": asdict(row.problem), "provider": row.provider, "mode": row.mode,
             "threads": torch.get_num_threads()}  # fmt: skip
    command = [sys.executable, "-m", "perf.memory", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        if row.provider.startswith("ours"):
            raise RuntimeError(f"{row.provider}, {row.problem.title}: {done.stderr}")
        return {"note": f"exit code {done.returncode}: {last}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def peaks(provider_name: str, problem: Problem, mode: str) -> dict[str, float]:
    """Megabytes (10^6) beyond W, its gradient and the inputs, by both measurements."""
    provider = discover().providers[provider_name]
    # Libraries, threads and autograd's machinery first, on a size too small to count.
    small = replace(problem, n=4, d=16, classes=64)
    run(fresh(provider, small), mode)
    large = fresh(provider, problem)
    gc.collect()
    gradient = 0 if mode in NO_GRADIENT else problem.weight_bytes
    if problem.device.startswith("cuda"):
        beyond = device_peak(large, mode) - gradient
        return {"beyond_rss_mb": beyond / 1e6, "beyond_profiler_mb": beyond / 1e6}
    grown = resident_growth(lambda: run(large, mode))
    large.reset(mode)
    events = allocations(lambda: run(large, mode))
    return {"beyond_rss_mb": (grown - gradient) / 1e6, "beyond_profiler_mb": peak_without(events, gradient) / 1e6}


def fresh(provider: type[Provider], problem: Problem) -> Provider:
    made = provider()
    made.prepare(problem, problem.tensors())
    made.reset("forward")
    return made


def run(provider: Provider, mode: str) -> None:
    """One step; gradients stay until the next reset, as they do in training until the optimiser's step."""
    provider.reset(mode)
    loss = provider.run(mode)
    del loss


# -- resident set ------------------------------------------------------------------------------------------------


def resident_growth(call: Callable[[], object]) -> int:
    """Bytes that the peak resident set during `call` lies above the resident set before it."""
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


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (> 0) and free (< 0) of CPU memory during `call`, in order."""
    with (
        quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


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
    run(provider, mode)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    print(json.dumps(peaks(order["provider"], Problem(**order["problem"]), order["mode"])))
