"""Results as data: what `python -m perf run` leaves in a folder. runs.json: on what each run was measured."""

import gzip
import json
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from perf.suite import machine
from perf.suite.plans import KEY, Row

COLUMNS = {
    "loss": "arcface, cosface, arcface-straight-through or softmax",
    "dtype": "of embeddings, weights and gradients; tf32: float32 with products rounded to TF32",
    "N": "samples of the batch",
    "D": "width of the embeddings",
    "C": "classes",
    "device": "cpu or cuda",
    "provider": "who computes it",
    "title": "the same in words",
    "work": "all classes, or sampled: only equal work is compared",
    "mode": "no-grad, forward, forward+backward, frozen W, or whole step (with SGD's update of W), or its CUDA graph",
    "samples": "timed rounds after the first step, whose time counts only where the note says one step",
    "median_s": "seconds of a step, median over the rounds",
    "q25_s": "their lower quartile",
    "q75_s": "their upper quartile",
    "x_gemm": "in units of one N x D x C GEMM into a buffer that exists: median of the ratio within a round",
    "times_ours": "in units of ours (of the same work): median of the ratio within a round",
    "loss_value": "the loss of the first step",
    "peak_mb": "10^6 bytes at the peak of a step beyond W, the optimiser's state and the inputs: allocations counted",
    "beyond_mb": "the same without the gradient of W",
    "error_loss": "relative distance of the loss from float64, at N = 64, C = 1000",
    "error_dx": "of the gradient of the embeddings",
    "error_dw": "of the gradient of W",
    "bias_dx": "by how much the gradient is too large or small as a whole",
    "bias_dw": "the same of W's",
    "wrong": "why it is wrong, empty for right; a wrong row is not ranked",
    "note": "why nothing was measured, or not all",
    "limit_s": "about the least time: products at the GEMM's rate or memory traffic at the copy's, the larger",
    "run": "key of runs.json",
}

FILES = {
    "results.csv": list(COLUMNS),  # a line per case (size x provider x mode)
    "samples.csv.gz": [*KEY, "round", "position", "seconds", "run"],  # per timed step; "first": the baseline before all
    "ceilings.csv": ["kind", "dtype", "per_second", "unit", "run"],  # what the machine does at best
}
MEND = "delete it, or choose another folder"
NOT_BEGUN = "not begun"  # how the note of a case starts whose run was out of time
TEXT = ("wrong", "note", "position", "run", "title", "work")
WORDS = {*TEXT, "loss", "dtype", "device", "provider", "mode", "kind", "unit"}  # all other columns hold numbers
# Times of two of them are no comparison.
MACHINE = ("cpu", "instruction_set", "caches", "cores", "threads", "torch", "gpu", "device")


Block = tuple[list[Row], list[Row]]  # a line per case; a line per timed step, on a GPU per round, their median


class Results(NamedTuple):
    rows: pd.DataFrame
    samples: pd.DataFrame
    ceilings: pd.DataFrame
    runs: dict[str, Row]


def load(folder: Path) -> Results:
    """What a folder holds, with empty tables for what is missing; ValueError for a file that no run leaves."""

    def table(name: str) -> pd.DataFrame:
        path = folder / name
        if path.suffix == ".csv" and path.exists() and not path.read_bytes().endswith(b"\n"):
            raise ValueError(f"{name} is empty or ends in the middle of a line; {MEND}")
        try:
            frame = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str))
        except (FileNotFoundError, pd.errors.EmptyDataError):
            return pd.DataFrame(columns=FILES[name])
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{name} cannot be read: {error}; {MEND}") from error
        if lacks := {*FILES[name]} - {*frame.columns}:
            raise ValueError(f"{name} lacks the columns {', '.join(sorted(lacks))}; {MEND}")
        for column in sorted({*FILES[name]} - WORDS) if len(frame) else ():
            if not pd.api.types.is_numeric_dtype(frame[column]):
                raise ValueError(f"{name} has words in {column}, a column of numbers; {MEND}")
        return frame.fillna({column: "" for column in ("wrong", "note", "position") if column in frame})

    path = folder / "runs.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(runs, dict) or not all(isinstance(each, dict) for each in runs.values()):
        raise ValueError(f"runs.json is not what a run leaves; {MEND}")
    return Results(*map(table, FILES), runs)


def save(folder: Path, results: Results) -> None:
    """Written beside and then put in place, so that a run stopped at any moment leaves whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "runs.json", json.dumps(results.runs, indent=1).encode() + b"\n")
    # Rows last: what they hold is not measured again.
    for (name, columns), frame in reversed([*zip(FILES.items(), results[:3], strict=True)]):
        text = frame.reindex(columns=columns).to_csv(index=False, float_format="%.6g").encode()
        replace(folder / name, gzip.compress(text, mtime=0) if name.endswith(".gz") else text)


def replace(path: Path, content: bytes) -> None:
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def of_this_machine(folder: Path, facts: Row) -> Results:
    """What a folder holds; ValueError if another machine measured it."""
    held = load(folder)
    if other := another_machine(held.runs, facts):
        raise ValueError(f"{folder} holds results of another machine: {other}; choose another folder, --out")
    return held


def another_machine(runs: dict[str, Row], facts: Row) -> str:
    """On what the runs were measured, if that differs from `facts`; or nothing. A GPU is another one."""
    for held in runs.values():
        if any(held.get(name) != facts.get(name) for name in MACHINE):
            return machine.one_line(held)
    return ""


def key_of(line: Row) -> tuple[Any, ...]:
    return tuple(line[name] for name in KEY)


def is_open(row: Row) -> bool:
    """Whether a case was not begun, or lacked something that is installed by now."""
    note = str(row["note"])
    lacked = note.endswith("is not installed")
    return note.startswith(NOT_BEGUN) or (lacked and find_spec(note.split()[0]) is not None)


def add_block(rows: dict[tuple[Any, ...], Row], samples: list[Row], block: Block, wanted: set[tuple[Any, ...]]) -> None:
    """Put a size that was measured, with the lines of what was `wanted`, among all `rows` and `samples`.

    Others took part to be divided by: their samples stay beside those of the run that their own line is of.
    A line without a measurement does not replace one with.
    """
    taken, (measured, timed) = {}, block
    for row in measured:
        key = key_of(row)
        if key not in rows or (key in wanted and (row["samples"] > 0 or not rows[key]["samples"] > 0)):
            taken[key] = row
    rows |= taken
    samples[:] = [line for line in samples if key_of(line) not in taken] + timed
