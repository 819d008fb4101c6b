"""`python -m perf check`: what a step does, counted, versus the counts that are committed.

Nothing is timed, so that a shared machine cannot blur it. On the CPU: operations, flops of products, elements that
other operations pass over, bytes allocated and their peak, in chunks of one size everywhere; for a GPU `step_ops`.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

from perf.counts import step_ops
from perf.providers import make
from perf.providers.base import STEP, WHOLE, Provider
from perf.suite import memory
from perf.suite.problem import Problem

Counts = dict[str, dict[str, int]]  # of each case
PATH = Path(__file__).parent / "counts.json"
SIZES = (Problem(64, 64, 5000), Problem(64, 64, 5000, "bfloat16"), Problem(64, 64, 5000, loss="softmax"))
CASES = (
    ("ours", "no-grad"), ("ours", STEP), ("ours", "frozen W"), ("ours", WHOLE), ("ours-retain", STEP),
    ("ours-in-backward", WHOLE), ("ours-sampled", STEP), ("ours-sampled", WHOLE),
)  # fmt: skip
ON_GPU = "a step on a GPU, "  # before the names of the other cases
# More of any count is a regression; of these, more by that factor, as a small change of them is a choice.
ALLOWED = {"elements": 1.02, "operations": 1.05, "allocated": 1.02, "peak": 1.02}
# Operations that look at no element.
FREE = step_ops.VIEWS - step_ops.WAITING - {"promote_types"} | {"resize_", "unfold"}


def counts() -> Counts:
    """Of every case; those of a GPU where ttsem is installed."""
    found = {}
    for problem, (name, mode) in itertools.product(SIZES, CASES):
        provider = make(name)
        provider.prepare(problem, problem.tensors())
        (provider.head.__dict__ if hasattr(provider, "head") else provider.how)["chunk_bytes"] = 1 << 20
        found[f"{name}, {mode}, {problem.title}"] = count(provider, mode)
    on_gpu = {} if step_ops.missing() else step_ops.counts()
    return found | {ON_GPU + name: each for name, each in on_gpu.items()}


def count(provider: Provider, mode: str) -> dict[str, int]:
    for _ in range(2):  # the first makes what stays
        provider.reset(mode)
        provider.run(mode)
    provider.reset(mode)
    flops = elements = operations = 0
    for event in step_ops.recorded(lambda: provider.run(mode)):
        name = event.name.removeprefix("aten::")
        whole = event.name in memory.PRODUCTS or not event.cpu_children  # others are made of those within them
        if not whole or name == event.name or name in FREE:
            continue
        shapes = [shape for shape in event.input_shapes if shape]
        operations += 1
        if event.name in memory.PRODUCTS:
            (rows, inner), (_, columns) = shapes[0 if name == "mm" else 1 :][:2]
            flops += 2 * rows * inner * columns
        else:
            elements += max((math.prod(shape) for shape in shapes), default=0)
    provider.reset(mode)
    events = memory.allocations(lambda: provider.run(mode), scratch=False)
    provider.reset(mode)
    allocated, peak = sum(event for event in events if event > 0), memory.peak_without(events, 0)
    return {"flops": flops, "elements": elements, "operations": operations, "allocated": allocated, "peak": peak}


def grown(before: Counts, now: Counts) -> list[str]:
    """What became more than is allowed, in words; and cases that one of the two does not have."""
    expected = {case for case in before if not (case.startswith(ON_GPU) and step_ops.missing())}
    found = [f"{case}: not counted any more" for case in expected - now.keys()]
    found += [f"{case}: new" for case in now.keys() - before.keys()]
    for case in before.keys() & now.keys():
        for name, value in now[case].items():
            if value > ALLOWED.get(name, 1.0) * before[case][name]:
                found.append(f"{case}: {name} {before[case][name]:,} -> {value:,}")
    return sorted(found)


def committed() -> Counts:
    return json.loads(PATH.read_text())


def write(found: Counts) -> None:
    """A line a case. Counts of a GPU stay as they are where they cannot be counted."""
    if step_ops.missing():
        found = found | {case: each for case, each in committed().items() if case.startswith(ON_GPU)}
    lines = [f"{json.dumps(case)}: {json.dumps(each)}" for case, each in found.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
