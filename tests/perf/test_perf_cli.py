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
from perf import cli, providers
from perf.suite import results

pd = pytest.importorskip("pandas")
pytestmark = cpu_only


def call(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(words))
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize(("words", "said"), [
    ("run --plan nope", "'nope' is not among"), ("run --classes many", "'many' is no whole number"),
    ("run --losses arc", "losses are among"), ("run --providers nobody", "no provider 'nobody'"),
    ("run --providers liger", "it has --losses softmax"), ("run --provider missing.py:Head", "missing.py"),
    ("run --dtype fp64", "--dtype float32|bfloat16"), ("run --dtype tf32", "need a GPU, --device cuda"),
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


@pytest.mark.parametrize(("file", "column", "value", "said"), [
    ("samples.csv.gz", "round", None, "lacks the columns round; delete it"),
    ("samples.csv.gz", "seconds", "fast", "has words in seconds, a column of numbers; delete it"),
    ("results.csv", "x_gemm", None, "lacks the columns x_gemm"), ("results.csv", "C", "many", "has words in C"),
])  # fmt: skip
def test_a_damaged_table(file: str, column: str, value: Any, said: str, tmp_path: Path, monkeypatch, capsys) -> None:
    results.save(tmp_path, results.load(ROOT / "reports/cpu"))
    frame = pd.read_csv(tmp_path / file)
    frame = frame.assign(**{column: value}) if value else frame.drop(columns=column)
    frame.to_csv(tmp_path / file, index=False)
    words = f"compare {ROOT}/reports/cpu {tmp_path}", f"{tmp_path} is damaged: {file} {said}"
    test_a_mistake_is_one_line_and_exit_code_2(*words, monkeypatch, capsys)


@pytest.mark.parametrize(("words", "name"), [
    ([], "default"), (["--quick"], "quick"), (["--losses", "cosface"], "grid"), (["--plan", "gpu"], ""),
])  # fmt: skip
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


def test_a_run_has_a_page_equals_itself_and_measures_an_edited_head_again(tmp_path: Path, monkeypatch: Any) -> None:
    grid = f"--tiny --classes 300 --dim 8 --batch 4 --losses cosface --providers ours,plain --out {tmp_path} --provider"
    kinds, head = dict(providers.discover()), tmp_path / "head.py"
    head.write_text((ROOT / "examples/my_head.py").read_text())
    assert f"tritonmargin {tm.__version__}" in call("--version")
    for number in "122":  # the third time nothing is left to do
        monkeypatch.setattr(providers, "discover", lambda found=dict(kinds): found)  # as in a process of its own
        call("run", *grid.split(), f"{head}:MyHead")
        rows = results.load(tmp_path).rows.groupby("provider")
        assert {name: {*part["run"]} for name, part in rows} == {"ours": {"1"}, "plain": {"1"}, "my-head": {number}}
        assert {name for name, part in rows if any(part["wrong"])} == ({"my-head"} if number == "2" else set())
        head.write_text(head.read_text().replace("0.4 *", "0.5 *"))
    call("report", str(tmp_path))
    assert "no more" not in call("compare", str(tmp_path), str(tmp_path))
