"""The time of one call on any device.

The clocks are those of torch.utils.benchmark, whose timers run a statement at least three times for one number: too
often for steps of seconds, and codes that take turns call by call cannot be given to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronise(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: str = "cpu") -> tuple[float, object]:
    """How long `call` takes, by events on a GPU; and what it returned."""
    synchronise(device)
    if device.startswith("cuda"):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        stop.record()
        synchronise(device)
        return start.elapsed_time(stop) / 1e3, result
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result
