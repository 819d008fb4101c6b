"""One process and two ranks over three seeds: do the ranks learn what the one process learns?

`python -m examples.glyphs.sharded --compare --classes 6000 --unseen 2000 --steps 900`
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

from examples.glyphs import page
from examples.glyphs.partial_fc import REPORT

SEEDS = (0, 1, 2)
NUMBERS = ("tar_at_far_0.001", "rank1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Of each: what is put in front of `-m examples.glyphs.sharded`, and its fraction of the classes.
KINDS = {"two_ranks": (TORCHRUN, None), "one_process": ((), None), "one_process_all_classes": ((), 1.0)}


def run(options: argparse.Namespace) -> None:
    """Every kind with every seed, the same characters and batches for all kinds; then the table.

    A seed stands for other batches, another start and another choice of unseen characters, so what the seeds of a kind
    differ by is chance, and what two kinds differ by at the same seed is more than that only if it exceeds it.
    """
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for seed in SEEDS:
        for kind, (launcher, rate) in KINDS.items():
            found[kind].append(one(options, launcher, options.rate if rate is None else rate, seed))
            print(kind, seed, {name: round(found[kind][-1][name], 4) for name in NUMBERS}, flush=True)
    shown = ("classes", "unseen", "batch", "steps")
    metrics = {
        **{name: found["two_ranks"][0][name] for name in shown},
        "sample_rate": options.rate,
        "seeds": SEEDS,
        "kinds": {
            kind: {name: summary([row[name] for row in rows]) for name in NUMBERS} for kind, rows in found.items()
        },
        "two_ranks_less_one_process": {name: difference(found, name) for name in NUMBERS},
        "machine": page.machine() | {"threads": 1},
        "date": datetime.date.today().isoformat(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sharded_seeds.json"
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics["two_ranks_less_one_process"], indent=1), path)


def one(options: argparse.Namespace, launcher: tuple[str, ...], rate: float, seed: int) -> dict:
    """The report of one run in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        line = [f"--{name}={getattr(options, name)}" for name in ("steps", "classes", "unseen", "batch", "cache")]
        line += [f"--limit={options.limit}"] if options.limit else []
        line += [f"--rate={rate}", f"--seed={seed}", f"--out={folder}", "--threads=1", "--fresh", "--interval=1e9"]
        command = [sys.executable, *launcher, "-m", "examples.glyphs.sharded", *line]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / REPORT).read_text())


def summary(values: list[float]) -> dict[str, object]:
    return {"mean": fmean(values), "deviation": stdev(values), "values": values}


def difference(found: dict[str, list[dict]], name: str) -> dict[str, object]:
    """Of the means; within the spread if no larger than what the seeds of the one process are apart."""
    two, one_process = ([row[name] for row in found[kind]] for kind in ("two_ranks", "one_process"))
    mean, spread = fmean(two) - fmean(one_process), max(one_process) - min(one_process)
    by_seed = [a - b for a, b in zip(two, one_process, strict=True)]
    return {"mean": mean, "spread_of_one_process": spread, "within_spread": abs(mean) <= spread, "by_seed": by_seed}
