"""Which rows are measured, and at which sizes.

A table's rows are timed together, round after round. Sizes come in three scales: "full", "quick" (minutes on two cores)
and "tiny" (seconds; shows that everything runs, its numbers say nothing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from perf.problem import Problem

STEP = "forward+backward"
Chosen = list[tuple[str, str]]  # provider, mode

GEMM = ("gemm", "no-grad")
OURS: Chosen = [GEMM, ("ours", STEP), ("ours", "no-grad")]
BATCH: Chosen = [
    GEMM,
    ("ours", STEP),
    ("ours-retain", STEP),
    ("plain", STEP),
    ("ours-linear", STEP),
    ("torch-lce", STEP),
]
# torch's default chunking takes one row at a time here: at N = 256 it is longer than all others together.
SLOW: Chosen = [("torch-lce-chunked", STEP)]
STEPS: Chosen = [
    ("ours", STEP),
    ("ours-retain", STEP),
    ("plain", STEP),
    ("pml", STEP),
    ("ours-linear", STEP),
    ("torch-lce", STEP),
    ("torch-lce-rows64", STEP),
]
PARTS: Chosen = [(provider, mode) for mode in ("forward", "no-grad", "frozen W") for provider in ("ours", "plain")]


class Row(NamedTuple):
    problem: Problem
    provider: str
    mode: str


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    rows: list[Row]
    rounds: int
    memory: bool = False

    def __post_init__(self) -> None:
        if len(set(self.rows)) < len(self.rows):
            raise ValueError(f"table {self.name}: a row stands twice")


@dataclass(frozen=True)
class Scale:
    rounds: int
    full: bool = False
    shrink: int = 1
    device: str = "cpu"

    def rows(self, chosen: Chosen, n: int, d: int, classes: int, dtype: str = "float32") -> list[Row]:
        if self.shrink > 1:
            n, d, classes = max(n // 8, 4), 16, classes // self.shrink
        problem = Problem(n, d, classes, dtype, self.device)
        return [Row(problem, provider, mode) for provider, mode in chosen]


SCALES = {"tiny": Scale(2, shrink=100), "quick": Scale(5), "full": Scale(15, full=True)}


def tables(scale: str, device: str = "cpu") -> dict[str, Table]:
    """Every table by name."""
    if scale not in SCALES:
        raise ValueError(f"scale is one of {', '.join(SCALES)}, got {scale!r}")
    chosen = SCALES[scale]
    s = Scale(chosen.rounds, chosen.full, chosen.shrink, device)
    everything = [GEMM, *STEPS, *PARTS]
    small = [row for row in everything if row[0] != "torch-lce-rows64"]  # 64 rows are more than the batch

    fp32 = s.rows([*everything, *SLOW], 256, 512, 131_072) + s.rows([*small, *SLOW], 32, 512, 131_072)
    bf16 = s.rows([*everything, *(SLOW if s.full else [])], 256, 512, 131_072, "bfloat16")
    bf16 += s.rows(small, 32, 512, 131_072, "bfloat16")
    batch = []
    for dtype in ("float32", "bfloat16"):
        batch += s.rows(BATCH, 2048, 512, 131_072 if s.full else 32_768, dtype)
    linear = []
    for classes in (10_000, 30_000, 100_000, 300_000, 1_000_000):
        linear += s.rows([*OURS, ("plain", STEP)] if s.full else OURS, 256, 128, classes)
    large = s.rows(OURS, 256, 512, 1_000_000) + s.rows(OURS, 32, 512, 1_000_000)

    found = [
        Table("fp32", "float32", fp32, s.rounds),
        Table("bf16", "bfloat16", bf16, s.rounds),
        Table("batch", "Large batches", batch, s.rounds),
        Table("linear", "Time against C", linear, s.rounds),
        Table("memory", "Peak memory", memory_rows(s), 1, memory=True),
    ]
    if s.full:
        found.append(Table("large", "A million classes at D = 512", large, s.rounds))
    return {table.name: table for table in found}


def memory_rows(s: Scale) -> list[Row]:
    found = []
    for classes in (10_000, 100_000, 1_000_000):
        found += s.rows([("ours", STEP), ("plain", STEP)], 256, 128, classes)
    found += s.rows([("ours", "no-grad"), ("ours", "frozen W")], 256, 128, 1_000_000)
    found += s.rows([*STEPS, *(SLOW if s.full else [])], 256, 512, 131_072)
    found += s.rows([("ours", STEP), ("ours-retain", STEP), ("plain", STEP)], 256, 512, 131_072, "bfloat16")
    return found
