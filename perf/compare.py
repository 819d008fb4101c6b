"""`python -m perf compare A B`: is B slower, larger or less exact than A, more than the measurements' noise?

Times are compared in units of the yardstick of their own rounds, so a machine that is slower as a whole changes
nothing. The noise of a median is estimated from its quartiles, the noise of a run from the yardstick against itself.
"""

from __future__ import annotations

import math

import pandas as pd

from perf.grid import YARDSTICK
from perf.results import KEY, Results

SURE = 3.0  # standard deviations of a median's noise
MEMORY = 1.02  # allocations are counted, not timed
ERROR = 2.0  # times; rounding differs between versions of libraries


def noise_floor(samples: pd.DataFrame) -> float:
    """How far the two yardsticks of a round are apart, relative, at the typical size: below it no ratio says anything.

    The median over the sizes of the standard error of their ratio's median.
    """
    yard = samples[samples["provider"] == YARDSTICK]
    if yard.empty:
        return math.nan
    size = ["loss", "dtype", "N", "D", "C", "mode", "round"]
    first = yard[yard["place"] == "first"].set_index(size)["seconds"]
    again = yard[yard["place"] != "first"].set_index(size)["seconds"]
    ratios = (again / first).dropna().reset_index()
    groups = ratios.groupby(size[:-1])["seconds"]
    return float(((groups.median() - 1.0).abs() + groups.apply(standard_error)).median())


def standard_error(values: pd.Series) -> float:
    """Of the median, relative, for values whose quartiles are those of a normal distribution."""
    if len(values) < 2:
        return math.nan
    spread = (values.quantile(0.75) - values.quantile(0.25)) / 1.349
    return float(1.2533 * spread / math.sqrt(len(values)) / values.median())


def within(rows: pd.DataFrame) -> pd.Series:
    """The relative standard error of every row's median."""
    spread = (rows["q75_s"] - rows["q25_s"]) / 1.349
    return 1.2533 * spread / rows["samples"].pow(0.5) / rows["median_s"]


def band(rows: pd.DataFrame, floor: float) -> pd.Series:
    """What another run may differ by, relative."""
    return SURE * (within(rows).fillna(0.0) ** 2 + floor**2).pow(0.5)


def compare(a: Results, b: Results, threshold: float) -> pd.DataFrame:
    """A line per case that both measured: ratio B over A, the band of noise, and a verdict."""
    floor = max((each for each in (noise_floor(a.samples), noise_floor(b.samples)) if each == each), default=0.0)
    both = a.rows.merge(b.rows, on=KEY, suffixes=("_a", "_b"))
    both = both[(both["samples_a"] > 0) & (both["samples_b"] > 0) & (both["provider"] != YARDSTICK)].copy()
    normal = both["x_gemm_b"] / both["x_gemm_a"]
    both["ratio"] = normal.where(normal.notna(), both["median_s_b"] / both["median_s_a"])
    parts = [
        within(both[[f"{name}_{side}" for name in ("median_s", "q25_s", "q75_s", "samples")]].rename(
            columns=lambda name: name[:-2]
        ))
        for side in ("a", "b")
    ]  # fmt: skip
    both["band"] = SURE * (parts[0].fillna(0.0) ** 2 + parts[1].fillna(0.0) ** 2 + floor**2).pow(0.5)
    both["verdict"] = [verdict(row, threshold) for row in both.to_dict("records")]
    return both[[*KEY, "median_s_a", "median_s_b", "x_gemm_a", "x_gemm_b", "ratio", "band", "verdict"]]


def verdict(row: dict[str, object], threshold: float) -> str:
    number = {name: value for name, value in row.items() if isinstance(value, (int, float))}
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


def pooled(found: pd.DataFrame) -> dict[str, float]:
    """The geometric mean of the ratio over our rows, by mode: many rows see what one cannot."""
    own = found[found["provider"].str.startswith("ours")]
    return {str(mode): math.exp(rows["ratio"].map(math.log).mean()) for mode, rows in own.groupby("mode", sort=False)}


def words(found: pd.DataFrame) -> str:
    """The pooled ratios in a sentence."""
    said = ", ".join(f"{mode} {ratio:.3f}" for mode, ratio in pooled(found).items())
    return f"Ours takes, of the time before: {said}." if said else ""


def regressions(found: pd.DataFrame, threshold: float) -> list[str]:
    """What should not be merged: rows of ours that are wrong, less exact or larger; ours as a whole slower."""
    own = found[found["provider"].str.startswith("ours")]
    bad = [
        f"{row.provider}, {row.mode}, {row.dtype}, N={row.N}, D={row.D}, C={row.C}: {row.verdict}"
        for row in own[own["verdict"].str.contains("wrong|error|memory|slower")].itertuples()
    ]
    slower = [f"{mode}: {ratio:.2f} times" for mode, ratio in pooled(found).items() if ratio > 1.0 + threshold]
    return bad + [f"ours as a whole is slower, {each}" for each in slower]
