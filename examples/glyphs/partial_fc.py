"""The sharded demo from the fonts to the report."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch.distributed as dist

from examples.glyphs import evaluate, fonts, page
from examples.glyphs.data import Batches, split
from examples.glyphs.ranks import Run, train
from examples.glyphs.recipes import RECIPES, Budget, Settings

REPORT = "sharded.json"
SCRIPTS = ("hangul", "han")


def run(options: argparse.Namespace) -> None:
    """On every rank: train; then the first one evaluates and writes the report."""
    group = dist.group.WORLD if dist.is_initialized() else None
    settings, first = settings_of(options), group is None or dist.get_rank() == 0
    folder = folder_of(options)
    if first:
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        fonts.load(SCRIPTS, limit=options.limit, cache=options.cache)
    if group is not None:
        dist.barrier()  # the first rank has rendered
    glyphs = fonts.load(SCRIPTS, limit=options.limit, cache=options.cache)
    parts = split(glyphs, options.classes, options.unseen, seed=options.seed)
    state = Run.start(settings, options.rate, group)
    if first:
        print(f"{options.classes:,} characters, rank 0 of {state.world_size} has {len(state.head.weight):,}; {folder}")
    train(state, Batches(glyphs, parts.train, options.batch, options.seed), folder, options.interval, options.every)
    ranks = state.world_size
    if group is not None:
        dist.destroy_process_group()
    if first:
        report(options, state, ranks, glyphs, parts.unseen)


def settings_of(options: argparse.Namespace) -> Settings:
    """ArcFace's recipe, with warm-ups that fit into a short run."""
    recipe = RECIPES["arcface"]
    return Settings(
        "arcface", Budget(steps=options.steps), options.classes, SCRIPTS, options.limit, options.unseen, options.batch,
        options.seed, warm_up=min(50, 1 + options.steps // 10),
        recipe=replace(recipe, margin_steps=min(recipe.margin_steps, 1 + 2 * options.steps // 5)),
    )  # fmt: skip


def folder_of(options: argparse.Namespace) -> Path:
    """Of the checkpoints: one for all numbers of ranks."""
    return options.cache / "runs" / f"sharded-{options.rate:g}-{settings_of(options).name}"


def report(options: argparse.Namespace, state: Run, ranks: int, glyphs: fonts.Glyphs, unseen: np.ndarray) -> None:
    embeddings = evaluate.embed(state.network, glyphs, unseen)
    numbers, _ = evaluate.summary(embeddings, glyphs.weights.index(evaluate.GALLERY))
    progress = state.progress
    metrics = {
        "scripts": SCRIPTS,
        "classes": options.classes,
        "unseen": len(unseen),
        "embedding_dim": state.head.embedding_dim,
        "batch": options.batch,
        "sample_rate": options.rate,
        "seed": options.seed,
        "world_size": ranks,
        "classes_of_rank_0": len(state.head.weight),
        "steps": progress["step"],
        "seconds": progress["seconds"],
        "starts": [{"step": step, "world_size": size} for step, size in progress["starts"]],
        "loss": fmean(progress["losses"]),
        **numbers,
        "recipe": asdict(state.settings.recipe),
        "date": time.strftime("%Y-%m-%d"),
        "machine": page.machine(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / REPORT).write_text(json.dumps(metrics, indent=1) + "\n")
    rates = ", ".join(f"TAR at FAR {far:g} {numbers[f'tar_at_far_{far:g}']:.4f}" for far in evaluate.FALSE_ACCEPTS)
    print(
        f"{ranks} ranks, sample rate {options.rate:g}: {progress['step']} steps, {progress['seconds']:.0f} s, "
        f"{rates}, rank-1 {numbers['rank1']:.4f}; {options.out / REPORT}"
    )
