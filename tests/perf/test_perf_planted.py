"""Is a slowdown of the class pass found? Three runs of `python -m perf`, one with a pause planted behind each chunk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from perf_cases import ROOT

# Python imports a module of this name in every process that it starts.
PLANT = """
import time
from tritonmargin.class_pass.chunks import Chunks

ranges = Chunks.ranges

def slower(chunks):
    begun = time.perf_counter()
    yield from ranges(chunks)
    time.sleep(0.15 * (time.perf_counter() - begun))

Chunks.ranges = slower
"""
SIZES = ["--classes", "1e5", "--providers", "ours,ours-retain,plain", "--modes", "forward+backward"]


def perf(*words: str, planted: str = "") -> int:
    variables = os.environ | {"PYTHONPATH": f"{planted}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, "-m", "perf", *words], cwd=ROOT, env=variables, check=False).returncode


@pytest.mark.slow
def test_a_slowdown_of_15_percent_is_found_and_none_is_seen_where_none_is(tmp_path: Path) -> None:
    plant, before, planted, after = (str(tmp_path / name) for name in ("plant", "before", "planted", "after"))
    Path(plant).mkdir()
    (Path(plant) / "sitecustomize.py").write_text(PLANT)
    for folder in (before, planted, after):
        assert perf("run", *SIZES, "--out", folder, planted=plant if folder == planted else "") == 0
    assert perf("compare", before, planted) == 1
    assert perf("compare", after, planted) == 1
    assert perf("compare", before, after) == 0
