"""Is run B slower, larger or less exact than run A, more than the noise?"""

import math
from typing import Any

import pandas as pd

from perf.report.statistics import bands
from perf.suite.plans import BASELINE
from perf.suite.results import KEY, Results

MEMORY = 1.02  # allocations are counted, not timed
ERROR = 2.0  # times; rounding differs between versions of libraries
LEFT_OUT = ("not begun", "predicted", "the batch ")  # notes of what nobody tried


def compare(a: Results, b: Results, threshold: float) -> pd.DataFrame:
    """A line for each case that both measured, and for each of ours that fails in B: ratio B / A, noise, a verdict."""
    sides = [each.rows.assign(band=bands(each.rows, each.samples, BASELINE)) for each in (a, b)]
    both = sides[0].merge(sides[1], on=KEY, suffixes=("_a", "_b"))
    own, left_out = both["provider"].str.startswith("ours"), both["note_b"].str.startswith(LEFT_OUT)
    there = (both["samples_b"] > 0) | (own & ~left_out)
    both = both[(both["samples_a"] > 0) & there & (both["provider"] != BASELINE)].copy()
    # In units of the baseline of their own rounds: a machine that is slower as a whole changes nothing.
    both["ratio"] = (both["x_gemm_b"] / both["x_gemm_a"]).fillna(both["median_s_b"] / both["median_s_a"])
    both["band"] = (both["band_a"] ** 2 + both["band_b"] ** 2).pow(0.5)
    both["verdict"] = [verdict(row, threshold) for row in both.to_dict("records")]
    return both[[*KEY, "median_s_a", "median_s_b", "x_gemm_a", "x_gemm_b", "ratio", "band", "verdict"]]


def absent(a: Results, b: Results) -> int:
    """How many cases A measured that B does not mention: another grid, or a run that was stopped."""
    keys = [pd.MultiIndex.from_frame(rows[KEY]) for rows in (a.rows[a.rows["samples"] > 0], b.rows)]
    return len(keys[0].difference(keys[1]))


def verdict(row: dict[Any, Any], threshold: float) -> str:
    if not row["samples_b"]:
        return f"failed: {row['note_b'] or 'not measured'}"
    said = [f"wrong: {row['wrong_b']}"] if row["wrong_b"] and not row["wrong_a"] else []
    for name in ("error_loss", "error_dx", "error_dw"):
        before, now = row[f"{name}_a"], row[f"{name}_b"]
        if now > ERROR * before and now > 1e-7:
            said.append(f"{name.replace('_', ' of ')} {now / before:.1f} times")
    before, now = row["peak_mb_a"], row["peak_mb_b"]
    if now > MEMORY * before and now > before + 1.0:
        said.append(f"memory {now / before:.2f} times")
    allowed = threshold if math.isnan(row["band"]) else max(threshold, row["band"])  # nan: no samples to tell noise by
    if row["ratio"] > 1.0 + allowed:
        said.append("slower")
    elif row["ratio"] < 1.0 / (1.0 + allowed):
        said.append("faster")
    return ", ".join(said)


def pooled(found: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Geometric mean and band of all our rows, by mode: many see what one cannot. Those of one round have no band."""
    own = found[found["provider"].str.startswith("ours") & found["ratio"].notna() & found["band"].map(math.isfinite)]
    return {
        str(mode): (math.exp(part["ratio"].map(math.log).mean()), math.sqrt((part["band"] ** 2).sum()) / len(part))
        for mode, part in own.groupby("mode", sort=False)
    }


def words(found: pd.DataFrame, threshold: float) -> str:
    """The pooled ratios in a sentence, and how much a single row could have seen."""
    said = ", ".join(f"{mode} {ratio:.3f} ± {band:.3f}" for mode, (ratio, band) in pooled(found).items())
    own = found[found["provider"].str.startswith("ours") & found["ratio"].notna()]
    alone = f"{(own['band'] <= threshold).sum()} of our {len(own)} rows can see {threshold:.0%} alone."
    if own["band"].isna().any():
        alone = "Samples are missing (samples.csv.gz): what is noise is not known."
    return f"Ours takes, of the time before: {said}. {alone}" if said else alone


def regressions(found: pd.DataFrame, threshold: float) -> list[str]:
    """What should not be merged: rows of ours that fail, are wrong, less exact, larger or slower; or all are slower."""
    own = found[found["provider"].str.startswith("ours")]
    bad = [
        f"{row.provider}, {row.mode}, {row.dtype}, N={row.N}, D={row.D}, C={row.C}: {row.verdict}"
        for row in own[own["verdict"].str.contains("failed|wrong|error|memory|slower")].itertuples()
    ]
    slower = [(mode, ratio) for mode, (ratio, band) in pooled(found).items() if ratio > 1.0 + max(threshold, band)]
    return bad + [f"ours as a whole is slower, {mode}: {ratio:.2f} times" for mode, ratio in slower]
