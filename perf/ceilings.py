"""What the machine does at best, and the least time that a case can take on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from perf.grid import Case
from perf.measure import Row
from perf.problem import SAMPLE_RATE
from perf.providers import class_of, split
from perf.providers.base import STEP, WHOLE
from perf.rates import typical

SHAPE, TILE = (1024, 512, 8192), (64, 4096)  # N, D, classes of a product and a tile of exp that a CPU's cache holds
ON_GPU = (8192, 4096, 8192), (8192, 8192)  # what keeps a GPU busy for longer than it takes to launch it
LARGE = 1 << 28  # bytes of a buffer that no cache holds


def measure(dtypes: Iterable[str], device: str, hasty: bool = False) -> list[Row]:
    """GEMM rate, copy bandwidth of main memory, exp rate (in a CPU's cache); a line each."""
    (n, d, c), tile_shape = ON_GPU if device.startswith("cuda") else (SHAPE, TILE)
    if hasty:
        n, d, c = 64, 32, 128
    large, budget = (1 << 20, 0.01) if hasty else (LARGE, 1.0)
    lines: list[Row] = []
    for name in dtypes:
        dtype = getattr(torch, name)
        a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((n, d), (d, c)))
        product, tile = torch.empty(n, c, dtype=dtype, device=device), torch.randn(tile_shape, device=device).to(dtype)
        to = torch.empty_like(tile)
        flops = 2 * n * d * c / typical(lambda a=a, b=b, product=product: torch.mm(a, b, out=product), device, budget)
        exps = tile.numel() / typical(lambda tile=tile, to=to: torch.exp2(tile, out=to), device, budget)
        lines += [
            {"kind": "GEMM", "dtype": name, "per_second": flops, "unit": "flop"},
            {"kind": "exp", "dtype": name, "per_second": exps, "unit": "element"},
        ]
    source = torch.ones(large // 4, device=device)
    into = torch.empty_like(source)
    rate = 2 * source.nbytes / typical(lambda: into.copy_(source), device, budget)
    return [*lines, {"kind": "copy", "dtype": "", "per_second": rate, "unit": "byte"}]


class Needed(NamedTuple):
    flops: float
    bytes: float


def needed(case: Case) -> Needed:
    """Flops and bytes of main memory that the work needs, however it is written.

    One product of the logits, one for each gradient. W is read once a walk; its gradient is written; an update reads
    and writes W and the momentum instead. A sampled step has its part of the classes.
    """
    p, kind = case.problem, class_of(case.provider)
    part = 1.0
    if kind is not None and kind.work == "sampled":
        part = float(split(case.provider)[1].get("rate", SAMPLE_RATE))
    products = {"no-grad": 1, "forward": 1, "frozen W": 2, STEP: 3, WHOLE: 3}[case.mode]
    passes = {"no-grad": 1, "forward": 1, "frozen W": 2, STEP: 3, WHOLE: 5}[case.mode]
    return Needed(part * products * p.flops, part * passes * p.weight_bytes)


def limit(case: Case, ceilings: Iterable[Row]) -> float | None:
    """Seconds: the larger of the two, at the rates of this machine."""
    rates = {(line["kind"], line["dtype"]): line["per_second"] for line in ceilings}
    gemm, copy = rates.get(("GEMM", case.problem.dtype)), rates.get(("copy", ""))
    if not gemm or not copy:
        return None
    flops, moved = needed(case)
    return max(flops / gemm, moved / copy)
