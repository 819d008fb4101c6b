"""What the tests of the perf suite share."""

from __future__ import annotations

import math

from perf.problem import Problem

SMALL = Problem(n=6, d=8, classes=200)


def quiet(_: str) -> None:
    """Says nothing."""


def fp32_line(provider: str, mode: str, **numbers: float) -> dict[str, object]:
    return {"loss": "arcface", "provider": provider, "title": provider, "mode": mode, "dtype": "float32", "N": 256,
            "D": 512, "C": 131_072, "device": "cpu", "samples": 5, "rss_mb": math.nan, "beyond_mb": math.nan,
            "median_s": math.nan, "times_ours": math.nan, "x_gemm": math.nan, **numbers}  # fmt: skip
