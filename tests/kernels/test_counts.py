"""What a step costs, in operations, bytes, flops and host time: held to limits, and to the formulas of perf's model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from cases import cpu_only
from counted import counting
from perf_cases import ROOT

from perf.counts import check, step_ops
from perf.kernels import cases, model
from perf.kernels.gpus import GPUS
from perf.kernels.ttsem import played

pytestmark = cpu_only
COUNTED = ("bfloat16", "tf32", "float32")
# Launches and operations of the device in a step that nobody may add to; a chunk more may take three more.
LIMITS = {
    "arcface": 12, "cosface": 12, "softmax": 12, "arcface, RowSGD in backward": 14,
    "arcface, float32 W under autocast": 14, "arcface, label smoothing 0.1": 14, "arcface, a tenth sampled": 20,
    "a user's own margin": 45, "arcface, 4 chunks": 12 + 3 * 3,
}  # fmt: skip
FEW_VIEWS = tuple(LIMITS)[:6]


def test_a_step_on_a_gpu_has_few_operations() -> None:
    """By the counts that are committed, which are those of this code: tests/perf/test_perf_planner.py."""
    for case, most in LIMITS.items():
        counted = check.committed()[check.ON_GPU + case]
        assert counted["launches"] + counted["device"] <= most, case
        assert counted["views"] <= 24 or case not in FEW_VIEWS, case


def test_dispatching_a_step_takes_little_time() -> None:
    """Held loosely, for a machine that has other work: `python -m perf step-ops` prints it. No ttsem takes part."""
    for case in ("arcface", "arcface, 4 chunks"):
        assert 0 < step_ops.host_time(case) < 5 * 300
    assert step_ops.host_time("arcface, a tenth sampled, RowSGD in backward") > 0


def executed(dtype: str) -> Iterator[tuple[str, float, float, int, int]]:
    """Bytes and flops of every kernel by formula, and counted while it runs under ttsem as code for sm_90."""
    from ttsem_modules import made_once

    n, d, c = 128, 64, 384  # whole tiles, and several of them
    with made_once(to_the_end=False), played():
        size = model.size_of(n, d, c, dtype, GPUS["sm_90"], dtype == "tf32")
        with cases.on(GPUS["sm_90"]):
            launches = cases.launches([""], dtype, n, d, c, device="cuda", runs=True)
        for kernel in model.step(dtype, dtype == "tf32"):
            if kernel.name in launches:
                with counting() as count:
                    launches[kernel.name]()
                # Where there are several tiles of classes, each of their products reads the samples again.
                again = (c // 128 - 1) * size.x if kernel.rate else 0
                moved = count.loaded + count.stored
                yield kernel.name, kernel.bytes(size) + again, kernel.flops(size), moved, count.flops


def test_formulas_are_what_the_kernels_do() -> None:
    pytest.importorskip("ttsem")
    # A process of its own: ttsem tells torch for good that there is a GPU.
    code = "import json, test_counts as t; print(json.dumps([[*t.executed(each)] for each in t.COUNTED]))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT / 'tests/kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for dtype, found in zip(COUNTED, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert len(found) == 8
        for name, moves, multiplies, moved, multiplied in found:
            assert moves <= moved <= 1.05 * moves, (name, dtype)  # labels and numbers per sample that tiles look up
            ours = dtype != "float32" and (name in cases.TILED or (name == "finish" and dtype == "bfloat16"))
            assert multiplied == multiplies == (2 * 128 * 64 * 384 if ours else 0), (name, dtype)
