"""What the tests of the perf suite share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

for module in ("pandas", "matplotlib", "tabulate", "typer", "rich", "jinja2"):
    pytest.importorskip(module, reason=f"{module} is part of the perf extra: pip install -e '.[perf]'")

from perf import providers  # noqa: E402
from perf.providers.base import Provider  # noqa: E402
from perf.suite.problem import Problem  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SMALL = Problem(n=6, d=8, classes=200)


def ready(name: str, problem: Problem = SMALL) -> Provider:
    provider = providers.make(name)
    provider.prepare(problem, problem.tensors())
    return provider


def fp32_line(provider: str, mode: str, **numbers: Any) -> dict[str, Any]:
    return {"loss": "arcface", "provider": provider, "title": provider, "mode": mode, "dtype": "float32", "N": 256,
            "D": 512, "C": 131_072, "device": "cpu", "samples": 5, "beyond_mb": math.nan, "median_s": math.nan,
            "times_ours": math.nan, "x_gemm": math.nan, "wrong": "", "note": "", **numbers}  # fmt: skip
