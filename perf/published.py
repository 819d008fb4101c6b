"""Heads of published sizes on one machine of GPUs, planned, beside what insightface measured: plan.csv and plan.md."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd

from perf.gpus import NODES
from perf.planned import RESERVED, gb, plan
from perf.scale import Head

GPU, RANKS, DIM, BATCH = "h100", 8, 512, 128
CLASSES = (1_000_000, 10_000_000, 29_000_000, 100_000_000)
SOURCE = "deepinsight/insightface, recognition/arcface_torch/docs/speed_benchmark.md (2021-07)"
# 8 V100-32GB, ResNet50, mixed precision, 128 samples a GPU: samples per second, MB of a GPU. By classes and rate.
PUBLISHED = {
    (1_000_000, 1.0): (3449, 9966), (1_000_000, 0.1): (4803, 5620), (29_000_000, 0.1): (1855, 32324),
}  # fmt: skip


def table() -> pd.DataFrame:
    """Two lines a size and rate: the plain setting, and the first one that fits."""
    node, lines = NODES[GPU], []
    for classes in CLASSES:
        for rate in (0.1, 1.0):
            made = plan(Head(classes, DIM, BATCH, RANKS, rate, compute_item=2, fused=True), node)
            shown: dict[str, Any] = {"plain": made.options[0]}
            if made.recommended is not made.options[0]:
                shown["recommended"] = made.recommended
            speed, used = PUBLISHED.get((classes, rate), (None, None))
            for name, each in shown.items():
                line: dict[str, Any] = {"classes": classes, "rate": rate, "line": name}
                if each is None:
                    lines.append(line | {"setting": "none fits"})
                    continue
                lines.append(line | {
                    "setting": each.setting, "predicted_gb": each.memory.peak / 1e9,
                    "fits": "yes" if each.fits(made.room) else "NO", "predicted_ms": 1e3 * each.step.total,
                    "predicted_samples_per_s": RANKS * BATCH / each.step.total if each.fits(made.room) else None,
                    "bound_by": each.step.bound, "published_samples_per_s": speed,
                    "published_gb": used and used / 1e3,
                })  # fmt: skip
    return pd.DataFrame(lines)


def write(frame: pd.DataFrame, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "plan.csv", index=False, float_format="%.5g")
    node = NODES[GPU]
    shown = frame.assign(
        classes=frame["classes"].map("{:,}".format),
        predicted_samples_per_s=frame["predicted_samples_per_s"].map(
            lambda rate: "" if rate != rate else f"{rate:,.0f}"
        ),
        published_samples_per_s=frame["published_samples_per_s"].map(
            lambda rate: "" if rate != rate else f"{rate:,.0f}"
        ),
    )
    text = f"""# Heads of up to 100 million classes on {RANKS} GPUs, planned

Written by `python -m perf plan-table` on {time.strftime("%Y-%m-%d")}.
{RANKS} x {node.gpu.name}, D={DIM}, {BATCH} samples a GPU, momentum SGD, bfloat16 products.
**Every time and every memory number of ours is predicted, none was measured on a GPU**: memory by the formula of
`perf/scale.py`, which `python -m perf scale-check` holds to measured peaks of real processes on CPUs
([plan_check.csv](plan_check.csv)); times by the model of [kernels.md](kernels.md) from published rates. A setting fits
if it leaves {gb(RESERVED)} GB of the {gb(node.capacity)} GB.

{shown.to_markdown(index=False, floatfmt=".3g")}

"plain" is the first setting asked for, with a dense gradient; "recommended" the first that fits, where that is another:
`python -m perf plan --classes 29e6 --dim {DIM} --batch {BATCH} --gpus {RANKS} --gpu {GPU}` lists them all.

## Beside what was published

Published columns: {SOURCE}; rate 1.0 is their model parallel, 0.1 their Partial FC.
They differ in more than the code:

- They ran 8 V100 with 32 GB in 2021 (125 TFLOP/s in float16, 0.9 TB/s, NVLink 2); ours are predicted for
  {node.gpu.name}.
- Their memory and their speed include a ResNet50, its activations for {BATCH} samples and the data loading; ours is the
  head alone: its memory has to be added to a backbone's, and samples/s of the head alone is a limit that a training
  with a backbone cannot reach. The two columns are not a comparison of speed.
- Their numbers are measured, ours are predicted. Where there is none, they published none for that size.
- Their logits are materialised, 4 N C r / R bytes a copy with N of all GPUs, several copies of them; ours never are.
"""
    page = out / "plan.md"
    page.write_text(text)
    return page
