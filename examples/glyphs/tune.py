"""`python -m examples.glyphs.tune`: the same number of recipes for each loss, the page's table of tries.

Every try has the same steps and is measured on the validation characters, which are neither trained on nor evaluated
in the report. Writes tried.json after every try.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from examples.glyphs import evaluate, fonts
from examples.glyphs.data import Batches, split
from examples.glyphs.recipes import TRIED, Budget, Recipe, Settings
from examples.glyphs.train import train


def tries(steps: int) -> list[tuple[str, Recipe]]:
    """The grid: optimiser, learning rates of the network and of the class weights, scale and margin."""
    warm = 2 * steps // 5
    margin = [
        Recipe("adamw", 2e-3, 1e-2, s=32.0, m=0.3, margin_steps=warm),
        Recipe("adamw", 4e-3, 2e-2, s=32.0, m=0.3, margin_steps=warm),
        Recipe("adamw", 4e-3, 1e-2, s=32.0, m=0.2, margin_steps=warm),
        Recipe("adamw", 2e-3, 1e-2, s=24.0, m=0.3, margin_steps=warm),
        Recipe("sgd", 0.1, 1.0, s=32.0, m=0.3, margin_steps=warm),
        Recipe("adamw", 2e-3, 1e-2, s=16.0, m=0.3, margin_steps=warm),
        Recipe("adamw", 4e-3, 2e-2, s=24.0, m=0.3, margin_steps=warm),
        Recipe("adamw", 4e-3, 2e-2, s=16.0, m=0.2, margin_steps=warm),
        Recipe("sgd", 0.2, 0.1, s=16.0, m=0.2, margin_steps=warm),
        Recipe("sgd", 0.2, 0.03, s=16.0, m=0.2, margin_steps=warm),
        Recipe("sgd", 0.2, 0.1, s=24.0, m=0.2, margin_steps=warm),
    ]
    plain = [
        Recipe("sgd", 0.1, 1.0),
        Recipe("sgd", 0.2, 1.0),
        Recipe("sgd", 0.1, 3.0),
        Recipe("adamw", 2e-3, 1e-2),
        Recipe("adamw", 4e-3, 2e-2),
        Recipe("sgd", 0.1, 0.5),
        Recipe("sgd", 0.2, 2.0),
        Recipe("sgd", 0.4, 1.0),
        Recipe("sgd", 0.4, 0.5),
        Recipe("sgd", 0.05, 1.0),
        Recipe("adamw", 1e-3, 3e-2),
    ]
    return [("arcface", recipe) for recipe in margin] + [("softmax", recipe) for recipe in plain]


def main() -> None:
    parser = argparse.ArgumentParser("python -m examples.glyphs.tune", description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache", type=Path, default=Path(".cache/glyphs"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    glyphs = fonts.load(("han",), cache=options.cache)
    parts = split(glyphs, options.classes)
    gallery = glyphs.weights.index(evaluate.GALLERY)
    rows = []
    for loss, recipe in tries(options.steps):
        settings = Settings(loss, Budget(steps=options.steps), classes=options.classes, recipe=recipe)
        with tempfile.TemporaryDirectory() as folder:
            run = train(settings, Batches(glyphs, parts.train, settings.batch), Path(folder), interval=1e9)
        numbers, _ = evaluate.summary(evaluate.embed(run.network, glyphs, parts.validation), gallery)
        rows.append(
            {
                "loss": loss,
                "network": f"{recipe.optimizer} {recipe.lr:g}",
                "head": f"{recipe.head_lr:g}",
                "margin": f"s={recipe.s:g}, m={recipe.m:g} after {recipe.margin_steps} steps" if recipe.s else "none",
                **{f"tar{far:g}": round(numbers[f"tar_at_far_{far:g}"], 3) for far in evaluate.FALSE_ACCEPTS},
                "rank1": round(numbers["rank1"], 3),
            }
        )
        print(rows[-1], flush=True)
        TRIED.write_text(
            json.dumps({"steps": options.steps, "classes": options.classes, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
