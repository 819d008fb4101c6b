"""`python -m examples.million`: a head of 4,000,000 x 512 in float32 trained on a machine with 24 GB.

The weight and its momentum are 16.4 GB. A gradient of the weight would be 8.2 GB more, so there is none: the rows are
updated inside backward (`head.update_in_backward`). The embeddings are random, in a few batches that come again and
again: what is shown is memory, time, and that the loss of what is seen again falls.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import tritonmargin as tm
from perf.suite.machine import commit

BATCHES = 4


def main(line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m examples.million", description=__doc__)
    parser.add_argument("--classes", type=lambda text: int(float(text)), default=4_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.025, 0.05, 0.1, 0.2], help="sampling rates")
    parser.add_argument("--steps", type=int, default=8, help="steps at each rate")
    parser.add_argument("--out", type=Path, default=Path("reports/million"), help="writes OUT.json and OUT.md")
    options = parser.parse_args(line)
    found = train(options)
    found["usual code"] = usual_code(options)
    write(options.out, found)
    return 0 if found["peak over weight and momentum"] <= 1.15 else 1


def train(options: argparse.Namespace) -> dict[str, object]:
    c, d, n = options.classes, options.dim, options.batch
    before = peak_bytes()
    begin = time.perf_counter()
    head = tm.MarginSoftmaxLoss(d, c, tm.ArcFace(m=0.3, s=32.0), sample_rate=1.0)
    optimizer = tm.optim.RowSGD(head.parameters(), lr=1.0, momentum=0.9)
    head.update_in_backward(optimizer)
    made = time.perf_counter() - begin
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, d, generator=generator), torch.randint(c, (n,), generator=generator)) for _ in range(BATCHES)
    ]
    losses = []

    def step(number: int, ids: torch.Tensor | None) -> float:
        x, target = batches[number % BATCHES]
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = head(x.clone().requires_grad_(), target, class_ids=ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        return time.perf_counter() - began

    # Every row once: from here on all of the weight and of the momentum is in memory.
    print(f"one step over all {c:,} classes")
    full = step(0, None)
    rows = []
    with tqdm(total=len(options.rates) * options.steps, unit="step") as bar:
        for rate in options.rates:
            times = []
            for number in range(options.steps):
                began = time.perf_counter()
                ids = tm.sample_classes(batches[number % BATCHES][1], c, round(rate * c), generator)
                sampling = time.perf_counter() - began
                times.append((step(number, ids) + sampling, sampling))
                bar.update()
            seconds, drawing = (statistics.median(column) for column in zip(*times, strict=True))
            rows.append({"rate": rate, "rows": round(rate * c), "seconds": seconds, "of that sampling": drawing,
                         "microseconds a row": 1e6 * seconds / round(rate * c)})  # fmt: skip
    kept = head.weight.nbytes + optimizer.state[head.weight]["momentum_buffer"].nbytes
    per_row = [row["microseconds a row"] for row in rows]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {memory_of_machine() / 1e9:.1f} GB, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "classes": c, "dim": d, "batch": n,
        "weight and momentum, bytes": kept,
        "peak of the process, bytes": peak_bytes(),
        "before the head, bytes": before,
        "peak over weight and momentum": peak_bytes() / kept,
        "seconds to make the head": made,
        "seconds of a full step": full,
        "sampled": rows,
        "largest over smallest time a row": max(per_row) / min(per_row),
        "loss of the first batch, first and last": [losses[0], losses[-BATCHES]],
    }  # fmt: skip


def usual_code(options: argparse.Namespace) -> dict[str, object]:
    """What full logits and torch.optim.SGD have to hold, and what happens where that much is asked for here."""
    w = 4 * options.classes * options.dim
    logits = 4 * options.batch * options.classes
    needed = {"weight": w, "normalised weight": w, "logits": logits, "softmax": logits}
    needed |= {f"gradient of the {name}": needed[name] for name in ("logits", "normalised weight", "weight")}
    needed["momentum"] = w
    code = (
        "import resource, sys, torch\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({memory_of_machine()},) * 2)\n"
        f"held = []\nfor name, size in {list(needed.items())!r}:\n"
        "    try:\n        held.append(torch.empty(size // 4))\n"
        "    except RuntimeError:\n        sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return {
        "bytes": sum(needed.values()),
        "of": needed,
        "memory of this machine, bytes": memory_of_machine(),
        "first that does not fit": done.stderr.strip().splitlines()[-1] if done.returncode else None,
    }


def peak_bytes() -> int:
    """Most memory that this process had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write(out: Path, found: dict[str, object]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    usual = found["usual code"]
    at = f", commit {found['commit']}" if found["commit"] else ""
    first, last = found["loss of the first batch, first and last"]
    lines = [
        f"# {found['classes']:,} classes, D = {found['dim']}, float32, on one machine",
        "",
        f"`make demo-million`, {found['date']}{at}, {found['machine']}; N = {found['batch']}, ArcFace, RowSGD with "
        "momentum inside backward.",
        "",
        f"- Weight and momentum are {found['weight and momentum, bytes'] / 1e9:.2f} GB; the process never held "
        f"more than {found['peak of the process, bytes'] / 1e9:.2f} GB, "
        f"{found['peak over weight and momentum']:.3f} times that.",
        f"- Full logits and torch.optim.SGD would hold {usual['bytes'] / 1e9:.1f} GB of the machine's "
        f"{usual['memory of this machine, bytes'] / 1e9:.1f}; the first thing that does not fit: "
        f"{usual['first that does not fit']}.",
        f"- A step over all classes takes {found['seconds of a full step']:.1f} s; sampled steps, medians:",
        "",
        "| sample rate | rows | seconds | of that sampling | microseconds a row |",
        "|---|---|---|---|---|",
        *(
            f"| {row['rate']} | {row['rows']:,} | {row['seconds']:.2f} | {row['of that sampling']:.3f} "
            f"| {row['microseconds a row']:.2f} |"
            for row in found["sampled"]
        ),
        "",
        f"Time a row differs by at most a factor of {found['largest over smallest time a row']:.2f}. The loss of the "
        f"first batch went from {first:.2f} to {last:.2f}.",
    ]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
