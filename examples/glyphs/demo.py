"""The demo from the fonts to the page."""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict, replace

import numpy as np
import torch

from examples.glyphs import evaluate, fonts, memory, page, plots
from examples.glyphs.data import Batches, split
from examples.glyphs.network import EMBEDDING_DIM, GlyphNet, autocast
from examples.glyphs.recipes import Budget, Settings
from examples.glyphs.train import PLATEAU, RETAINED, Run, train


def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    glyphs = fonts.load(tuple(options.scripts), limit=options.limit, cache=options.cache)
    parts = split(glyphs, options.classes, options.unseen, seed=options.seed)
    batches = Batches(glyphs, parts.train, options.batch, options.seed)
    budget = Budget(steps=options.steps) if options.steps else Budget(seconds=60.0 * options.minutes)
    common = {"budget": budget, "classes": options.classes, "scripts": tuple(options.scripts), "limit": options.limit,
              "unseen": options.unseen, "batch": options.batch, "seed": options.seed}  # fmt: skip
    settings = {loss: Settings(loss, **common) for loss in dict.fromkeys(options.loss)}
    runs = {}
    for loss, chosen in settings.items():
        folder = options.cache / "runs" / chosen.name
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{loss}: {budget} on {options.classes:,} characters, checkpoint in {folder}")
        runs[loss] = train(chosen, batches, folder, options.interval)
    most = max(run.step for run in runs.values())
    levelled = {loss: level(slow, most, batches, options) for loss, slow in runs.items() if slow.step < most}
    report(options, glyphs, parts.unseen, batches, runs, levelled)
    print(f"{time.monotonic() - began:.0f} s in all; the page is {options.out / 'index.html'}")


def level(slow: Run, steps: int, batches: Batches, options: argparse.Namespace) -> Run:
    """Give a run the steps that it lacked, from the end of its plateau."""
    settings = replace(slow.settings, budget=Budget(steps=steps))
    plateau = options.cache / "runs" / slow.settings.name / PLATEAU
    print(f"{settings.loss}: the same run with {steps} steps instead of {slow.step}")
    return train(settings, batches, plateau.parent / f"{steps}-steps", options.interval, begin=plateau)


def report(
    options: argparse.Namespace,
    glyphs: fonts.Glyphs,
    unseen: np.ndarray,
    batches: Batches,
    runs: dict[str, Run],
    levelled: dict[str, Run],
) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    gallery = glyphs.weights.index(evaluate.GALLERY)
    first = next(iter(runs.values())).settings
    untrained = Run.start(first)
    settle(untrained.network, batches)
    results, verifications, neighbours = [], {}, {}
    for name, title, done in [
        *((loss, plots.NAMES[loss], done) for loss, done in runs.items()),
        *((f"{loss}_equal_steps", f"{plots.NAMES[loss]}, at equal steps", done) for loss, done in levelled.items()),
        ("untrained", "untrained", untrained),
    ]:
        print(f"evaluating {title} on {len(unseen):,} unseen characters")
        embeddings = evaluate.embed(done.network, glyphs, unseen)
        numbers, verification = evaluate.summary(embeddings, gallery)
        results.append({"name": name, "title": title, "steps": done.step, "seconds": done.seconds, **numbers})
        if name in plots.NAMES:
            verifications[name] = verification
            neighbours[name] = evaluate.nearest(embeddings, gallery, min(5, len(unseen)))

    plots.curves(options.out / "curves.png", {loss: done.curves for loss, done in runs.items()})
    plots.roc(options.out / "roc.png", verifications)
    plots.neighbours(options.out / "neighbours.png", glyphs, unseen, neighbours, gallery, options.seed)
    plots.augmented(options.out / "pictures.png", glyphs, unseen)
    print("measuring the head's memory")
    metrics = {
        "classes": options.classes,
        "unseen": len(unseen),
        "embedding_dim": EMBEDDING_DIM,
        "network_parameters": sum(p.numel() for p in untrained.network.parameters()),
        "gallery": evaluate.GALLERY,
        "batch": options.batch,
        "seed": options.seed,
        "budget": str(first.budget),
        "decay": first.decay,
        "results": results,
        "levelled": [row["title"] for row in results if row["name"].endswith("_equal_steps")],
        "steps": max(done.step for done in runs.values()),
        "steps_per_epoch": batches.steps_per_epoch,
        "epoch_seconds": {loss: done.seconds / done.step * batches.steps_per_epoch for loss, done in runs.items()},
        "retain_bytes": RETAINED,
        "memory": [
            {"loss": loss, **memory.compare(done.settings, classes, RETAINED)}
            for loss, done in runs.items()
            for classes in (options.classes, 10 * options.classes)
        ],
        "recipes": {loss: asdict(done.settings.recipe) for loss, done in runs.items()},
        "machine": page.machine(),
    }
    page.write(options.out, metrics)
    for row in results:
        rates = ", ".join(f"TAR at FAR {far:g} {row[f'tar_at_far_{far:g}']:.4f}" for far in evaluate.FALSE_ACCEPTS)
        print(f"{row['title']:26}{row['steps']:6} steps{row['seconds']:5.0f} s   {rates}, rank-1 {row['rank1']:.4f}")


@torch.no_grad()
def settle(network: GlyphNet, batches: Batches, steps: int = 20) -> None:
    """An untrained network whose BatchNorms know their means: nothing is learned, but it is not handicapped either."""
    network.train()
    for step in range(steps):
        pictures, _ = batches(step)
        with autocast():
            network(pictures)
