"""Is a slowdown of the stream found? Three runs of `python -m perf`, one with a pause planted behind each walk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Python imports a module of this name in every process that it starts.
PLANT = """
import time
from tritonmargin.walk import Walk

chunks = Walk.chunks

def slower(walk):
    begun = time.perf_counter()
    yield from chunks(walk)
    time.sleep(0.15 * (time.perf_counter() - begun))

Walk.chunks = slower
"""
SIZES = [
    "--classes", "1e5", "--dim", "512", "--batch", "256", "--providers", "ours,ours-retain,plain",
    "--modes", "forward+backward",
]  # fmt: skip


def perf(*words: str, planted: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, filter(None, [planted, ROOT])))
    call = [sys.executable, "-m", "perf", *words]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.slow
def test_a_slowdown_of_15_percent_is_found_and_none_is_seen_where_none_is(tmp_path: Path) -> None:
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "sitecustomize.py").write_text(PLANT)
    for name in ("before", "planted", "after"):
        done = perf("run", *SIZES, "--out", str(tmp_path / name), planted=plant if name == "planted" else None)
        assert done.returncode == 0, done.stdout + done.stderr
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    for first in (before, after):
        found = perf("compare", first, str(tmp_path / "planted"))
        print(found.stdout)
        assert found.returncode == 1, found.stdout + found.stderr
    same = perf("compare", before, after)
    print(same.stdout)
    assert same.returncode == 0, same.stdout + same.stderr
