"""The time of a step on a GPU.

Several steps are enqueued before the first is waited for (a backlog), with a CUDA event around each. A step so
takes the larger of the CPU's time, which launches it, and of the GPU's: as in training. A CUDA graph is one launch.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

BACKLOG = 0.1  # seconds of work that are enqueued together
FEWEST, MOST, LONG = 3, 20, 0.5  # steps of a backlog; one alone where it takes so many seconds


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
