"""`python -m perf compare A B`: is B slower, larger or less exact than A, more than the measurements' noise?

Times are compared in units of the yardstick of their own rounds, so a machine that is slower as a whole changes
nothing. The noise of a ratio is that of its median over the rounds (noise.py), of both runs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from perf import noise
from perf.grid import YARDSTICK
from perf.results import KEY, Results

MEMORY = 1.02  # allocations are counted, not timed
ERROR = 2.0  # times; rounding differs between versions of libraries
LEFT_OUT = ("not begun", "predicted", "no ", "only ", "on a CPU", "the batch ")  # notes of what nobody tried


def compare(a: Results, b: Results, threshold: float) -> pd.DataFrame:
    """A line per case that both measured, and per case of ours that fails in B: ratio B over A, noise, a verdict."""
    sides = [each.rows.assign(band=noise.bands(each.rows, each.samples, YARDSTICK)) for each in (a, b)]
    both = sides[0].merge(sides[1], on=KEY, suffixes=("_a", "_b"))
    own, left_out = both["provider"].str.startswith("ours"), both["note_b"].str.startswith(LEFT_OUT)
    there = (both["samples_b"] > 0) | (own & ~left_out)
    both = both[(both["samples_a"] > 0) & there & (both["provider"] != YARDSTICK)].copy()
    normal = both["x_gemm_b"] / both["x_gemm_a"]
    both["ratio"] = normal.where(normal.notna(), both["median_s_b"] / both["median_s_a"])
    both["band"] = (both["band_a"] ** 2 + both["band_b"] ** 2).pow(0.5)
    both["verdict"] = [verdict(row, threshold) for row in both.to_dict("records")]
    return both[[*KEY, "median_s_a", "median_s_b", "x_gemm_a", "x_gemm_b", "ratio", "band", "verdict"]]


def absent(a: Results, b: Results) -> int:
    """How many cases A measured that B says nothing of: another grid, or a run that was stopped."""
    keys = [pd.MultiIndex.from_frame(rows[KEY]) for rows in (a.rows[a.rows["samples"] > 0], b.rows)]
    return len(keys[0].difference(keys[1]))


def verdict(row: dict[str, object], threshold: float) -> str:
    number = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    if not row["samples_b"]:
        return f"failed: {row['note_b'] or 'not measured'}"
    said = []
    if row["wrong_b"] and not row["wrong_a"]:
        said.append(f"wrong: {row['wrong_b']}")
    for name in ("error_loss", "error_dx", "error_dw"):
        before, now = number.get(f"{name}_a", math.nan), number.get(f"{name}_b", math.nan)
        if now > ERROR * before and now > 1e-7:
            said.append(f"{name.replace('_', ' of ')} {now / before:.1f} times")
    before, now = number.get("peak_mb_a", math.nan), number.get("peak_mb_b", math.nan)
    if now > MEMORY * before and now > before + 1.0:
        said.append(f"memory {now / before:.2f} times")
    allowed = max(threshold, number["band"])
    if number["ratio"] > 1.0 + allowed:
        said.append("slower")
    elif number["ratio"] < 1.0 / (1.0 + allowed):
        said.append("faster")
    return ", ".join(said)


class Pooled(NamedTuple):
    ratio: float  # geometric mean
    band: float


def pooled(found: pd.DataFrame) -> dict[str, Pooled]:
    """All our rows together, by mode: many rows see what one cannot. Those with one round have no band, and no say."""
    own = found[found["provider"].str.startswith("ours") & found["ratio"].notna() & found["band"].map(math.isfinite)]
    return {
        str(mode): Pooled(
            math.exp(rows["ratio"].map(math.log).mean()), math.sqrt((rows["band"] ** 2).sum()) / len(rows)
        )
        for mode, rows in own.groupby("mode", sort=False)
    }


def words(found: pd.DataFrame, threshold: float) -> str:
    """The pooled ratios in a sentence, and how much a single row could have seen."""
    said = ", ".join(f"{mode} {each.ratio:.3f} ± {each.band:.3f}" for mode, each in pooled(found).items())
    own = found[found["provider"].str.startswith("ours") & found["ratio"].notna()]
    seen = int((own["band"] <= threshold).sum())
    alone = f" {seen} of our {len(own)} rows can see {threshold:.0%} alone." if len(own) else ""
    return (f"Ours takes, of the time before: {said}." if said else "") + alone


def regressions(found: pd.DataFrame, threshold: float) -> list[str]:
    """What should not be merged: rows of ours that fail, are wrong, less exact, larger or slower; or all are slower."""
    own = found[found["provider"].str.startswith("ours")]
    bad = [
        f"{row.provider}, {row.mode}, {row.dtype}, N={row.N}, D={row.D}, C={row.C}: {row.verdict}"
        for row in own[own["verdict"].str.contains("failed|wrong|error|memory|slower")].itertuples()
    ]
    slower = [
        f"{mode}: {each.ratio:.2f} times"
        for mode, each in pooled(found).items()
        if each.ratio > 1.0 + max(threshold, each.band)
    ]
    return bad + [f"ours as a whole is slower, {each}" for each in slower]
