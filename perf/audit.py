"""What bounds a row: the counts of a step, each divided by the rate at which this machine does such work.

The operations of a step run one after the other, so the sum of the quotients predicts its time. The roofline is what
would remain if everything but the products were free, or everything but the memory traffic.
"""

from __future__ import annotations

import math

import pandas as pd

from perf import rates, timing
from perf.counts import RATES, parts
from perf.problem import Problem
from perf.tables import PARTS, STEP, Row, Table

AUDITED = [("ours", STEP), ("ours-retain", STEP), *(row for row in PARTS if row[0] == "ours"), ("plain", STEP)]
Measured = dict[tuple[str, str], float]  # (provider, mode) -> seconds


def audit(p: Problem, measured: Measured, speed: dict[str, float] | None = None) -> pd.DataFrame:
    """One line per part of every audited row: its amount, the rate, the seconds; and the row's measured seconds."""
    speed = speed or rates.measure(p)
    lines = []
    for provider, mode in AUDITED:
        for part in parts(provider, mode, p):
            lines.append({
                "table": "audit", "provider": provider, "mode": mode, "dtype": p.dtype, "N": p.n, "D": p.d,
                "C": p.classes, "part": part.name, "group": RATES[part.rate].group, "kind": part.rate,
                "amount": part.amount, "unit": RATES[part.rate].unit, "per_second": speed[part.rate],
                "seconds": part.amount / speed[part.rate], "measured_s": measured.get((provider, mode), math.nan),
            })  # fmt: skip
    return pd.DataFrame(lines)


def measure(p: Problem, rounds: int, say: timing.Say = print) -> Measured:
    """Medians of the audited rows."""
    table = Table("audit", "", [Row(p, provider, mode) for provider, mode in AUDITED], rounds)
    return medians(timing.measure(table, say), p)


def medians(frame: pd.DataFrame, p: Problem) -> Measured:
    """The medians of a speed table's rows at size p."""
    if "median_s" not in frame:
        return {}
    here = frame[(frame["dtype"] == p.dtype) & (frame["N"] == p.n) & (frame["D"] == p.d) & (frame["C"] == p.classes)]
    here = here[here["median_s"].notna()]
    return {(line.provider, line.mode): float(line.median_s) for line in here.itertuples()}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per audited row: predicted and measured time, the roofline, the share of each group, the bound."""
    lines = []
    key = ["dtype", "N", "D", "C", "provider", "mode"]
    names = list(dict.fromkeys(rate.group for rate in RATES.values()))
    for values, row in frame.groupby(key, sort=False):
        groups = row.groupby("group")["seconds"].sum()
        total = groups.sum()
        largest = groups.idxmax()
        measured = row["measured_s"].iloc[0]
        lines.append({
            **dict(zip(key, values, strict=True)),
            "GFLOP": row.loc[row["unit"] == "flop", "amount"].sum() / 1e9,
            "GB": row.loc[row["unit"] == "byte", "amount"].sum() / 1e9,
            "G elements": row.loc[row["unit"] == "element", "amount"].sum() / 1e9,
            "roofline_s": max(groups.get("GEMMs", 0.0), groups.get("memory traffic", 0.0)),
            "predicted_s": total,
            "measured_s": measured,
            "measured / predicted": measured / total,
            **{f"share of {name}": groups.get(name, 0.0) / total for name in names},
            "bound by": f"{largest} ({groups[largest] / total:.0%})",
        })  # fmt: skip
    return pd.DataFrame(lines)
