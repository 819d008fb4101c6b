"""What a training step on a GPU costs the CPU: launches, operations of torch, and the time to dispatch them.

ttsem takes the place of the GPU, and no launch runs. An operation counts once, whatever it calls in turn. Where a CPU
does more than a GPU would, it is kept from that: see `as_a_gpu`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import multiprocessing
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch

import tritonmargin as tm
from perf.suite.memory import quiet_stderr
from perf.suite.steps import Loss, OwnMargin, TrainingStep

WAITING = {"item", "is_nonzero", "_local_scalar_dense"}
VIEWS = {
    "view", "_unsafe_view", "view_as", "reshape", "_reshape_alias", "expand", "expand_as", "slice", "select", "narrow",
    "unsqueeze", "squeeze", "t", "T", "mT", "transpose", "permute", "detach", "detach_", "alias", "as_strided",
    "unbind", "split", "chunk", "set_", "lift_fresh", "is_same_size", "is_pinned", "result_type", "promote_types",
    "resolve_conj", "resolve_neg", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
    "_sparse_coo_tensor_unsafe", "_sparse_coo_tensor_with_dims_and_tensors", "sparse_coo_tensor", "_indices", "_values",
    *WAITING,
}  # fmt: skip
POISONED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # ttsem fills what these return
CONVERSIONS = {"to": "aten::_to_copy", "contiguous": "aten::clone"}  # and what they call if something is to be done

N = 64  # samples of every step
CASES: dict[str, tuple[int, Loss]] = {  # classes, and the rest
    "arcface": (256, Loss()),
    "arcface, 4 chunks": (512, Loss(options={"chunk_bytes": 128 * (2 * N + 4)})),  # a class's dL/dz, and a sum of it
    "cosface": (256, Loss(tm.CosFace)),
    "softmax": (256, Loss(tm.Softmax)),
    "arcface, float32 W under autocast": (256, Loss(wide=True)),
    "arcface, a tenth sampled": (2560, Loss(options={"sample_rate": 0.1, "sparse_grad": True})),
    "arcface, RowSGD in backward": (256, Loss(optimizer="momentum")),
    "arcface, a tenth sampled, RowSGD in backward": (2560, Loss(options={"sample_rate": 0.1}, optimizer="momentum")),
    "a user's own margin": (256, Loss(OwnMargin)),
    "arcface, label smoothing 0.1": (256, Loss(options={"label_smoothing": 0.1})),
}


def step_of(case: str, device: str, d: int) -> TrainingStep:
    classes, loss = CASES[case]
    step = TrainingStep(loss, N, d, classes, torch.bfloat16, device)
    step.target %= int(classes * loss.options.get("sample_rate", 1.0))  # those of a sample that nobody drew
    return step


def recorded(step: Callable[[], object]) -> list[Any]:
    """The profiler's events of a step."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with quiet_stderr(), torch.profiler.profile(activities=cpu, record_shapes=True) as record:
        step()
    return list(record.events())


def operations(events: list[Any], poisoned: bool = False) -> Iterator[tuple[str, bool]]:
    """The outermost operations among the events, and whether each starts work on the device: else it is a view."""
    before = ""
    for event in events:
        name = event.name.removeprefix("aten::")
        if poisoned and name == "fill_" and before in POISONED:
            before = ""
            continue
        before = name
        if name == event.name:
            yield from operations(event.cpu_children, poisoned)
        elif name in CONVERSIONS:
            yield name, CONVERSIONS[name] in {child.name for child in event.cpu_children}
        else:
            yield name, name not in VIEWS


@contextlib.contextmanager
def as_a_gpu(launched: list[Any]) -> Iterator[None]:
    """Inside, what the library does on a GPU alone: labels are not looked at, a launch is an entry of the list.

    None runs. A sample that nobody drew is the first classes.
    """
    from perf.kernels.cases import launching
    from tritonmargin import checks
    from tritonmargin.optim import row_optimizer

    def launch(kernel: Any, *args: Any, **_: Any) -> None:
        launched.append(kernel)
        if kernel.fn.__name__ == "candidates_kernel":
            drawn = np.arange(len(args[1]))
            ctypes.memmove(args[1].data_ptr(), drawn.ctypes.data, args[1].nbytes)

    def unseen(device: torch.device) -> bool:  # not a Mock that returns it: those take the CPU microseconds
        return False

    def product(out: torch.Tensor, p: torch.Tensor, *_: Any) -> None:
        p.t()
        out.zero_()  # one operation, as on a GPU: a CPU has no product of 16 bits that is summed in float32

    with contextlib.ExitStack() as patches:
        for module in (checks, row_optimizer):
            patches.enter_context(mock.patch.object(module, "looks_at_values", unseen))
        patches.enter_context(launching(launch, product))
        patches.enter_context(tm.use_backend("triton"))
        yield


def count_all() -> dict[str, dict[str, int]]:
    from perf.kernels.ttsem import played

    def is_gpu(device: object) -> bool:  # ttsem's own prints whatever it looks at, tensors too
        return isinstance(device, str | torch.device) and str(device).startswith("cuda")

    found, launched, looking = {}, [], mock.patch("ttsem.sanitize._is_cuda", is_gpu)
    with played(90), looking, as_a_gpu(launched):
        for name in CASES:
            step = step_of(name, "cuda", 512)
            step()
            launched.clear()
            made = list(operations([event for event in recorded(step) if event.cpu_parent is None], poisoned=True))
            device = sum(works for _, works in made)
            found[name] = {"launches": len(launched), "device": device, "views": len(made) - device}
    return found


def counts() -> dict[str, dict[str, int]]:
    """Of every case, in a process of its own, as some of ttsem's answers stay in torch.cuda."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(count_all)


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Inside, steps on CPU tensors are planned and dispatched as on an H100, without ttsem and without a launch."""
    from perf.kernels.cases import on
    from perf.kernels.gpus import GPUS

    with on(GPUS["sm_90"]), as_a_gpu([]):
        yield


def host_time(case: str) -> int:
    """Microseconds of a step whose launches are stubbed, on so few numbers that little but dispatching is left."""
    with stubbed():
        times = timeit.repeat(step_of(case, "cpu", 16), number=1, repeat=300, timer=time.thread_time)
    return round(1e6 * min(times))


def table() -> pd.DataFrame:
    return pd.DataFrame([{"step": name, **each, "host_us": host_time(name)} for name, each in counts().items()])


def missing() -> str:
    """Why steps on a GPU cannot be counted; empty if they can."""
    from perf.kernels.ttsem import MISSING

    if importlib.util.find_spec("ttsem") and importlib.util.find_spec("triton"):
        return ""
    return f"steps on a GPU are not counted: {MISSING}"
