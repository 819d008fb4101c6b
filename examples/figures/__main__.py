"""`python -m examples.figures [--out DIR] [--steps N]`: trains, draws, writes PNGs and numbers.json."""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from examples.figures import curves, hinges, planes, training
from examples.glyphs import page

MORE = "".join(map(chr, range(0x5341, 0x5341 + 200)))  # two hundred characters in a row of Unicode


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports/figures"))
    parser.add_argument("--steps", type=int, default=400, help="of every training")
    parser.add_argument("--largest", type=int, default=100_000, help="classes of the largest untrained head")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, object] = {
        "command": "python -m examples.figures", "date": time.strftime("%Y-%m-%d"), "machine": page.machine(),
        "steps": options.steps, "batch": training.BATCH,
    }  # fmt: skip

    def save(name: str, figure: Figure) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=90)
        plt.close(figure)
        # 256 colours do for points and lines, in a third of the bytes.
        Image.open(buffer).convert("RGB").quantize(256).save(options.out / f"{name}.png", optimize=True)

    for task in tqdm(["curves", "hinges", "digits", "glyphs", "convergence"], desc="figures"):
        if task == "curves":
            save(task, curves.draw())
        elif task == "hinges":
            figure, grown = hinges.draw(options.largest)
            numbers[task] = {name: line._asdict() for name, line in grown.items()}
            save(task, figure)
        elif task == "convergence":
            figure, numbers[task] = hinges.convergence(training.glyphs(MORE), options.steps)
            save(task, figure)
        else:
            figure, numbers[task] = planes.draw(getattr(training, task)(), options.steps)
            save(f"plane_{task}", figure)
    (options.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
