"""All rows of a table in one process, round after round: A B C ... A B C ...

What changes during a run (clock rates, neighbours) then meets every row alike, and each row can be divided by the GEMM
and by our row of the same round. Gradients are dropped before each step and outside its time, as
`zero_grad(set_to_none=True)` does, so a step that makes a gradient also pays for its memory.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable

import pandas as pd
import torch

from perf.clock import seconds
from perf.problem import Problem, Tensors
from perf.providers import discover
from perf.providers.base import Provider
from perf.tables import Row, Table

# Two implementations of one loss differ by rounding, and not by more than this.
TOLERANCE = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 3e-2, "float16": 3e-2}
Say = Callable[[str], None]


class Disagreement(AssertionError):
    """Two rows that should compute the same do not."""


class Prepared(dict[tuple[Problem, str], Provider]):
    """Providers ready to run; rows of the same size share the tensors."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.refused: dict[Row, str] = {}
        tensors: dict[Problem, Tensors] = {}
        found, skipped = discover()
        for row in rows:
            if row.provider not in found:
                self.refused[row] = "; ".join(f"{file}: {why}" for file, why in skipped.items()) or "no such provider"
                continue
            key = row.problem, row.provider
            if key in self:
                continue
            provider = found[row.provider]()
            reason = provider.supports(row.problem)
            if reason is None and row.mode not in provider.modes:
                reason = f"has no mode {row.mode!r}"
            if reason:
                self.refused[row] = reason
                continue
            if row.problem not in tensors:
                tensors[row.problem] = row.problem.tensors()
            provider.prepare(row.problem, tensors[row.problem])
            self[key] = provider


def measure(table: Table, say: Say = print) -> pd.DataFrame:
    """One line per row of the table, see `summary`."""
    prepared = Prepared(table.rows)
    losses: dict[Row, float] = {}
    for number, row in enumerate(table.rows):  # the warm-up is also the test
        provider = prepared.get((row.problem, row.provider))
        if provider is None:
            continue
        say(f"{table.name}: warm-up {number + 1}/{len(table.rows)} {row.provider}, {row.problem.title}")
        try:
            losses[row] = step(provider, row.mode)[1]
        except (RuntimeError, MemoryError) as error:
            if row.provider.startswith("ours"):
                raise
            prepared.refused[row] = str(error).splitlines()[0]
    agree(losses)

    samples: dict[Row, list[float]] = {row: [] for row in losses}
    gc.collect()
    gc.disable()
    try:
        for turn in range(table.rounds):
            for number, row in enumerate(losses):
                say(f"{table.name}: round {turn + 1}/{table.rounds}, {number + 1}/{len(losses)} {row.provider}")
                samples[row].append(step(prepared[row.problem, row.provider], row.mode)[0])
    finally:
        gc.enable()
    return pd.DataFrame([summary(table, row, samples, losses, prepared.refused) for row in table.rows])


def step(provider: Provider, mode: str) -> tuple[float, float]:
    """Seconds and loss of one step."""
    provider.reset(mode)
    took, result = seconds(lambda: provider.run(mode), provider.problem.device)
    assert isinstance(result, torch.Tensor)
    loss = float(result.detach()) if result.ndim == 0 else float("nan")
    provider.reset(mode)
    return took, loss


def agree(losses: dict[Row, float]) -> None:
    """Rows of one loss and size have one value: whoever is fast computes the same thing."""
    found = discover().providers
    first: dict[tuple[Problem, str], tuple[Row, float]] = {}
    for row, value in losses.items():
        loss = found[row.provider].loss
        if loss is None:
            continue
        other, expected = first.setdefault((row.problem, loss), (row, value))
        if not abs(value - expected) <= TOLERANCE[row.problem.dtype] * abs(expected):
            raise Disagreement(
                f"{row.problem.title}: {row.provider} ({row.mode}) says {value}, "
                f"{other.provider} ({other.mode}) says {expected}"
            )


def summary(
    table: Table, row: Row, samples: dict[Row, list[float]], losses: dict[Row, float], refused: dict[Row, str]
) -> dict[str, object]:
    """The row's numbers; ratios are medians over rounds of the ratio within a round."""
    problem, own = row.problem, samples.get(row, [])
    line: dict[str, object] = {
        "table": table.name, "provider": row.provider, "title": title(row.provider), "dtype": problem.dtype,
        "N": problem.n, "D": problem.d, "C": problem.classes, "mode": row.mode, "device": problem.device,
        "samples": len(own), "note": refused.get(row, ""),
    }  # fmt: skip
    if not own:
        return line
    gemm = samples.get(Row(problem, "gemm", "no-grad"))
    peer = discover().providers[row.provider].peer
    ours = samples.get(Row(problem, peer, row.mode))
    q25, median, q75 = quartiles(own)
    line |= {"median_s": median, "q25": q25, "q75": q75, "loss": losses[row]}
    if gemm:
        line |= {"ratio_to_gemm": ratio(own, gemm), "ratio_of_medians": median / statistics.median(gemm)}
    if ours and row.provider != "gemm":
        line["times_ours"] = ratio(own, ours)
    return line


def title(provider: str) -> str:
    found = discover().providers
    return found[provider].title if provider in found else provider


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return q25, median, q75
