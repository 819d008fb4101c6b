"""What bounds a row: the counts of a step, each divided by the rate at which this machine does such work.

The operations of a step run one after the other, so the sum of the quotients predicts its time. The roofline is what
would remain if everything but the products were free, or everything but the memory traffic.
"""

from __future__ import annotations

import math

import pandas as pd

from perf import rates
from perf.counts import RATES, parts
from perf.grid import Budget, Case
from perf.measure import Checks, History, Say
from perf.measure import measure as measure_cases
from perf.problem import Problem
from perf.providers.base import STEP
from perf.terminal import digits

AUDITED = [("ours", "no-grad"), ("ours", "frozen W"), ("ours", STEP), ("ours-retain", STEP), ("plain", STEP)]
Measured = dict[tuple[str, str], float]  # (provider, mode) -> seconds


def audit(p: Problem, measured: Measured, speed: dict[str, float] | None = None) -> pd.DataFrame:
    """One line per part of every audited row: its amount, the rate, the seconds; and the row's measured seconds."""
    speed = speed or rates.measure(p)
    lines = []
    for provider, mode in AUDITED:
        for part in parts(provider, mode, p):
            lines.append({
                "provider": provider, "mode": mode, "dtype": p.dtype, "N": p.n, "D": p.d,
                "C": p.classes, "part": part.name, "group": RATES[part.rate].group, "kind": part.rate,
                "amount": part.amount, "unit": RATES[part.rate].unit, "per_second": speed[part.rate],
                "seconds": part.amount / speed[part.rate], "measured_s": measured.get((provider, mode), math.nan),
            })  # fmt: skip
    return pd.DataFrame(lines)


def measure(p: Problem, rounds: int, threads: int, say: Say = print) -> Measured:
    """Medians of the audited rows."""
    cases = [Case(p, provider, mode) for provider, mode in AUDITED]
    block = measure_cases(p, cases, Budget(rounds, rounds, 0.0, 60.0), threads, History(), Checks(), say)
    return {(row["provider"], row["mode"]): row["median_s"] for row in block.rows if row["samples"]}


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


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The summary for reading."""
    rows = summary(frame)
    percent = {name: rows[name].map("{:.0%}".format) for name in rows if name.startswith("share of ")}
    ms = {name: (rows[f"{name}_s"] * 1e3).map(digits) for name in ("roofline", "predicted", "measured")}
    return pd.DataFrame({
        "row": rows["provider"] + ", " + rows["mode"],
        **{name: rows[name].map(digits) for name in ("GFLOP", "G elements", "GB")},  # counted
        **{f"{name}, ms": value for name, value in ms.items()},
        "measured / predicted": rows["measured / predicted"].map(digits),
        **{name.removeprefix("share of "): value for name, value in percent.items()},
        "bound by": rows["bound by"],
    })  # fmt: skip


def parts_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Every part of one audited row, for reading."""
    scale = {"flop": (1e9, "GFLOP"), "element": (1e6, "M elements"), "byte": (1e6, "MB")}
    amount = [f"{digits(a / scale[u][0])} {scale[u][1]}" for a, u in zip(frame["amount"], frame["unit"], strict=True)]
    rate = [
        f"{digits(a / scale[u][0])} {scale[u][1]}/s" for a, u in zip(frame["per_second"], frame["unit"], strict=True)
    ]
    share = frame["seconds"] / frame["seconds"].sum()
    return pd.DataFrame({
        "part": frame["part"], "amount": amount, "rate": rate, "ms": (frame["seconds"] * 1e3).map(digits),
        "share": share.map("{:.0%}".format),
    })  # fmt: skip
