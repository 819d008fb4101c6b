"""`python -m perf gate --out DIR`: what a person with a GPU for ten minutes runs.

Steps one after another, each a process with a time limit, its output in DIR/NAME.log and its result a line of
DIR/gate.json. A step that fails is a line too, and the rest goes on. Called again, the gate keeps what is done.
`--dry-run` shows without a GPU that the gate works: kernels executed by ttsem, the run on the CPU, all at tiny sizes.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from perf.kernels.cases import family, this_gpu
from perf.kernels.ttsem import MISSING, played
from perf.report.terminal import console
from perf.suite import accuracy, results

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ("functional", "linear_cross_entropy", "op", "failures", "autograd", "stream", "chunks", "budget", "modules")
TRAINING = ("optim", "update_in_backward")
GRACE = 20.0  # seconds in which a step that was asked to stop may write what it has
SHELL = {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"}  # a log's lines are not cut, and there when a step is killed


class Step(NamedTuple):
    name: str
    end: float  # the part of all minutes after which it is stopped: what a person asks first is there after 8 of 10
    words: tuple[str, ...]  # of the command, after python
    variables: dict[str, str] = {}  # noqa: RUF012  of its environment


def steps(out: Path, dry: bool) -> list[Step]:
    few = ("tests/kernels", "-k", "few_launches or grids_and_loads")
    fewer = ("tests/losses/test_failures.py", "-k", "first_chunk_that_holds and softmax")
    # Most of a test on a GPU is the compilation of its kernels, on one core.
    workers = str(min(12, os.cpu_count() or 1))
    beside = ("-n", workers, "--dist", "loadgroup") if importlib.util.find_spec("xdist") else ()
    kernels = ("tests/kernels", "-m", "not slow", *beside)
    files = [f"tests/losses/test_{name}.py" for name in LOSSES]
    files += [f"tests/training/test_{name}.py" for name in TRAINING]
    losses = (*files, "-m", "not slow", *beside)
    machine = {"TRITONMARGIN_TESTS": "ttsem-90" if dry else "cuda"}
    tiny = ("--classes", "300", "--dim", "16", "--batch", "8", "--providers", "ours,plain,ours-sampled")
    plan = ("tiny", *tiny) if dry else ("gpu", "--device", "cuda")
    target, width = ("sm_90", "64") if dry else (family(this_gpu(0).target), "512")
    audit = ("--target", target, "--dtype", "bfloat16", "--d", width)
    check = f"from pathlib import Path; from perf import gate; gate.check_accuracy(Path({str(out)!r}), {dry})"
    return [
        Step("accuracy", 0.15, ("-c", check)),  # versus float64, beside plain torch in the same dtype: errors.csv
        Step("kernel tests", 0.35, ("-m", "pytest", *(few if dry else kernels)), machine),
        Step("run", 0.88, ("-m", "perf", "run", "--out", str(out), "--plan", *plan)),
        Step("audit", 0.95, ("-m", "perf", "audit", "--out", str(out), *audit)),
        Step("loss tests", 1.0, ("-m", "pytest", *(fewer if dry else losses)), machine),
    ]


def check_accuracy(out: Path, dry: bool) -> None:
    """The step `accuracy`, in its own process."""
    tiny = (("float32", "bfloat16", "float16"), 24, 32, 300)
    with played() if dry else contextlib.nullcontext():
        lines = accuracy.budget("cuda", *(tiny if dry else ()))
    pd.DataFrame(lines).to_csv(out / "errors.csv", index=False, float_format="%.6g")
    good = sum(line["within_budget"] for line in lines)
    print(f"{good} of {len(lines)} errors are at most twice those of plain torch in the same dtype")
    sys.exit(good < len(lines))


def run(out: Path, minutes: float, dry: bool, progress: Callable[[float, str], Any]) -> bool:
    """Every step that is not done; whether all are done now."""
    if dry and importlib.util.find_spec("ttsem") is None:
        raise ValueError(f"--dry-run executes the kernels: {MISSING}")
    if not dry and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; --dry-run shows that the gate works")
    path = (out := out.resolve()) / "gate.json"
    state = json.loads(path.read_text()) if path.exists() else {"dry_run": dry, "steps": {}}
    if state["dry_run"] != dry:
        raise ValueError(f"{path} is of {'a GPU' if dry else 'a dry run'}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    begin, found = time.monotonic(), state["steps"]
    for index, step in enumerate(steps(out, dry)):
        left = 60.0 * step.end * minutes - (time.monotonic() - begin)
        if found.get(step.name, {}).get("status") == "done":
            continue
        if left <= 0.0:
            found.setdefault(step.name, {"status": "not begun", "line": "the time was up"})
        else:
            progress(index / 5, step.name)
            found[step.name] = one(step, out, left)
        results.replace(path, json.dumps(state, indent=1).encode() + b"\n")
    if (out / "results.csv").exists():
        one(Step("page", 1.0, ("-m", "perf", "report", str(out))), out, 120.0)
        console.print((out / "page.log").read_text(), markup=False)  # the table that it begins with
    lines = [f"{name:13} {step['status']:10} {step['line']}" for name, step in found.items()]
    console.print("\n".join(lines + ["A dry run: none of its times says anything."] * dry), markup=False)
    return all(step["status"] == "done" for step in found.values())


def one(step: Step, out: Path, left: float) -> dict[str, Any]:
    """Run a step for at most `left` seconds. What it started ends with it: the next one has the GPU for itself."""
    log, begin, late = out / f"{step.name.replace(' ', '_')}.log", time.monotonic(), False
    # The run begins no size in its last minute, so that it ends by itself.
    limit = ("--minutes", f"{max(left - 60.0, left / 2.0) / 60.0:.2f}") if step.name == "run" else ()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *step.words, *limit], cwd=ROOT, env=os.environ | SHELL | step.variables,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGINT)  # pytest and the run then write what they have
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    line = (re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace")).strip().splitlines() or [""])[-1][:300]
    if step.name == "run" and (late or code == 0):
        rows = results.load(out).rows
        later = int(rows["note"].astype(str).str.startswith(results.NOT_BEGUN).sum())
        late = late or later > 0
        line = f"{int(rows['median_s'].notna().sum())} cases measured, {later} not begun"
    status = "partial" if late else "failed" if code else "done"
    line = f"exit code {code}: {line}" if status == "failed" else line
    return {"status": status, "line": line, "seconds": round(time.monotonic() - begin, 1)}
