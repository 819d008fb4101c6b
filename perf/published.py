"""Heads of published sizes on one machine of GPUs, planned, beside what insightface measured: plan.csv and plan.md."""

from __future__ import annotations

import time
from pathlib import Path

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
    """Three lines a size and rate: the plain setting, the update in backward, and that with everything in bfloat16."""
    node, lines = NODES[GPU], []
    for classes in CLASSES:
        for rate in (0.1, 1.0):
            made = plan(Head(classes, DIM, BATCH, RANKS, rate, compute_item=2, fused=True), node)
            speed, used = PUBLISHED.get((classes, rate), (None, None))
            for each in (made.options[0], made.options[2], made.options[4]):
                fits = each.fits(made.room)
                lines.append({
                    "classes": classes, "rate": rate, "setting": each.form, "predicted_gb": each.memory.peak / 1e9,
                    "fits": "recommended" if each is made.recommended else "yes" if fits else "NO",
                    "predicted_ms": 1e3 * each.step.total,
                    "predicted_samples_per_s": RANKS * BATCH / each.step.total if fits else None,
                    "bound_by": each.step.bound, "published_gb": used and used / 1e3, "published_samples_per_s": speed,
                })  # fmt: skip
    return pd.DataFrame(lines)


def write(frame: pd.DataFrame, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "plan.csv", index=False, float_format="%.5g")
    node = NODES[GPU]
    shown = frame.assign(classes=frame["classes"].map("{:,}".format))
    for name, digits in (("predicted_samples_per_s", ",.0f"), ("published_samples_per_s", ",.0f"),
                         ("published_gb", ".3g")):  # fmt: skip
        shown[name] = frame[name].map(lambda value, digits=digits: "" if pd.isna(value) else format(value, digits))
    shown.columns = [name.replace("_", " ") for name in shown]
    text = f"""# Heads of up to 100 million classes on {RANKS} GPUs, planned

Written by `python -m perf plan-table` on {time.strftime("%Y-%m-%d")}.
{RANKS} x {node.gpu.name}, D={DIM}, {BATCH} samples a GPU, momentum SGD, bfloat16 products.
**Every time and every memory number of ours is predicted, none was measured on a GPU**: memory by the formula of
`perf/scale.py`, which `python -m perf scale-check` holds to measured peaks of real processes on CPUs
([plan_check.csv](plan_check.csv)); times by the model of [kernels.md](kernels.md) from published rates. A setting fits
if it leaves {gb(RESERVED)} GB of the {gb(node.gpu.capacity)} GB.

{shown.to_markdown(index=False, floatfmt=".3g")}

"recommended" marks the fastest setting that fits, with the dtypes and the rate of the first that does. All of them:
`python -m perf plan --classes 29e6 --dim {DIM} --batch {BATCH} --gpus {RANKS} --gpu {GPU}`.
What it leaves is all that a backbone can have. Bound by the launches: {BATCH * RANKS} samples are few for so many
chunks, and the kernels' own time is below it.

## Beside what was published

Published columns: {SOURCE};
rate 1 is their model parallel, 0.1 their Partial FC. They differ in more than the code:

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
