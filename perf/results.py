"""Results as data: what `python -m perf run` leaves in a folder, and its schema.

results.csv     a line per case (size x provider x mode); COLUMNS has the meanings
samples.csv.gz  a line per timed step: the case, round, place of the yardstick in its round ("first" or ""), seconds
ceilings.csv    what the machine does at best: kind, dtype, amount per second, unit
runs.json       what each run was measured on, by its number
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from perf.measure import Row
from perf.providers import class_of

KEY = ["loss", "dtype", "N", "D", "C", "device", "provider", "mode"]
COLUMNS = {
    "loss": "arcface, cosface, arcface-straight-through or softmax",
    "dtype": "of embeddings, weights and gradients",
    "N": "samples of the batch",
    "D": "width of the embeddings",
    "C": "classes",
    "device": "cpu or cuda",
    "provider": "who computes it",
    "title": "the same in words",
    "work": "all classes, or sampled: only equal work is compared",
    "mode": "no-grad, forward, forward+backward, frozen W, or whole step (with SGD's update of W)",
    "samples": "timed steps after the first, whose time counts only where the note says one step",
    "median_s": "seconds of a step, median over the samples",
    "q25_s": "their lower quartile",
    "q75_s": "their upper quartile",
    "x_gemm": "in units of one N x D x C GEMM into a buffer that exists: median of the ratio within a round",
    "times_ours": "in units of ours (of the same work): median of the ratio within a round",
    "loss_value": "the loss of the first step",
    "peak_mb": "10^6 bytes at the peak of a step beyond W, the optimiser's state and the inputs: allocations counted",
    "beyond_mb": "the same without the gradient of W",
    "rss_mb": "10^6 bytes by which the resident set grew in the first step",
    "error_loss": "relative distance of the loss from float64, at N = 64, C = 1000",
    "error_dx": "of the gradient of the embeddings",
    "error_dw": "of the gradient of W",
    "bias_dx": "by how much the gradient is too large or small as a whole",
    "bias_dw": "the same of W's",
    "wrong": "why it is wrong, empty for right; a wrong row is not ranked",
    "note": "why nothing was measured, or not all",
    "flops": "of the products that the work needs, however it is written",
    "bytes": "of main memory that it needs: W once a walk, its gradient or update",
    "limit_s": "about the least time: products at the GEMM's rate or memory traffic at the copy's, the larger",
    "run": "key of runs.json",
}


SAMPLES = "samples.csv.gz"
NOT_BEGUN = "not begun"  # how the note of a case starts whose run was out of time
TEXT = ["wrong", "note", "place", "run", "title", "work"]


class Results(NamedTuple):
    rows: pd.DataFrame
    samples: pd.DataFrame
    ceilings: pd.DataFrame
    runs: dict[str, dict[str, Any]]


def load(out: Path) -> Results:
    """What a folder holds, with empty tables for what is missing; ValueError for a file that was cut short."""

    def table(name: str, columns: list[str]) -> pd.DataFrame:
        path = out / name
        if path.suffix == ".csv" and path.exists() and not path.read_bytes().endswith(b"\n"):
            raise ValueError(f"{name} ends in the middle of a line")
        frame = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str)) if path.exists() else pd.DataFrame(columns=columns)
        for column in ("wrong", "note", "place"):
            if column in frame:
                frame[column] = frame[column].fillna("")
        return frame

    path = out / "runs.json"
    return Results(
        table("results.csv", list(COLUMNS)),
        table(SAMPLES, [*KEY, "round", "place", "seconds", "run"]),
        table("ceilings.csv", ["kind", "dtype", "per_second", "unit", "run"]),
        json.loads(path.read_text()) if path.exists() else {},
    )


def save(out: Path, results: Results) -> None:
    """Written beside and then put in place, so that a run stopped at any moment leaves whole files."""
    out.mkdir(parents=True, exist_ok=True)
    replace(out / "runs.json", json.dumps(results.runs, indent=1).encode() + b"\n")
    rows = results.rows.reindex(columns=list(COLUMNS))
    # Rows last: what they hold is not measured again.
    for name, frame in (("ceilings.csv", results.ceilings), (SAMPLES, results.samples), ("results.csv", rows)):
        text = frame.to_csv(index=False, float_format="%.6g").encode()
        replace(out / name, gzip.compress(text, mtime=0) if name.endswith(".gz") else text)


def replace(path: Path, content: bytes) -> None:
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_bytes(content)
    beside.replace(path)


# Times of two of them are no comparison.
MACHINE = ("cpu", "instruction_set", "caches", "cores", "threads", "torch")


def another_machine(out: Path, facts: dict[str, Any]) -> str:
    """What the folder's results were measured on, if that differs from `facts`; or nothing. A GPU is another one."""
    names = (*MACHINE, "gpu", "device")
    for held in load(out).runs.values():
        if any(held.get(name) != facts.get(name) for name in names):
            return ", ".join(
                str(held[name]) if name in ("cpu", "gpu") else f"{name.replace('_', ' ')} {held[name]}"
                for name in names
                if held.get(name) and name not in ("caches", "device")
            )
    return ""


def beside(out: Path, facts: dict[str, Any]) -> Path:
    """`out`, or the folder next to it for this machine's results if it holds another's: perf-xeon-platinum-8481c."""
    if not another_machine(out, facts):
        return out
    words = re.sub(r"\([a-z]+\)|cpu|processor|@.*", " ", f"{facts.get('gpu') or facts['cpu']}".lower())
    name = "-".join([out.name, *re.findall(r"[a-z0-9]+", words)])
    places = (out.with_name(name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(place for place in places if not another_machine(place, facts))


def merged(old: pd.DataFrame, new: list[Row], key: list[str]) -> pd.DataFrame:
    """The old lines, but those whose key is among the new ones, and the new ones."""
    if not new:
        return old
    added = pd.DataFrame(new)
    if old.empty:
        return added
    fresh = set(added[key].itertuples(index=False, name=None))
    kept = [line not in fresh for line in old[key].itertuples(index=False, name=None)]
    parts = [part for part in (old[kept], added) if not part.empty]
    return pd.concat(parts, ignore_index=True)


def with_block(held: Results, rows: list[Row], samples: list[Row], wanted: set[tuple[Any, ...]]) -> Results:
    """The results and a size that was measured, with the lines of what was `wanted`.

    Others took part to be divided by: of them the samples are kept, beside those of the run that their own line is of.
    A line without a measurement does not replace one with.
    """
    measured = set(held.rows[held.rows["samples"] > 0][KEY].itertuples(index=False, name=None))
    there = set(held.rows[KEY].itertuples(index=False, name=None))
    taken = []
    for row in rows:
        key = tuple(row[name] for name in KEY)
        if key not in there or (key in wanted and (row["samples"] > 0 or key not in measured)):
            taken.append(row)
    replaced = {tuple(row[name] for name in KEY) for row in taken}
    old = held.samples
    kept = [line not in replaced for line in old[KEY].itertuples(index=False, name=None)]
    return held._replace(
        rows=merged(held.rows, taken, KEY),
        samples=merged(old[kept], samples, [*KEY, "run"]),
    )


def done(rows: pd.DataFrame) -> set[tuple[Any, ...]]:
    """The keys of the cases that need not be measured again: begun, and of a provider that was not installed later."""
    notes = rows["note"].astype(str)
    installed = rows["provider"].map(lambda name: class_of(name) is not None).astype(bool)
    later = notes.str.contains("No module named|^no provider", regex=True) & installed
    answered = rows[~notes.str.startswith(NOT_BEGUN) & ~later]
    return set(answered[KEY].itertuples(index=False, name=None))
