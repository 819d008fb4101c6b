"""One process and two ranks over three seeds: do the ranks learn what the one process learns?

`python -m examples.glyphs.sharded --compare`; the first two kinds took 28 minutes on two cores beside other work
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from examples.glyphs import page
from examples.glyphs.partial_fc import REPORT

SEEDS = (0, 1, 2)
NUMBERS = ("tar_at_far_0.001", "rank1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Of each: what is put in front of `-m examples.glyphs.sharded`, and its fraction of the classes.
KINDS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "two_ranks": (TORCHRUN, None),
    "one_process": ((), None),
    "one_process_all_classes": ((), 1.0),
}


def run(options: argparse.Namespace) -> None:
    """Every kind with every seed, the same characters and batches for all kinds; then the table.

    A seed stands for other batches, another start and another choice of unseen characters, so what the seeds of a kind
    differ by is chance, and what two kinds differ by at the same seed is more than that only if it exceeds it.

    With `--kinds` only those are run; the others stay as they are in the report, if it is of the same settings.
    """
    asked = options.kinds or list(KINDS)
    if unknown := set(asked) - set(KINDS):
        raise SystemExit(f"--kinds are among {', '.join(KINDS)}, got {min(unknown)!r}")
    settings = {name: getattr(options, name) for name in ("classes", "unseen", "batch", "steps")}
    settings |= {"sample_rate": options.rate, "seeds": list(SEEDS), "machine": page.machine() | {"threads": 1}}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sharded_seeds.json"
    held = json.loads(path.read_text()) if options.kinds and path.exists() else {"kinds": {}, **settings}
    if other := [name for name, value in settings.items() if held.get(name) != value]:
        raise SystemExit(f"{path} has another {other[0]} than these runs; choose another --out")
    found: dict[str, list[dict]] = {kind: [] for kind in asked}
    for seed in SEEDS:
        for kind in asked:
            found[kind].append(one(options, kind, seed))
            print(kind, seed, {name: round(found[kind][-1][name], 4) for name in NUMBERS}, flush=True)
    new = {kind: {name: summary([row[name] for row in rows]) for name in NUMBERS} for kind, rows in found.items()}
    kinds = {kind: (held["kinds"] | new)[kind] for kind in KINDS if kind in held["kinds"] or kind in new}
    differences = {}
    if {"two_ranks", "one_process"} <= set(kinds):
        two, one_process = kinds["two_ranks"], kinds["one_process"]
        differences["two_ranks_less_one_process"] = {name: difference(two[name], one_process[name]) for name in NUMBERS}
    metrics = {**settings, "kinds": kinds, **differences, "date": datetime.date.today().isoformat()}
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(differences, indent=1), path)


def one(options: argparse.Namespace, kind: str, seed: int) -> dict:
    """The report of one run in processes of its own."""
    launcher, rate = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        line = [f"--{name}={getattr(options, name)}" for name in ("steps", "classes", "unseen", "batch", "cache")]
        line += [f"--limit={options.limit}"] if options.limit else []
        line += [f"--rate={options.rate if rate is None else rate}", f"--seed={seed}", f"--out={folder}"]
        line += ["--threads=1", "--fresh", "--interval=1e9"]
        command = [sys.executable, *launcher, "-m", "examples.glyphs.sharded", *line]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / REPORT).read_text())


def summary(values: list[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "deviation": stdev(values), "values": values}


def difference(two: dict[str, Any], other: dict[str, Any]) -> dict[str, object]:
    """Of the means; within the spread if no larger than what the seeds of the other kind are apart."""
    mean, spread = two["mean"] - other["mean"], max(other["values"]) - min(other["values"])
    by_seed = [a - b for a, b in zip(two["values"], other["values"], strict=True)]
    return {"mean": mean, "spread_of_the_other": spread, "within_spread": abs(mean) <= spread, "by_seed": by_seed}
