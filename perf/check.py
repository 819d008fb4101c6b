"""`python -m perf check`: what a step does, counted, beside the counts that are committed.

Nothing is timed, so a shared machine cannot blur it: operations, flops of products, elements that elementwise
operations and reductions pass over, bytes allocated and their peak. The same on every machine: the chunk is fixed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import torch

from perf import peaks
from perf.problem import Problem
from perf.providers import make
from perf.providers.base import STEP, WHOLE, Provider

PATH = Path(__file__).parent / "counts.json"
CHUNK_BYTES = 1 << 20
SIZES = (Problem(64, 64, 5000), Problem(64, 64, 5000, "bfloat16"), Problem(64, 64, 5000, loss="softmax"))
CASES = (
    ("ours", "no-grad"), ("ours", STEP), ("ours", "frozen W"), ("ours", WHOLE), ("ours-retain", STEP),
    ("ours-in-backward", WHOLE), ("ours-sampled", STEP), ("ours-sampled", WHOLE),
)  # fmt: skip
# More of any of these by that factor is a regression. Products are exact; a small change of the others is a choice.
ALLOWED = {"flops": 1.0, "elements": 1.02, "operations": 1.05, "allocated": 1.02, "peak": 1.02}
# What looks at no element.
FREE = {"view", "t", "transpose", "slice", "select", "expand", "detach", "detach_", "unsqueeze", "squeeze", "alias",
        "narrow", "as_strided", "empty", "empty_like", "empty_strided", "resize_", "lift_fresh", "_unsafe_view",
        "reshape", "set_", "unfold", "unbind", "result_type", "resolve_conj", "resolve_neg", "_indices",
        "_values"}  # fmt: skip


def counts() -> dict[str, dict[str, int]]:
    """Of every case, on the CPU."""
    found = {}
    with mock.patch("tritonmargin.walk.cache_bytes", return_value=CHUNK_BYTES):
        for problem in SIZES:
            for name, mode in CASES:
                provider = make(name)
                provider.prepare(problem, problem.tensors())
                found[f"{name}, {mode}, {problem.title}"] = count(provider, mode)
    return found


def count(provider: Provider, mode: str) -> dict[str, int]:
    for _ in range(2):  # the first makes what stays
        provider.reset(mode)
        provider.run(mode)
    provider.reset(mode)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with peaks.quiet_stderr(), torch.profiler.profile(activities=cpu, record_shapes=True) as record:
        provider.run(mode)
    provider.reset(mode)
    flops = elements = operations = 0
    for event in record.events():
        name = event.name.removeprefix("aten::")
        whole = event.name in peaks.PRODUCTS or not event.cpu_children  # others are made of those within them
        if not whole or name == event.name or name in FREE:
            continue
        shapes = [shape for shape in event.input_shapes if shape]
        operations += 1
        if event.name in peaks.PRODUCTS:
            (rows, inner), (_, columns) = shapes[peaks.PRODUCTS[event.name] :][:2]
            flops += 2 * rows * inner * columns
        else:
            elements += max((math.prod(shape) for shape in shapes), default=0)
    events = peaks.allocations(lambda: provider.run(mode), scratch=False)
    provider.reset(mode)
    return {
        "flops": flops,
        "elements": elements,
        "operations": operations,
        "allocated": sum(event for event in events if event > 0),
        "peak": peaks.peak_without(events, 0),
    }


def grown(before: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """What became more than is allowed, in words; and cases that one of the two does not have."""
    said = [f"{case}: not counted any more" for case in before if case not in now]
    for case, found in now.items():
        if case not in before:
            said.append(f"{case}: new")
            continue
        for name, value in found.items():
            if value > ALLOWED[name] * before[case][name]:
                said.append(f"{case}: {name} {before[case][name]:,} -> {value:,}")
    return said


def committed() -> dict[str, dict[str, int]]:
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(found: dict[str, dict[str, int]]) -> None:
    PATH.write_text(json.dumps(found, indent=1) + "\n")
