"""What the machine does at best, and the least time that a case can take on it."""

from collections.abc import Callable, Iterable

import torch
from torch.utils.benchmark import Timer

from perf.providers import class_of, split
from perf.providers.base import GRAPHS, STEP, WHOLE
from perf.suite.plans import Case, Row
from perf.suite.problem import SAMPLE_RATE, Problem, matmul_precision

SHAPE, ON_GPU = (1024, 512, 8192), (8192, 4096, 8192)  # N, D, classes: what keeps the device busy for milliseconds


def measure(dtypes: Iterable[str], device: str, hasty: bool = False) -> list[Row]:
    """GEMM rate and copy bandwidth of main memory; a line each."""
    n, d, c = (64, 32, 128) if hasty else ON_GPU if device.startswith("cuda") else SHAPE
    large, budget = (1 << 20, 0.01) if hasty else (1 << 28, 1.0)  # bytes that no cache holds, and seconds
    lines: list[Row] = []
    for name in dtypes:
        dtype = Problem(n, d, c, name).torch_dtype
        a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((n, d), (d, c)))
        product = torch.empty(n, c, dtype=dtype, device=device)
        with matmul_precision(name):
            took = typical(lambda a=a, b=b, product=product: torch.mm(a, b, out=product), budget)
        lines.append({"kind": "GEMM", "dtype": name, "per_second": 2 * n * d * c / took, "unit": "flop"})
    source = torch.ones(large // 4, device=device)
    into = torch.empty_like(source)
    rate = 2 * source.nbytes / typical(lambda: into.copy_(source), budget)
    return [*lines, {"kind": "copy", "dtype": "", "per_second": rate, "unit": "byte"}]


def typical(call: Callable[[], object], budget: float) -> float:
    """Median seconds of a call that is repeated for about `budget` seconds."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=budget).median)


def limit(case: Case, ceilings: Iterable[Row]) -> float | None:
    """About the least seconds of a case: its products at the GEMM's rate or W's traffic at the copy's, the larger.

    One product of the logits, one for each gradient. W is read once a pass; its gradient is written; an update reads
    and writes W and the momentum instead. A sampled step has its part of the classes.
    """
    p, kind, mode = case.problem, class_of(case.provider), GRAPHS.get(case.mode, case.mode)
    part = float(split(case.provider)[1].get("rate", SAMPLE_RATE)) if kind.work == "sampled" else 1.0
    products, passes = {"frozen W": (2, 2), STEP: (3, 3), WHOLE: (3, 5)}.get(mode, (1, 1))
    rates = {(line["kind"], line["dtype"]): line["per_second"] for line in ceilings}
    gemm, copy = rates.get(("GEMM", p.dtype)), rates.get(("copy", ""))
    return part * max(products * p.flops / gemm, passes * p.weight_bytes / copy) if gemm and copy else None
