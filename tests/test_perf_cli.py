"""The command line of the perf suite: defaults, exit codes, errors of one line, a head of your own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import cpu_only
from perf_cases import ROOT
from typer.testing import CliRunner

import tritonmargin as tm
from perf import cli
from perf.suite import results

pytestmark = cpu_only


def call(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(words))
    assert done.exit_code == code, done.output
    return done.output


def test_the_version_is_printed() -> None:
    assert f"tritonmargin {tm.__version__}" in call("--version")


@pytest.mark.parametrize(("words", "said"), [
    ("run --plan nope", "'nope' is not among"), ("run --classes many", "'many' is no whole number"),
    ("run --losses arc", "losses are among"), ("run --providers nobody", "no provider 'nobody'"),
    ("run --providers liger", "liger"), ("run --provider missing.py:Head", "missing.py"),
    ("run --device cuda", "no GPU"), ("report nowhere", "no results.csv in nowhere"),
    ("compare nowhere nowhere", "no results.csv in nowhere"), ("audit --target sm_1", "'sm_1' is not among"),
    ("plan --optimizer lion", "lion"), ("gate --out gate", "GPU"), ("nonsense", "nonsense"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(words: str, said: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["perf", *words.split()])
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("words", "name"),
    [([], "default"), (["--quick"], "quick"), (["--losses", "cosface"], "grid"), (["--plan", "gpu"], "")],
)
def test_results_go_to_a_folder_that_is_not_committed(words: list[str], name: str, monkeypatch: Any) -> None:
    """A loss alone is a grid: sizes and providers have defaults. The plan for GPUs is refused without one."""
    asked = []
    monkeypatch.setattr(cli.runner, "run_plan", lambda plan, folder, *_: asked.append((plan, folder)))
    call("run", *words, code=0 if name else 2)
    if name:
        plan, folder = asked[0]
        assert folder == cli.LOCAL / name
        assert sum(map(len, plan.blocks().values())) > 0
    assert f"{cli.LOCAL}/" in (ROOT / ".gitignore").read_text()
    tracked = subprocess.run(["git", "ls-files", str(cli.LOCAL)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not tracked.stdout


def test_a_run_of_one_loss_has_a_page_and_equals_itself(tmp_path: Path) -> None:
    grid = (
        "--tiny",
        "--classes",
        "300",
        "--dim",
        "8",
        "--batch",
        "4",
        "--losses",
        "cosface",
        "--providers",
        "ours,plain",
    )
    call("run", *grid, "--out", str(tmp_path), "--provider", f"{ROOT}/examples/my_head.py:MyHead")
    rows = results.load(tmp_path).rows
    assert set(rows["provider"]) == {"ours", "plain", "my-head"}
    assert set(rows["wrong"]) == {""}
    call("report", str(tmp_path))
    assert "no more" not in call("compare", str(tmp_path), str(tmp_path))
