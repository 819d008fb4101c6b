"""What the numbers say: the tables of the page, from the results alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from perf import bounds, ceilings, noise
from perf.grid import YARDSTICK, Case
from perf.noise import SWEPT
from perf.problem import Problem
from perf.providers.base import STEP, WHOLE
from perf.results import Results
from perf.terminal import digits

SIZE = ["loss", "dtype", "N", "D", "C"]


class Findings(NamedTuple):
    """Everything that the page shows, apart from pictures."""

    rows: pd.DataFrame  # measured or not, with the bands of noise
    noise: float  # relative
    headline: pd.DataFrame
    behind: pd.DataFrame  # rows of others that are faster than ours at equal work
    wrong: pd.DataFrame
    failed: pd.DataFrame
    promised: pd.DataFrame
    settings: pd.DataFrame
    growth: pd.DataFrame
    counts: dict[str, int]


def find(results: Results) -> Findings:
    rows = results.rows[results.rows["provider"] != YARDSTICK].copy()
    rows["band"] = noise.bands(rows, results.samples, "ours")
    gib = rows["run"].map({number: facts.get("memory_gib") for number, facts in results.runs.items()})
    rows["memory_mb"] = gib.astype(float) * 2**30 / 1e6
    # By the best rates that any run of this machine found: a busy moment is no limit.
    known = results.ceilings.fillna({"dtype": ""}).sort_values("per_second")
    best = known.drop_duplicates(["kind", "dtype"], keep="last").to_dict("records")
    if best:
        limits = [ceilings.limit(case_of(row), best) for row in rows.itertuples()]
        rows["limit_s"] = pd.Series(limits, index=rows.index, dtype=float)
    rows["fraction"] = rows["limit_s"] / rows["median_s"]
    measured = rows[rows["samples"] > 0]
    right = measured[measured["wrong"] == ""]
    ranked = right[~right["provider"].str.contains(SWEPT, regex=False)]
    others = ranked[~ranked["provider"].str.startswith("ours") & ranked["band"].map(math.isfinite)]
    # Nobody is compared with ours where ours is wrong.
    own = measured[measured["provider"].isin(["ours", "ours-sampled"]) & (measured["wrong"] != "")]
    off = set(own[[*SIZE, "mode", "work"]].itertuples(index=False, name=None))
    right_ours = [line not in off for line in others[[*SIZE, "mode", "work"]].itertuples(index=False, name=None)]
    others = others[pd.Series(right_ours, index=others.index, dtype=bool)]
    counts = {
        "cases": len(rows), "measured": len(measured), "wrong": int((measured["wrong"] != "").sum()),
        "compared": len(others), "ahead": int((others["times_ours"] > 1.0 + others["band"]).sum()),
        "behind": int((others["times_ours"] < 1.0 - others["band"]).sum()),
    }  # fmt: skip
    counts["level"] = counts["compared"] - counts["ahead"] - counts["behind"]
    behind = others[others["times_ours"] < 1.0 - others["band"]].sort_values("times_ours")
    return Findings(
        rows=rows,
        noise=noise.of_yardstick(results.samples),
        headline=headline(ranked),
        behind=behind,
        wrong=rows[rows["wrong"] != ""].drop_duplicates(["provider", "loss", "dtype", "wrong"]),
        failed=rows[(rows["note"] != "") | ((rows["samples"] == 0) & (rows["note"] == ""))],
        promised=bounds.check(rows),
        settings=settings(ranked),
        growth=growth(right),
        counts=counts,
    )


def case_of(row: Any) -> Case:
    return Case(Problem(row.N, row.D, row.C, row.dtype, row.device, row.loss), row.provider, row.mode)


# -- the first screen --------------------------------------------------------------------------------------------


def headline(ranked: pd.DataFrame) -> pd.DataFrame:
    """Ours beside the fastest other code at the largest ArcFace sizes that both measured, a line per dtype and C."""
    others = ranked[~ranked["provider"].str.startswith("ours") & (ranked["work"] == "all classes")]
    lines = []
    arcface = others[(others["loss"] == "arcface") & (others["mode"] == STEP)]
    for (dtype, c), part in arcface.groupby(["dtype", "C"], sort=True):
        n, d = nearest(part, 256), part["D"].max()
        here = part[(part["N"] == n) & (part["D"] == d)]
        own = ranked[
            (ranked["provider"] == "ours") & (ranked["loss"] == "arcface") & (ranked["mode"] == STEP)
            & (ranked["dtype"] == dtype) & (ranked["C"] == c) & (ranked["N"] == n) & (ranked["D"] == d)
        ]  # fmt: skip
        if here.empty or own.empty:
            continue
        best, ours = here.loc[here["median_s"].idxmin()], own.iloc[0]
        lines.append({
            "dtype": dtype, "N": n, "D": d, "C": c, "ours_s": ours["median_s"], "ours_mb": ours["beyond_mb"],
            "x_gemm": ours["x_gemm"], "fraction": ours["fraction"], "other": best["title"],
            "other_time": step_words(best), "other_mb": best["beyond_mb"], "times": best["times_ours"],
            "level": bool(math.isfinite(best["band"]) and abs(best["times_ours"] - 1.0) <= best["band"]),
        })  # fmt: skip
    made = pd.DataFrame(lines)
    return made if made.empty else made[made["D"] == made["D"].max()]


def nearest(frame: pd.DataFrame, wanted: int) -> int:
    """The batch that is closest to wanted."""
    return int(min(frame["N"].unique(), key=lambda n: abs(math.log(n / wanted))))


# -- which setting -----------------------------------------------------------------------------------------------

CHOICES = {
    "ours": "the loss as it comes, and your optimiser",
    "ours-retain": "retain_bytes for all logits",
    "ours-in-backward": "head.update_in_backward(RowSGD)",
    "ours-sampled": "sample_rate=0.1 with RowSGD",
    "ours-sharded": "process_group=, on this one machine",
}


def settings(ranked: pd.DataFrame) -> pd.DataFrame:
    """A whole step of ArcFace in each of our settings: time and memory beyond W, the momentum and the inputs.

    Only sizes at which all that one process can do was measured. The memory of ranks is that of the first of two.
    """
    own = ranked[ranked["provider"].isin(CHOICES) & (ranked["mode"] == WHOLE) & (ranked["loss"] == "arcface")]
    if own.empty:
        return own
    own = own[(own["N"] == nearest(own, 256)) & (own["D"] == own["D"].max())]
    lines = []
    for (dtype, n, d, c), part in own.groupby(["dtype", "N", "D", "C"], sort=True):
        exact = part[part["work"] == "all classes"]
        here = exact[exact["provider"] != "ours-sharded"]
        if not {"ours", "ours-retain", "ours-in-backward"} <= set(here["provider"]):
            continue
        fastest = exact.loc[exact["median_s"].idxmin()]
        smallest = here.loc[here["peak_mb"].idxmin()] if here["peak_mb"].notna().any() else fastest
        sampled = part[part["work"] == "sampled"]
        lines.append({
            "dtype": dtype, "N": n, "D": d, "C": c,
            "fastest": CHOICES[fastest["provider"]], "fastest_s": fastest["median_s"], "fastest_mb": fastest["peak_mb"],
            "smallest": CHOICES[smallest["provider"]], "smallest_s": smallest["median_s"],
            "smallest_mb": smallest["peak_mb"],
            "sampled_s": sampled["median_s"].iloc[0] if len(sampled) else math.nan,
            "sampled_mb": sampled["peak_mb"].iloc[0] if len(sampled) else math.nan,
        })  # fmt: skip
    return pd.DataFrame(lines)


# -- how the cost grows ------------------------------------------------------------------------------------------


GROWTH = ["title", "provider", "dtype", "sizes", "a_ms", "b_ps", "typical_error"]


def growth(right: pd.DataFrame) -> pd.DataFrame:
    """time = a + b N C D for every provider and dtype, by least squares of the relative error."""
    steps = right[(right["mode"] == STEP) & ~right["provider"].str.contains(SWEPT, regex=False)]
    lines = []
    for (provider, dtype), part in steps.groupby(["provider", "dtype"], sort=False):
        work = (part["N"] * part["C"] * part["D"]).to_numpy(dtype=float)
        time = part["median_s"].to_numpy(dtype=float)
        if len(set(work)) < 4:
            continue
        # Rows divided by the time: residuals are relative.
        matrix = np.stack([1.0 / time, work / time], axis=1)
        (a, b), *_ = np.linalg.lstsq(matrix, np.ones_like(time), rcond=None)
        off = np.abs(a + b * work - time) / time
        lines.append({
            "title": part["title"].iloc[0], "provider": provider, "dtype": dtype, "sizes": len(part),
            "a_ms": 1e3 * a, "b_ps": 1e12 * b, "typical_error": float(np.median(off)),
        })  # fmt: skip
    return pd.DataFrame(lines, columns=GROWTH)


# -- words -------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """12 ms, 3.4 s."""
    if pd.isna(value):
        return ""
    return f"{digits(value * 1e3)} ms" if value < 1.0 else f"{digits(value)} s"


def step_words(row: Any) -> str:
    """The time of a row's step, and whether it is of a single one."""
    return seconds(row["median_s"]) + (" (one step)" if row["samples"] == 1 else "")


def percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else ""


def megabytes(value: float) -> str:
    """Of 10^6 bytes."""
    if pd.isna(value):
        return ""
    return f"{value / 1e3:.3g} GB" if value >= 1e3 else f"{digits(value)} MB"


def sentence(found: Findings) -> str:
    """The answer in a sentence."""
    counts = found.counts
    if not counts["compared"]:
        return f"{counts['measured']} cases measured; nothing was compared with other code."
    return (
        f"Ours is faster in {counts['ahead']} of {counts['compared']} comparisons with other code that does the same "
        f"work, slower in {counts['behind']}, and within the noise in {counts['level']}."
    )


def size_words(row: dict[str, Any]) -> str:
    return f"{row['dtype']}, N={row['N']}, D={row['D']}, C={row['C']:,}"
