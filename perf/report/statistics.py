"""What the numbers say: noise, comparisons with ours, settings; from the results alone."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from perf.providers.base import GRAPHS, STEP, WHOLE
from perf.report.terminal import digits, megabytes, seconds
from perf.suite.plans import BASELINE, EVERYONE, ON_GPU
from perf.suite.results import KEY, Results

SURE = 3.0  # standard errors of a median that a difference has to exceed
LEAST = 0.02  # relative: what no run of a few rounds can see
LINES = 6  # of the first table
CASE = ["loss", "dtype", "N", "D", "C", "device", "mode"]
ROUND = [*CASE, "run", "round"]
SWEPT = ":"  # a provider with an option set belongs to a sweep, and to no ranking
PEER = {"ours-sampled": "ours-sampled", "plain-sampled": "ours-sampled"}  # of all others: ours


def bands(rows: pd.DataFrame, samples: pd.DataFrame, versus: str) -> pd.Series:
    """What a row's ratio to "ours" or to the baseline has to differ by, relative, to differ at all.

    From the ratios within the rounds of a run. Infinite where there was one round, nan without samples: nobody knows.
    """
    if samples.empty:
        return pd.Series(math.nan, index=rows.index, dtype=float)
    taken = samples.groupby([*ROUND, "provider"])["seconds"].mean().reset_index()  # the baseline has two in a round
    own = taken[taken["provider"] != BASELINE]
    names = own["provider"].map(lambda name: name.partition(SWEPT)[0])
    own = own.assign(peer=BASELINE if versus == BASELINE else names.map(PEER).fillna("ours"))
    both = own.merge(taken.rename(columns={"provider": "peer", "seconds": "base"}), on=[*ROUND, "peer"])
    both["ratio"] = both["seconds"] / both["base"]
    ratios = both.groupby([*KEY, "run"])["ratio"]
    # The standard error of a median, relative, for values whose quartiles are those of a normal distribution.
    spread = (ratios.quantile(0.75) - ratios.quantile(0.25)) / 1.349
    errors = (1.2533 * spread / ratios.size() ** 0.5 / ratios.median()).where(ratios.size() > 1)
    found = errors.reindex(pd.MultiIndex.from_frame(rows[[*KEY, "run"]])).to_numpy()
    return (SURE * pd.Series(found, index=rows.index, dtype=float)).fillna(math.inf).clip(lower=LEAST)


class Main(NamedTuple):
    """What the first screen is about: where most was measured."""

    loss: str
    mode: str
    n: int
    d: int
    dtype: str
    sizes: int  # numbers of classes


class Findings(NamedTuple):
    """What the page shows."""

    rows: pd.DataFrame  # measured or not, with noise bands and our times of the same size and work
    main: Main | None  # None: nothing was measured
    headline: pd.DataFrame
    compared: pd.DataFrame  # rows of others that do the work that ours does at the same size


def find(results: Results) -> Findings:
    rows = results.rows[results.rows["provider"] != BASELINE].copy()
    rows["band"] = bands(rows, results.samples, "ours")
    names = rows["device"].map(lambda device: "memory_gib" if device == "cpu" else "gpu_memory_gib")
    memory = [results.runs.get(str(run), {}).get(name) for run, name in zip(rows["run"], names, strict=True)]
    rows["limit_gib"] = pd.Series(memory, rows.index, dtype=float)
    rows = versus_ours(rows)
    good = right(rows)
    others = good[~good["provider"].str.startswith("ours") & good["ours_s"].notna() & (good["band"] != math.inf)]
    main = main_of(good)
    return Findings(rows, main, headline(rows, main) if main else rows.iloc[:0], others)


def right(rows: pd.DataFrame) -> pd.DataFrame:
    """What may be ranked: measured, not wrong, alive to the end, and with the default options."""
    good = (rows["samples"] > 0) & (rows["wrong"] == "") & ~rows["note"].str.contains("process died|gone")
    return rows[good & ~rows["provider"].str.contains(SWEPT, regex=False)]


def versus_ours(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with ours of the same size, mode and work (none where ours is wrong), and the verdict on ours.

    The ratio is that of the two times as they are shown; the median ratio within the rounds has to agree with it.
    Where one of the two has a single step, a cold one, there is no ratio.
    """
    key = [*CASE, "work"]
    ours = right(rows[rows["provider"].isin(["ours", "ours-sampled"])]).drop_duplicates(key)
    ours = ours[[*key, "median_s", "samples"]].rename(columns={"median_s": "ours_s", "samples": "ours_samples"})
    rows = rows.merge(ours, "left", key)
    rows.loc[(rows[["samples", "ours_samples"]] == 1).any(axis=1), "band"] = math.inf
    shown = rows[["median_s", "ours_s"]].map(lambda value: float(f"{value:.3g}"))
    rows["ratio"] = (shown["median_s"] / shown["ours_s"]).where(rows["band"] != math.inf)
    both, known = rows[["ratio", "times_ours"]].astype(float), rows["band"].map(math.isfinite).astype(bool)
    rows["verdict"] = pd.Series("equal", rows.index).where(known, "unknown")
    rows.loc[known & (both.min(axis=1) > 1.0 + rows["band"]), "verdict"] = "faster"
    rows.loc[known & (both.max(axis=1) < 1.0 - rows["band"]), "verdict"] = "slower"
    return rows


def main_of(good: pd.DataFrame) -> Main | None:
    """The loss, mode and size of most rows; ArcFace and forward+backward where they were measured."""
    if good.empty:
        return None
    for column, wanted in (("loss", "arcface"), ("mode", STEP)):
        values = good[column].value_counts()
        good = good[good[column] == (wanted if wanted in values else values.index[0])]
    counts = good.groupby(["D", "N"]).size()
    d, n = counts[counts == counts.max()].index[-1]
    good = good[(good["N"] == n) & (good["D"] == d)]
    good = good[good["dtype"] == good["dtype"].value_counts().index[0]]
    return Main(*good[["loss", "mode", "N", "D", "dtype"]].iloc[0], good["C"].nunique())


def at(rows: pd.DataFrame, main: Main) -> pd.DataFrame:
    """The rows of a loss, N and D, in every mode and dtype."""
    return rows[(rows[["loss", "N", "D"]] == [main.loss, main.n, main.d]).all(axis=1)]


def headline(rows: pd.DataFrame, main: Main) -> pd.DataFrame:
    """Ours and the fastest other code of the same work, at every size and mode where one of them was measured.

    The modes are the main one and its CUDA graph: each is compared with itself alone.
    """
    key, here = ["dtype", "C", "mode"], at(rows, main)
    here = here[(here["mode"].replace(GRAPHS) == GRAPHS.get(main.mode, main.mode)) & (here["work"] == "all classes")]
    ours, theirs = here[here["provider"] == "ours"], here[~here["provider"].str.startswith("ours")]
    others = right(theirs).sort_values("median_s")
    counts = others.groupby(key).size().rename("others").reset_index()
    said = theirs.assign(why=theirs["note"].where(theirs["wrong"] == "", "wrong, not ranked"))
    why = said[said["why"] != ""].drop_duplicates([*key, "why"]).groupby(key)["why"].agg("; ".join).reset_index()
    made = right(ours).merge(others.drop_duplicates(key), "outer", key, suffixes=("", "_other"))
    made = made.merge(counts, "left", key).merge(why, "left", key)
    return made.fillna({"others": 0, "why": "no other code was measured"}).sort_values(key, ignore_index=True)


def first(found: Findings) -> pd.DataFrame:
    """At most LINES lines of the headline: sizes where ours and most others were measured, then the largest.

    The dtype of the pictures comes first. A size has a line for each of its modes, and is there with all or none.
    """
    lines = found.headline
    if lines.empty:
        return lines
    drawn = lines["dtype"] == found.main.dtype
    lines = lines.assign(own=lines["median_s"].notna(), known=lines["ratio_other"].notna(), drawn=drawn)
    lines = lines.sort_values(["own", "drawn", "known", "others", "C"], ascending=False, kind="stable")
    taken = lines.iloc[:0]
    for _, size in lines.groupby(["dtype", "C"], sort=False):
        taken = pd.concat([taken, size]) if len(taken) + len(size) <= LINES else taken
    return taken


def heads(found: Findings) -> pd.DataFrame:
    """The rows of somebody's own heads, where the first screen is about."""
    rows = right(at(found.rows, found.main) if found.main else found.rows)
    return rows[~rows["provider"].isin([*EVERYONE, *ON_GPU]) & ~rows["provider"].str.startswith("ours")]


def launch(mode: str, device: str) -> str:
    """How a step gets to the GPU; nothing on a CPU."""
    return "CUDA graph" if mode in GRAPHS else "launched" if device == "cuda" else ""


def memory_left(rows: pd.DataFrame, classes: Any) -> Any:
    """MB that W and its gradient leave of the memory of the rows' machine; the rows are of one D and dtype."""
    size = {"float32": 4, "tf32": 4, "float64": 8}.get(rows["dtype"].iloc[0], 2)
    return rows["limit_gib"].max() * 2**30 / 1e6 - 2 * rows["D"].iloc[0] * size / 1e6 * classes


def fits(part: pd.DataFrame) -> float:
    """Up to how many classes the memory suffices, going on as between a code's two largest sizes; nan: not known."""
    part = part[part["beyond_mb"].notna()].drop_duplicates("C").sort_values("C").tail(2)
    if len(part) < 2:
        return math.nan
    (c0, c1), (m0, m1) = part["C"], part["beyond_mb"]
    slope = max((m1 - m0) / (c1 - c0), 0.0)
    return float((memory_left(part, 0) - m1 + slope * c1) / (slope + memory_left(part, 0) - memory_left(part, 1)))


def cost(median_s: float, mb: float, samples: int = 0) -> str:
    """The time of a step and its memory in words, as far as they are known."""
    once = " (one step)" if samples == 1 else ""
    return ", ".join(filter(None, [seconds(median_s) + once, megabytes(mb)]))


def times(ratio: float) -> str:
    """Of their time over ours."""
    return f"{digits(ratio)}x faster" if ratio >= 1.0 else f"{digits(1.0 / ratio)}x slower"


def pivot(rows: pd.DataFrame, columns: pd.Series, said: Iterable[str], lines: str = "title") -> pd.DataFrame:
    """A table of words: a line for each value of `lines`, a column for each of `columns`, in the order of the rows."""
    if rows.empty:
        return pd.DataFrame()
    made = rows.assign(column=columns, said=list(said))
    wide = made.pivot_table(index=lines, columns="column", values="said", aggfunc="first", sort=False).fillna("")
    return wide.rename_axis(None, axis=1).rename_axis("").reset_index()


def settings(found: Findings, swept: bool) -> pd.DataFrame:
    """A whole step of ours, if measured, in each setting or with one option changed: each dtype's two largest sizes."""
    rows = at(found.rows, found.main) if found.main else found.rows
    rows = rows[(rows["samples"] > 0) & (rows["wrong"] == "") & rows["provider"].str.startswith("ours")]
    changed, size = rows["provider"].str.contains(SWEPT, regex=False), rows["dtype"] + rows["C"].map(", C={:,}".format)
    key = rows["mode"] + size
    rows = rows.assign(size=size)[key.isin(key[changed]) if swept else ~changed & key.duplicated(keep=False)]
    mode = WHOLE if (rows["mode"] == WHOLE).any() else STEP
    rows = rows[rows["mode"] == mode].sort_values(["dtype", "C"], kind="stable")
    rows = rows[rows.groupby("dtype")["C"].rank("dense", ascending=False) <= 2]
    said = map(cost, rows["median_s"], rows["peak_mb"], rows["samples"])
    return pivot(rows, rows["size"], said).rename(columns={"": mode})


def behind(found: Findings) -> pd.DataFrame:
    """Who is faster than ours: a line for each code, loss and dtype, with the case where it is most so."""
    rows, lines = found.compared, []
    rows = rows[(rows["verdict"] == "slower") | ((rows["verdict"] == "unknown") & (rows["ratio"] < 1.0))]
    for (title, loss, dtype), part in rows.sort_values("ratio").groupby(["title", "loss", "dtype"], sort=False):
        most = part.iloc[0]
        lines.append({
            "": title, "what": f"{loss}, {dtype}", "cases": str(len(part)),
            "most in": f"{most['mode']}, N={most['N']}, D={most['D']}, C={most['C']:,}",
            "it takes": seconds(most["median_s"]), "ours": seconds(most["ours_s"]), "ours is": times(most["ratio"]),
        })  # fmt: skip
    return pd.DataFrame(lines)


def sentence(found: Findings) -> str:
    """The answer: how many comparisons went which way, and the times where most others were measured."""
    counts, total, main = found.compared["verdict"].value_counts(), len(found.compared), found.main
    if main is None:
        return "Nothing could be measured. Why is below."
    if not total:
        said = "Nothing was compared with other code."
    elif "unknown" in counts:
        less = int((found.compared["ratio"] > 1.0).sum())
        said = f"tritonmargin takes less time in {less} of {total} comparisons with code that does the same work."
    else:
        faster, slower, equal = (counts.get(name, 0) for name in ("faster", "slower", "equal"))
        said = (f"tritonmargin is faster in {faster} of {total} comparisons with code that does the same work, slower "
                f"in {slower}, and within noise in {equal}.")  # fmt: skip
    lines = first(found)
    if lines.empty or not lines["own"].iloc[0]:
        return said
    dtype, classes = lines[["dtype", "C"]].iloc[0]
    said += f" A step at {classes:,} classes, N={main.n}, D={main.d}, {dtype}"
    for line in lines[(lines["dtype"] == dtype) & (lines["C"] == classes) & lines["own"]].sort_index().itertuples():
        how = {"CUDA graph": " In a CUDA graph", "launched": ", launched"}.get(launch(line.mode, line.device), "")
        said += f"{how}: {cost(line.median_s, line.beyond_mb, line.samples)}."
        if pd.notna(line.ratio_other):
            said += f" The fastest other, {line.title_other}: {cost(line.median_s_other, line.beyond_mb_other)}."
    return said
