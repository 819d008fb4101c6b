"""The page: what was trained, what came out, and how it was compared."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import jinja2
import torch

from examples.glyphs.plots import NAMES
from examples.glyphs.recipes import TRIED
from perf.suite.machine import commit

TEMPLATE = Path(__file__).with_name("page.html")  # jinja2


def machine() -> dict[str, object]:
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def write(folder: Path, metrics: dict) -> None:
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(
        m=metrics, names=NAMES, tried=json.loads(TRIED.read_text()), mib=lambda value: f"{value / 2**20:,.0f} MiB"
    )
    (folder / "index.html").write_text(page)
