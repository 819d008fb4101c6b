"""How far a ratio can be trusted: from its spread over the rounds of its own run."""

from __future__ import annotations

import math

import pandas as pd

from perf.grid import YARDSTICK
from perf.results import KEY

SURE = 3.0  # standard errors of a median that a difference has to exceed
LEAST = 0.02  # relative: what no run of a few rounds can see
SIZE = ["loss", "dtype", "N", "D", "C", "device", "mode"]
SWEPT = ":"  # a provider with an option set belongs to a sweep, and to no ranking
PEER = {"ours-sampled": "ours-sampled", "plain-sampled": "ours-sampled"}  # of all others: ours


def standard_error(values: pd.Series) -> float:
    """Of the median, relative, for values whose quartiles are those of a normal distribution."""
    if len(values) < 2:
        return math.nan
    spread = (values.quantile(0.75) - values.quantile(0.25)) / 1.349
    return float(1.2533 * spread / math.sqrt(len(values)) / values.median())


def of_yardstick(samples: pd.DataFrame) -> float:
    """The yardstick against itself, relative: the typical standard error of the ratio of a round's two."""
    yard = samples[samples["provider"] == YARDSTICK]
    key = [*SIZE, "run", "round"]
    first = yard[yard["place"] == "first"].set_index(key)["seconds"]
    again = yard[yard["place"] != "first"].set_index(key)["seconds"]
    ratios = (again / first).dropna().rename("ratio").reset_index()
    return math.nan if ratios.empty else float(ratios.groupby(SIZE)["ratio"].apply(standard_error).median())


def of_ratios(samples: pd.DataFrame, against: str) -> pd.Series:
    """The standard error of every case's median ratio to "ours" or to the yardstick, by KEY and run.

    Rounds are those of one run: times of two were not taken in turns.
    """
    own = samples[samples["provider"] != YARDSTICK]
    if own.empty:
        return pd.Series(dtype=float)
    if against == YARDSTICK:
        yard = samples[samples["provider"] == YARDSTICK]
        base = yard.groupby([*SIZE, "run", "round"])["seconds"].mean().rename("base")
        both = own.merge(base.reset_index(), on=[*SIZE, "run", "round"])
    else:
        own = own.assign(peer=own["provider"].str.partition(SWEPT)[0].map(PEER).fillna("ours"))
        base = own[[*SIZE, "run", "round", "provider", "seconds"]]
        base = base.rename(columns={"provider": "peer", "seconds": "base"})
        both = own.merge(base, on=[*SIZE, "run", "round", "peer"])
    both["ratio"] = both["seconds"] / both["base"]
    return both.groupby([*KEY, "run"])["ratio"].apply(standard_error)


def bands(rows: pd.DataFrame, samples: pd.DataFrame, against: str) -> pd.Series:
    """What a row's ratio has to differ by, relative, to differ at all; aligned with the rows.

    Infinite where there was one round: nobody knows.
    """
    known = of_ratios(samples, against)
    found = [known.get(tuple(key), math.nan) for key in rows[[*KEY, "run"]].itertuples(index=False, name=None)]
    return (SURE * pd.Series(found, index=rows.index, dtype=float)).fillna(math.inf).clip(lower=LEAST)
