"""What the rows promise. A bound is checked where its row was measured at exactly its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from perf.tables import STEP


@dataclass(frozen=True)
class Bound:
    """`column` of one row is at most (or at least) `limit`."""

    table: str
    provider: str
    column: str
    limit: float
    n: int = 256
    d: int = 512
    classes: int = 131_072
    dtype: str = "float32"
    mode: str = STEP
    at_least: bool = False

    def rows(self, frame: pd.DataFrame) -> pd.Series:
        """Which rows of a table it speaks about."""
        return (
            (frame["table"] == self.table)
            & (frame["provider"] == self.provider)
            & (frame["mode"] == self.mode)
            & (frame["dtype"] == self.dtype)
            & (frame["N"] == self.n)
            & (frame["D"] == self.d)
            & (frame["C"] == self.classes)
        )

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def text(self) -> str:
        return f"{NAMES[self.column]} {'>=' if self.at_least else '<='} {self.limit:g}"


NAMES = {
    "ratio_to_gemm": "x GEMM",
    "times_ours": "x ours",
    "beyond_profiler_mb": "MB",
    "beyond_rss_mb": "MB (rss)",
    "growth": "growth from C=10^5",
    "per_class": "time per class / that at C=10^5",
}
MILLION: dict[str, Any] = dict(d=128, classes=1_000_000)

BOUNDS = [
    Bound("fp32", "ours", "ratio_to_gemm", 3.9),
    Bound("fp32", "ours-retain", "ratio_to_gemm", 3.0),
    Bound("fp32", "ours", "ratio_to_gemm", 1.15, mode="forward"),
    Bound("fp32", "plain", "times_ours", 2.4, at_least=True),
    Bound("fp32", "ours", "ratio_to_gemm", 4.8, n=32),
    Bound("bf16", "ours", "ratio_to_gemm", 6.0, dtype="bfloat16"),
    Bound("bf16", "ours-retain", "ratio_to_gemm", 4.8, dtype="bfloat16"),
    Bound("memory", "ours", "beyond_profiler_mb", 100.0, **MILLION),
    Bound("memory", "ours", "beyond_rss_mb", 100.0, **MILLION),
    Bound("memory", "ours", "growth", 1.05, **MILLION),
    Bound("linear", "ours", "per_class", 1.15, d=128, classes=300_000),
    Bound("linear", "ours", "per_class", 1.15, **MILLION),
]


def check(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with what was promised of each row (`bound`), and whether it holds (`met`)."""
    promised, kept = pd.Series("", index=frame.index), pd.Series("", index=frame.index)
    for bound in BOUNDS:
        if bound.column not in frame:
            continue
        for place in frame.index[bound.rows(frame) & frame[bound.column].notna()]:
            met = "yes" if bound.met(frame.at[place, bound.column]) else "NO"
            promised[place] += ("; " if promised[place] else "") + bound.text
            kept[place] += ("; " if kept[place] else "") + met
    return frame.assign(bound=promised, met=kept)


def derive(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that compare a row with the same row at C = 10^5."""
    frame = frame.copy()
    for column, new, per_class in (("beyond_profiler_mb", "growth", False), ("median_s", "per_class", True)):
        if column not in frame:
            continue
        value = frame[column] / frame["C"] if per_class else frame[column]
        key = ["table", "provider", "mode", "dtype", "N", "D"]
        base = frame[key].assign(base=value)[frame["C"] == 100_000].drop_duplicates(key)
        joined = frame[key].merge(base, on=key, how="left")["base"]
        frame[new] = (value.to_numpy() / joined.to_numpy()) if len(base) else float("nan")
        frame.loc[frame["C"] < 100_000, new] = float("nan")
    return frame
