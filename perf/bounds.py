"""What the rows promise. A bound is checked where its row was measured at exactly its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from perf.providers.base import STEP

NAMES = {
    "x_gemm": "GEMMs",
    "times_ours": "times ours",
    "beyond_mb": "MB beyond W, its gradient and the inputs",
    "beyond_rss_mb": "MB of the resident set beyond them",
    "growth": "times the memory at C=10^5",
    "per_class": "times the time per class at C=10^5",
}
BASE = 100_000  # classes that growth and time per class are compared with


@dataclass(frozen=True)
class Bound:
    """`column` of one row is at most (or at least) `limit`."""

    provider: str
    column: str
    limit: float
    n: int = 256
    d: int = 512
    classes: int = 131_072
    dtype: str = "float32"
    mode: str = STEP
    loss: str = "arcface"
    at_least: bool = False

    def rows(self, frame: pd.DataFrame) -> pd.Series:
        """Which rows it speaks about."""
        return (
            (frame["provider"] == self.provider) & (frame["mode"] == self.mode) & (frame["loss"] == self.loss)
            & (frame["dtype"] == self.dtype) & (frame["N"] == self.n) & (frame["D"] == self.d)
            & (frame["C"] == self.classes) & (frame["device"] == "cpu")
        )  # fmt: skip

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def text(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g} {NAMES[self.column]}"


MILLION: dict[str, Any] = dict(d=128, classes=1_000_000)

BOUNDS = [
    Bound("ours", "x_gemm", 3.9),
    Bound("ours-retain", "x_gemm", 3.0),
    Bound("ours", "x_gemm", 1.15, mode="forward"),
    Bound("plain", "times_ours", 2.4, at_least=True),
    Bound("ours", "x_gemm", 4.8, n=32),
    Bound("ours", "x_gemm", 6.0, dtype="bfloat16"),
    Bound("ours-retain", "x_gemm", 4.8, dtype="bfloat16"),
    Bound("ours", "beyond_mb", 100.0, **MILLION),
    Bound("ours", "beyond_rss_mb", 100.0, **MILLION),
    Bound("ours", "growth", 1.05, **MILLION),
    Bound("ours", "per_class", 1.15, d=128, classes=300_000),
    Bound("ours", "per_class", 1.15, **MILLION),
]


def check(frame: pd.DataFrame) -> pd.DataFrame:
    """A line per bound whose row was measured: what was promised, what was found, whether it holds."""
    made = derive(frame)
    lines = []
    for bound in BOUNDS:
        for row in made[bound.rows(made)].to_dict("records"):
            value = row[bound.column]
            if pd.notna(value):
                lines.append({
                    "provider": row["provider"], "title": row["title"], "mode": bound.mode, "dtype": bound.dtype,
                    "N": bound.n, "D": bound.d, "C": bound.classes, "promised": bound.text, "found": value,
                    "met": bound.met(value),
                })  # fmt: skip
    return pd.DataFrame(lines)


def derive(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that follow from others: the resident set without dW, and comparisons with C = 10^5."""
    frame = frame.copy()
    gradient = frame["C"] * frame["D"] * frame["dtype"].map({"float32": 4, "float64": 8}).fillna(2) / 1e6
    frame["beyond_rss_mb"] = frame["rss_mb"] - gradient.where(frame["mode"] == STEP, 0.0)
    key = ["loss", "provider", "mode", "dtype", "N", "D", "device"]
    for column, new, per_class in (("beyond_mb", "growth", False), ("median_s", "per_class", True)):
        value = frame[column] / frame["C"] if per_class else frame[column]
        base = frame[key].assign(base=value)[frame["C"] == BASE].drop_duplicates(key)
        joined = frame[key].merge(base, on=key, how="left")["base"].to_numpy(dtype=float)
        frame[new] = value.to_numpy(dtype=float) / joined
        frame.loc[frame["C"] < BASE, new] = float("nan")
    return frame
