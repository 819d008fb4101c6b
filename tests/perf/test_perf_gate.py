"""The GPU gate: its steps, its time limits and what it leaves, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import perf_cases  # noqa: F401  without the perf extra it skips
import pytest

import tritonmargin as tm
from perf import gate
from perf.suite import accuracy, results

SAY = "print('all good')"


def ran(out: Path, monkeypatch: pytest.MonkeyPatch, minutes: float = 5.0, **scripts: str) -> tuple[bool, Any]:
    """A dry gate whose steps are these scripts, or the real ones of that name."""
    real = {step.name: step for step in gate.steps(out, dry=True)}
    made = [real[name] if words == "real" else gate.Step(name, 0.9, ("-c", words)) for name, words in scripts.items()]
    monkeypatch.setattr(gate, "steps", lambda out, dry: made)
    monkeypatch.setattr(gate, "GRACE", 0.5)
    monkeypatch.setattr(gate.importlib.util, "find_spec", lambda name: True)
    good = gate.run(out, minutes, True, lambda *_: None)
    monkeypatch.undo()
    return good, json.loads((out / "gate.json").read_text())["steps"]


@pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="a dry run executes kernels by ttsem")
def test_a_dry_gate_checks_kernels_measures_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, steps = ran(tmp_path, monkeypatch, minutes=15.0, accuracy="real", run="real", tests=SAY)
    assert good, steps
    assert steps["accuracy"]["line"].startswith("9 of 9 errors")
    assert (tmp_path / "errors.csv").read_text().count("True") == 9
    assert results.load(tmp_path).rows["median_s"].notna().sum() == 9
    assert steps["run"]["line"] == "9 cases measured, 0 not begun"
    assert (tmp_path / "index.html").exists()


def test_a_step_that_fails_is_a_line_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    good, steps = ran(tmp_path, monkeypatch, fails="print('why'); raise SystemExit(3)", dies=dies, last=SAY)
    assert not good
    assert [step["status"] for step in steps.values()] == ["failed", "failed", "done"]
    assert steps["fails"]["line"] == "exit code 3: why"
    assert steps["dies"]["line"].startswith("exit code -9")
    again = f"open({str(tmp_path / 'again')!r}, 'w'); {SAY}"
    good, steps = ran(tmp_path, monkeypatch, fails=again, dies=SAY, last="raise SystemExit(1)")
    assert good, "what is done is not done again, what failed is"
    assert (tmp_path / "again").exists()


def test_out_of_time_a_step_ends_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    slow = f"import subprocess, time; subprocess.Popen([{sys.executable!r}, '-c', {child!r}]); time.sleep(9)"
    _, steps = ran(tmp_path, monkeypatch, minutes=2.0 / 60.0, quick=SAY, slow=slow, never=SAY)
    assert [step["status"] for step in steps.values()] == ["done", "partial", "not begun"]
    good, steps = ran(tmp_path, monkeypatch, quick="raise SystemExit(1)", slow="import time; time.sleep(3)", never=SAY)
    assert good, steps
    assert not (tmp_path / "alive").exists()


def test_it_needs_a_gpu_and_a_folder_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(tmp_path, monkeypatch, only=SAY)
    for on_gpu, dry, found, said in (
        (False, False, True, "no GPU here"), (True, False, True, "choose another --out"), (True, True, None, "pip"),
    ):  # fmt: skip
        monkeypatch.setattr(gate.torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(gate.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(ValueError, match=said):
            gate.run(tmp_path, 1.0, dry, print)


def test_the_budget_is_twice_plain_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("cpu", ("float32",), 24, 32, 300)
    assert all(line["within_budget"] and line["ours"] < 1e-5 for line in accuracy.budget(*sizes))
    right = tm.margin_cross_entropy
    monkeypatch.setattr(tm, "margin_cross_entropy", lambda *args, **options: 1.02 * right(*args, **options))
    assert {line["of"] for line in accuracy.budget(*sizes) if not line["within_budget"]} == {"loss", "dx", "dw"}
