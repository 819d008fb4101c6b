"""The perf suite: what it measures, checks, compares and writes, at tiny sizes. No test looks at a time of ours."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for module in ("pandas", "matplotlib", "tabulate", "typer", "rich", "jinja2"):
    pytest.importorskip(module, reason=f"{module} is part of the perf extra: pip install -e '.[perf]'")

import pandas as pd  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import tritonmargin as tm  # noqa: E402
from perf import (  # noqa: E402
    bounds,
    ceilings,
    check,
    compare,
    correct,
    counts,
    findings,
    grid,
    limits,
    measure,
    noise,
    peaks,
    plan,
    providers,
    readme,
    report,
    results,
    roofline,
    shared,
)
from perf.cli import app  # noqa: E402
from perf.grid import Budget, Case, Grid  # noqa: E402
from perf.problem import LOSSES, Problem, margin_of  # noqa: E402
from perf.providers.base import MODES, STEP, WHOLE, Provider  # noqa: E402
from perf.worker import Failed, Worker  # noqa: E402

SMALL = Problem(n=6, d=8, classes=200)
FOUND = providers.discover().providers
WITH_LOSS = [name for name, kind in FOUND.items() if kind.losses]
IN_PROCESS = [name for name in WITH_LOSS if name not in ("ours-sharded", "plain-compiled")]


def ready(name: str, problem: Problem = SMALL) -> Provider:
    provider = providers.make(name)
    provider.prepare(problem, problem.tensors())
    return provider


def quiet(_: str) -> None:
    """Says nothing."""


# -- providers ---------------------------------------------------------------------------------------------------


def test_expected_competitors_are_found() -> None:
    assert {"gemm", *grid.OURS, "plain", "plain-compiled", "plain-sampled", "insightface"} <= set(FOUND)
    assert {"liger", "cce", "quack"} <= set(FOUND)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert {"torch-lce", "torch-lce-chunked", "torch-lce-rows64"} <= set(FOUND)


def test_missing_package_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    monkeypatch.delitem(sys.modules, "perf.providers.metric_learning", raising=False)
    found = providers.discover.__wrapped__()
    assert "pml" not in found.providers
    assert "ours" in found.providers
    assert "pytorch_metric_learning" in found.skipped["metric_learning"]


def test_options_are_part_of_a_name() -> None:
    assert providers.make("ours:retain=0.5:chunk_bytes=1000").chosen == {"retain": 0.5, "chunk_bytes": 1000}
    assert providers.title("ours:retain=0.5") == "tritonmargin, retain=0.5"
    for name, said in (
        ("nobody", "no provider 'nobody'"),
        ("ours:what=1", "no option 'what'"),
        ("ours:retain=x", "'x'"),
    ):
        with pytest.raises(ValueError, match=said):
            providers.make(name)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_provider_is_right(name: str, loss: str) -> None:
    """The same check that decides whether its speed counts, in float32 and bfloat16; and the bounds have room."""
    for dtype in ("float32", "bfloat16"):
        problem = correct.small(Problem(1, 128, 1, dtype, loss=loss))
        if needs := providers.make(name).supports(problem):
            if "no " + loss not in needs and dtype == "float32":
                pytest.skip(needs)
            continue
        found = correct.errors(ready(name, problem), problem)
        assert correct.wrong(found, dtype) == ""
        assert {"error_loss", "error_dx", "error_dw", "bias_dx", "bias_dw"} == set(found)
        if dtype == "float32":
            assert max(found.values()) < 0.2 * correct.ERROR[dtype]


@pytest.mark.parametrize("name", ["ours", "plain", "ours-in-backward", "ours-sampled", "plain-sampled"])
def test_one_part_in_a_thousand_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = correct.small(Problem(1, 32, 1))
    provider = ready(name, problem)
    right = provider.gradients

    def off() -> object:
        found = right()
        return found._replace(weight=1.001 * found.weight)

    assert correct.wrong(correct.errors(provider, problem), "float32") == ""
    provider = ready(name, problem)
    monkeypatch.setattr(provider, "gradients", off)
    right = type(provider).gradients.__get__(provider)
    said = correct.wrong(correct.errors(provider, problem), "float32")
    assert "error of dw 1.0e-03" in said
    assert "bias of dw 1.0e-03" in said
    assert "dx" not in said


@pytest.mark.parametrize("name", [name for name in IN_PROCESS if set(FOUND[name].modes) == set(MODES)])
def test_modes_do_what_they_say(name: str) -> None:
    problem = replace(SMALL, loss=FOUND[name].losses[-1])
    provider = ready(name, problem)
    before = provider.weight.detach().clone()
    values = {}
    for mode in MODES:
        provider.reset(mode)
        loss = provider.run(mode)
        values[mode] = float(loss.detach())
        assert loss.requires_grad == (mode == "forward")
        assert (provider.x.grad is not None) == (mode in (STEP, "frozen W", WHOLE))
        assert (provider.weight.grad is not None) == (mode in (STEP, WHOLE))
        provider.reset(mode)
        assert provider.x.grad is None
        assert provider.weight.grad is None
    assert len(set(values.values())) == 1
    assert torch.equal(provider.weight.detach(), before), "every round meets the same W"
    assert provider.optimizer is not None
    assert provider.optimizer.state[provider.weight]["momentum_buffer"].abs().sum() > 0


def test_the_sampled_steps_walk_a_tenth() -> None:
    problem = Problem(n=6, d=8, classes=1000)
    for name in ("ours-sampled", "plain-sampled"):
        ids = ready(name, problem).gradients().class_ids
        assert ids is not None
        assert len(ids) == 100


def test_straight_through_is_another_loss_than_arcface() -> None:
    """insightface's current code is compared with our option of that name, not with ArcFace's own gradient."""
    assert FOUND["insightface"].losses == ("arcface-straight-through", "cosface")
    assert margin_of("arcface-straight-through").gradient == "straight-through"
    with pytest.raises(ValueError, match="arcface"):
        margin_of("arcfase")


# -- processes and limits ----------------------------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("plain", 1)
    yield made
    made.stop()


def test_what_does_not_fit_is_a_failure_and_not_the_end(worker: Worker) -> None:
    """An allocation of more than the machine has fails in the worker, which then goes on."""
    free = limits.available_bytes()
    assert free > 0
    n = 1 << 20
    huge = Problem(n=n, d=1, classes=free // n)  # logits of four times what is free
    with shared.file_of(huge.weight_bytes) as weight:
        worker.ask("prepare", huge, (weight,))
        with pytest.raises(Failed, match="out of memory"):
            worker.ask("step", "no-grad")
    worker.ask("prepare", SMALL, ())
    assert worker.ask("step", STEP)[0] > 0


def test_a_worker_that_takes_too_long_is_stopped(worker: Worker) -> None:
    worker.ask("prepare", SMALL, ())
    begin = time.monotonic()
    with pytest.raises(Failed, match="stopped after 0 s"):
        worker.ask("check", replace(SMALL, n=4000, classes=20_000), (), timeout=0.01)
    assert time.monotonic() - begin < 30
    assert not worker.alive
    with pytest.raises(Failed, match="gone"):
        worker.ask("step", STEP)


def test_a_worker_that_dies_says_so(worker: Worker) -> None:
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()
    with pytest.raises(Failed, match=r"died|gone"):
        worker.ask("step", STEP)


def test_processes_share_one_weight() -> None:
    with shared.file_of(SMALL.weight_bytes) as path:
        one, other = (shared.tensor_of(path, torch.float32, 200, 8) for _ in range(2))
        one.fill_(3.0)
        assert float(other[7, 3]) == 3.0


# -- memory ------------------------------------------------------------------------------------------------------


def test_peak_leaves_out_the_gradient_from_its_allocation_on() -> None:
    assert peaks.peak_without([5, 10, -10, 7], 0) == 15
    assert peaks.peak_without([10, 5, -10, 10, 2], 10) == 15  # the first 10 is a temporary, the last the gradient
    assert peaks.peak_without([5, 10, 2], 10) == 7
    assert peaks.peak_without([], 10) == 0


def peak_mb(name: str, classes: int, mode: str = STEP) -> float:
    provider = ready(name, Problem(n=64, d=16, classes=classes))
    provider.reset(mode)
    provider.run(mode)
    return peaks.peak(provider, mode)["beyond_mb"]


def test_our_memory_does_not_grow_with_classes_and_full_logits_do() -> None:
    small, large = peak_mb("ours", 200_000), peak_mb("ours", 400_000)
    assert large <= 1.02 * small
    assert large < 0.15 * 64 * 400_000 * 4 / 1e6
    assert peak_mb("plain", 20_000) > 4 * 64 * 20_000 * 4 / 1e6
    assert peak_mb("ours", 400_000, "no-grad") <= large


def test_an_update_in_backward_needs_no_gradient_of_w() -> None:
    found = {}
    for name in ("ours", "ours-in-backward"):
        provider = ready(name, Problem(n=64, d=16, classes=400_000))
        for _ in range(2):
            provider.reset(WHOLE)
            provider.run(WHOLE)
        found[name] = peaks.peak(provider, WHOLE)["peak_mb"]
    gradient = 400_000 * 16 * 4 / 1e6
    assert found["ours"] > gradient
    assert found["ours-in-backward"] < 0.8 * gradient


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "d"), [(64, 32), (16, 128), (128, 16)])
def test_plan_predicts_the_measured_peak(dtype: str, n: int, d: int) -> None:
    p = Problem(n, d, 20_000, dtype)
    made = plan.plan(p, chunk_bytes=0)
    for name, expected in (("ours", made.ours), ("plain", made.full_logits)):
        provider = ready(name, p)
        provider.reset(STEP)
        provider.run(STEP)
        assert 1e6 * peaks.peak(provider, STEP)["beyond_mb"] == pytest.approx(expected, rel=0.2)


def test_plan_retains_what_fits() -> None:
    p = Problem(256, 128, 1_000_000)
    made = plan.plan(p)
    assert made.retained == made.retain_bytes == 0
    assert made.full_logits > 5 * p.n * p.classes * 4
    half = plan.plan(p, memory=made.fixed + made.ours + p.n * p.classes * 2)
    assert 0 < half.retain_bytes <= p.n * p.classes * 2
    assert half.retained % half.chunk == 0
    assert half.fixed + half.ours <= made.fixed + made.ours + p.n * p.classes * 2
    assert plan.plan(p, memory=1).retained == 0
    assert plan.plan(p, memory=1 << 40).retained == p.classes


# -- one size, in turns ------------------------------------------------------------------------------------------


class Scripted:
    """A worker whose times are written down: the first is the warm-up."""

    times: dict[str, list[float]] = {}  # noqa: RUF012
    order: list[str] = []  # noqa: RUF012
    loss: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.alive, self.left = name, True, iter(self.times[name])

    def ask(self, command: str, *arguments: object, timeout: float | None = None) -> object:
        if command in ("step", "first"):
            self.order.append(self.name)
            took = next(self.left)
            if took == math.inf:
                raise Failed("out of luck")
            loss = self.loss.get(self.name, 7.0)
            return (took, loss) if command == "step" else (took, loss, 1.0)
        return {"supports": None, "prepare": None, "check": {"error_dx": 0.0}, "peak": {"peak_mb": 2.0}}[command]

    def stop(self) -> None:
        self.alive = False


def scripted(
    monkeypatch: pytest.MonkeyPatch,
    times: dict[str, list[float]],
    loss: dict[str, float] | None = None,
    longest: float = 50,
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    monkeypatch.setattr(measure, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "times", times)
    monkeypatch.setattr(Scripted, "order", [])
    monkeypatch.setattr(Scripted, "loss", loss or {})
    cases = [Case(SMALL, name, STEP) for name in times if name != "gemm"]
    block = measure.measure(SMALL, cases, Budget(3, 3, 0.0, longest), 1, measure.History(), measure.Checks(), quiet)
    return pd.DataFrame(block.rows).set_index("provider"), pd.DataFrame(block.samples), Scripted.order


def test_providers_take_turns_and_are_divided_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, samples, order = scripted(monkeypatch, {
        "gemm": [1.0, 1.0, 1.5, 2.5, 4.0, 4.0], "ours": [9.0, 3.0, 8.0, 16.0], "plain": [9.0, 9.0, 16.0, 80.0],
    })  # fmt: skip
    assert order == ["ours", "plain", *["gemm", "ours", "plain", "gemm"] * 3]  # first steps, then three rounds
    assert list(rows["samples"]) == [3, 3]
    ours, plain = rows.loc["ours"], rows.loc["plain"]
    assert (ours["q25_s"], ours["median_s"], ours["q75_s"]) == (5.5, 8.0, 12.0)  # without the first step
    assert ours["x_gemm"] == 4.0  # median of 3/1, 8/2, 16/4
    assert plain["x_gemm"] == 9.0  # median of 9, 8, 20
    assert plain["times_ours"] == 3.0  # median of 3, 2, 5
    assert ours["peak_mb"] == 2.0
    assert len(samples) == 12
    assert (samples["place"] == "first").sum() == 3


def test_a_failing_case_is_a_row_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _, _ = scripted(monkeypatch, {
        "gemm": [1.0] * 6, "ours": [1.0] * 4, "plain": [1.0, 1.0, math.inf], "insightface": [math.inf],
    })  # fmt: skip
    assert rows.at["ours", "samples"] == 3
    assert (rows.at["plain", "samples"], rows.at["plain", "note"]) == (1, "out of luck")
    assert (rows.at["insightface", "samples"], rows.at["insightface", "note"]) == (0, "out of luck")


def test_a_step_past_the_budget_is_measured_once_and_predicted_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _, order = scripted(monkeypatch, {"gemm": [1.0] * 6, "ours": [1.0] * 4, "plain": [60.0]})
    assert order.count("plain") == 1
    assert (rows.at["plain", "samples"], rows.at["plain", "median_s"]) == (1, 60.0)
    assert rows.at["plain", "note"] == "one step, the first: past the budget of 50 s"
    history = measure.History()
    small = Case(SMALL, "plain", STEP)
    assert history.predict(small) is None
    history.add(small, 2.0)
    history.add(Case(replace(SMALL, n=24), "plain", STEP), 3.0)
    assert history.predict(Case(replace(SMALL, classes=600), "plain", STEP)) == pytest.approx(6.0)
    assert history.predict(Case(replace(SMALL, n=24, classes=600), "plain", STEP)) == pytest.approx(9.0)
    assert history.predict(Case(replace(SMALL, d=32, n=6), "plain", STEP)) == pytest.approx(4.0)
    assert history.predict(Case(SMALL, "plain", WHOLE)) is None


def test_a_loss_that_is_not_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"gemm": [1.0] * 6, "ours": [1.0] * 4, "plain": [1.0] * 4}
    rows, _, _ = scripted(monkeypatch, times, {"plain": 7.1})
    assert rows.at["plain", "wrong"] == "its loss is 7.1, ours 7"
    assert rows.at["ours", "wrong"] == ""


def test_missing_packages_and_gpus_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case(replace(SMALL, loss="softmax"), name, STEP) for name in ("ours", "liger", "nobody")]
    block = measure.measure(
        cases[0].problem, cases, Budget(1, 1, 0.0, 9.0), 1, measure.History(), measure.Checks(), quiet
    )
    notes = {row["provider"]: row["note"] for row in block.rows}
    assert notes["ours"] == ""
    assert "GPU" in notes["liger"] or "installed" in notes["liger"]
    assert "nobody" in notes["nobody"]


# -- grids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grid.PLANS)
def test_plans_name_what_exists(name: str) -> None:
    for problem, cases in grid.PLANS[name].blocks().items():
        assert len(set(cases)) == len(cases)
        for case in cases:
            providers.split(case.provider)
            assert case.problem == problem
            assert grid.offers(case.provider, problem.loss, case.mode)
    with pytest.raises(ValueError, match="losses"):
        Grid((10,), losses=("arcfase",))
    with pytest.raises(ValueError, match="classes"):
        Grid((0,))


@pytest.mark.parametrize("name", ["quick", "default", "full"])
def test_every_bound_is_covered_with_enough_samples(name: str) -> None:
    chosen = grid.PLANS[name]
    cases = {case for cases in chosen.blocks().values() for case in cases}
    assert chosen.budget.rounds >= 5
    for bound in bounds.BOUNDS:
        problem = Problem(bound.n, bound.d, bound.classes, bound.dtype)
        assert Case(problem, bound.provider, bound.mode) in cases, bound
        assert Case(problem, "ours", bound.mode) in cases


def test_the_full_plan_is_the_promised_table() -> None:
    blocks = grid.PLANS["full"].blocks()
    for c in (10_000, 100_000, 1_000_000):
        for n in (32, 256, 1024):
            for d in (128, 512):
                for dtype in ("float32", "bfloat16"):
                    cases = blocks[Problem(n, d, c, dtype)]
                    names = {case.provider for case in cases}
                    assert names >= {*grid.OURS, "plain", "pml", "plain-sampled"}
                    assert {case.mode for case in cases} >= {"forward", STEP, WHOLE}
    assert Problem(256, 128, 4_000_000) in blocks


def fp32_line(provider: str, mode: str, **numbers: float) -> dict[str, object]:
    return {"loss": "arcface", "provider": provider, "title": provider, "mode": mode, "dtype": "float32", "N": 256,
            "D": 512, "C": 131_072, "device": "cpu", "samples": 5, "rss_mb": math.nan, "beyond_mb": math.nan,
            "median_s": math.nan, "times_ours": math.nan, "x_gemm": math.nan, **numbers}  # fmt: skip


def test_bounds_are_checked_where_they_apply() -> None:
    checked = bounds.check(pd.DataFrame([
        fp32_line("ours", STEP, x_gemm=3.91),
        fp32_line("ours-retain", STEP, x_gemm=3.0),
        fp32_line("ours", "forward", x_gemm=1.0),
        fp32_line("plain", STEP, x_gemm=9.0, times_ours=2.4),
        fp32_line("ours", "no-grad", x_gemm=50.0),
        fp32_line("ours", STEP, x_gemm=50.0) | {"D": 64},
    ]))  # fmt: skip
    assert list(checked["met"]) == [False, True, True, True]
    assert checked["promised"].iloc[0] == "at most 3.9 GEMMs"
    assert checked["promised"].iloc[3] == "at least 2.4 times ours"


def test_rounds_follow_the_budget() -> None:
    budget = Budget(5, 15, 1.0, 10.0, patience=12.0)
    assert [budget.another(number, 0.1) for number in (0, 4, 5, 14)] == [True] * 4
    assert not budget.another(5, 1.0)  # enough rounds, and enough time
    assert budget.another(4, 11.0)
    assert not budget.another(3, 12.0)  # three rounds of long steps are enough
    assert budget.another(2, 12.0)


def test_growth_time_per_class_and_resident_set() -> None:
    def line(classes: int, peak: float, seconds: float) -> dict[str, object]:
        return fp32_line("ours", STEP, beyond_mb=peak, median_s=seconds, rss_mb=600.0) | {"C": classes, "D": 128}

    frame = pd.DataFrame([line(10_000, 1.0, 1.0), line(100_000, 10.0, 2.0), line(1_000_000, 11.0, 24.0)])
    made = bounds.derive(frame)
    assert made["growth"].isna().tolist() == [True, False, False]
    assert made["growth"].iloc[2] == pytest.approx(1.1)
    assert made["per_class"].iloc[2] == pytest.approx(1.2)
    assert made["beyond_rss_mb"].iloc[2] == pytest.approx(600.0 - 512.0)
    checked = bounds.check(frame).set_index("promised")["met"]
    assert not checked["at most 1.15 times the time per class at C=10^5"]
    assert checked["at most 100 MB of the resident set beyond them"]


# -- a run, and its page -----------------------------------------------------------------------------------------

TINY = ["--classes", "300,2000", "--dim", "16", "--batch", "8", "--threads", "1", "--modes", f"forward,{STEP},{WHOLE}"]
RUN = [
    "run",
    "--tiny",
    *TINY,
    "--providers",
    "ours,ours-retain,ours-in-backward,ours-sampled,ours:retain=0.5,plain,pml",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports")
    before = torch.get_num_threads()
    done = CliRunner().invoke(app, [*RUN, "--dtype", "fp32,bf16", "--out", str(out)])
    torch.set_num_threads(before)
    assert done.exit_code == 0, done.output
    assert "comparisons with other code" in done.output
    return out


def test_a_run_leaves_data_with_a_schema(written: Path) -> None:
    found = results.load(written)
    assert list(found.rows.columns) == list(results.COLUMNS)
    assert (found.rows["samples"] > 0).all(), found.rows[found.rows["samples"] == 0].to_string()
    assert (found.rows["wrong"] == "").all(), found.rows["wrong"].unique()
    assert set(found.rows["provider"]) == set(RUN[-1].split(","))
    assert {"GEMM", "exp", "copy"} == set(found.ceilings["kind"])
    for name in ("cpu", "cores", "caches", "torch", "threads", "date", "load_before", "commit", "versions", "budget"):
        assert name in found.runs["1"]
    # A row's numbers are those of its samples.
    row = found.rows[(found.rows["provider"] == "plain") & (found.rows["mode"] == STEP)].iloc[0]
    own = found.samples
    for name in results.KEY:
        own = own[own[name] == row[name]]
    assert own["seconds"].median() == pytest.approx(row["median_s"], rel=1e-4)


def test_a_second_run_measures_only_what_is_missing(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(written, out)
    before = (out / "results.csv").read_text()
    assert CliRunner().invoke(app, [*RUN, "--dtype", "fp32,bf16", "--out", str(out)]).exit_code == 0
    assert (out / "results.csv").read_text() == before
    more = [*RUN[:-1], "ours,insightface", "--losses", "cosface", "--dtype", "fp32", "--out", str(out)]
    assert CliRunner().invoke(app, more).exit_code == 0
    found = results.load(out)
    assert set(found.runs) == {"1", "2"}
    assert set(found.rows.loc[found.rows["run"] == "2", "loss"]) == {"cosface"}
    assert (found.rows["run"] == "1").sum() == len(before.splitlines()) - 1


def test_a_longer_budget_tries_again_what_was_left_out(tmp_path: Path) -> None:
    line = ["run", *TINY, "--classes", "2000", "--modes", STEP, "--providers", "ours,plain", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, [*line, "--longest", "1e-9"]).exit_code == 0
    found = results.load(tmp_path).rows
    assert found["note"].str.startswith("one step, the first").all()
    assert CliRunner().invoke(app, [*line, "--longest", "1e-9"]).exit_code == 0
    assert set(results.load(tmp_path).runs) == {"1"}
    assert CliRunner().invoke(app, [*line, "--longest", "100"]).exit_code == 0
    found = results.load(tmp_path).rows
    assert (found["note"] == "").all()
    assert (found["samples"] >= 5).all()
    assert set(found["run"]) == {"2"}


def test_control_c_leaves_a_valid_part(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "perf", *RUN[:-1], "ours,plain", "--classes", "300,400,500,600,700,800,900,1000"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not (out / "results.csv").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    found = results.load(out)
    assert len(found.rows) > 0
    if process.returncode == 130:  # it was not done by then
        assert "goes on from here" in said
        assert len(found.rows) < 8 * 6
        assert "stopped" not in (out / "index.html").read_text()


class Page(html.parser.HTMLParser):
    """What a browser would look for: pictures, the numbers of the first screen, links."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[dict[str, str | None]] = []
        self.times: list[float] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("img", "source"):
            self.pictures.append(found)
        if "data-value" in found:
            self.times.append(float(found["data-value"] or "nan"))
        if found.get("id"):
            self.anchors.add(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))


def test_the_page_holds_everything_and_says_what_the_csv_says(written: Path) -> None:
    text = (written / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert len(page.pictures) >= 2 * 5
    for picture in page.pictures:
        assert str(picture.get("src") or picture.get("srcset")).startswith("data:image/svg+xml;base64,")
        assert picture.get("alt") or "srcset" in picture
    assert "http" not in re.sub(r"data:[^\"]*", "", text), "the page is one file"
    assert {link.removeprefix("#") for link in page.links} <= page.anchors
    rows = results.load(written).rows
    for value in page.times:
        assert value in [pytest.approx(other) for other in rows["times_ours"]]
    assert len(page.times) == 4  # two dtypes, two sizes
    assert str(written) not in text
    assert os.path.expanduser("~") not in text or os.path.expanduser("~") == "/"


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(written: Path, tmp_path: Path, width: int) -> None:
    """No picture is broken, nothing is wider than the screen, and the headline's numbers are there to read."""
    probe = """<script>addEventListener('load', () => {
        const broken = [...document.images].filter(image => !image.naturalWidth).length;
        const wide = document.documentElement.scrollWidth - innerWidth;
        document.title = JSON.stringify({broken, wide, images: document.images.length, errors: window.seen || 0,
            times: [...document.querySelectorAll('.times')].map(each => each.textContent)});
    })</script><script>onerror = () => { window.seen = (window.seen || 0) + 1 }</script>"""
    page = tmp_path / "probed.html"
    page.write_text((written / "index.html").read_text().replace("</head>", probe + "</head>"))
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run(
        [str(browser()), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:500]
    seen = json.loads(title[1].replace("&quot;", '"'))
    assert seen["broken"] == seen["errors"] == 0
    assert seen["images"] >= 5
    assert seen["wide"] <= 0
    headline = findings.find(results.load(written)).headline
    assert seen["times"] == [findings.digits(value) for value in headline["times"]]


def test_report_renders_again_from_the_csvs(written: Path) -> None:
    before = (written / "summary.md").read_text()
    (written / "summary.md").unlink()
    assert CliRunner().invoke(app, ["report", "--out", str(written)]).exit_code == 0
    assert (written / "summary.md").read_text() == before
    assert "Which setting should I use?" in before
    assert str(written) not in before


def ranked(times: float, wrong: str = "", scatter: float = 0.0) -> findings.Findings:
    lines, samples = [], []
    for provider, ratio in (("ours", 1.0), ("plain", times)):
        line = fp32_line(provider, STEP, median_s=ratio, x_gemm=3.0 * ratio, times_ours=ratio, beyond_mb=1.0)
        lines.append({**line, "work": "all classes", "q25_s": ratio, "q75_s": ratio,
                      "wrong": wrong if provider == "plain" else "", "note": "", "run": "1", "limit_s": 0.5,
                      "peak_mb": 2.0, "error_dx": 0.0, "error_dw": 0.0, "error_loss": 0.0})  # fmt: skip
        off = scatter if provider == "plain" else 0.0
        samples += [{**{name: line[name] for name in results.KEY}, "round": k, "place": "",
                     "seconds": ratio * (1.0 + off * (2 * (k % 2) - 1))} for k in range(6)]  # fmt: skip
    empty = results.load(Path("/nonexistent"))
    return findings.find(empty._replace(rows=pd.DataFrame(lines), samples=pd.DataFrame(samples)))


def test_the_first_sentence_counts_what_is_beyond_the_noise() -> None:
    assert findings.sentence(ranked(2.0)).startswith("Ours is faster in 1 of 1")
    assert "slower in 1" in findings.sentence(ranked(0.5))
    assert "within the noise in 1" in findings.sentence(ranked(1.1, scatter=0.2))
    assert len(report.behind(ranked(0.5))) == 1
    assert report.behind(ranked(0.5))[0]["times"] == 2.0


def test_who_is_wrong_is_not_ranked() -> None:
    found = ranked(0.5, wrong="error of dw 1.0e-03 > 2e-05")
    assert found.counts["compared"] == 0
    assert found.headline.empty
    assert found.behind.empty
    assert len(found.wrong) == 1


def test_growth_is_fitted() -> None:
    lines = [
        fp32_line("ours", STEP, median_s=0.01 + 2e-12 * 256 * 512 * c) | {"C": c}
        for c in (1000, 10_000, 100_000, 1_000_000)
    ]
    made = findings.growth(pd.DataFrame(lines)).iloc[0]
    assert made["a_ms"] == pytest.approx(10.0, rel=1e-6)
    assert made["b_ps"] == pytest.approx(2.0, rel=1e-6)
    assert made["typical_error"] < 1e-6


def test_ceilings_bound_what_the_work_needs() -> None:
    rates = [{"kind": "GEMM", "dtype": "float32", "per_second": 1.0}, {"kind": "copy", "dtype": "", "per_second": 1e30}]
    assert ceilings.limit(Case(SMALL, "ours", STEP), rates) == 3 * SMALL.flops
    assert ceilings.limit(Case(SMALL, "ours-sampled", STEP), rates) == pytest.approx(0.3 * SMALL.flops)
    slow = [{**line, "per_second": {"GEMM": 1e30, "copy": 1.0}[line["kind"]]} for line in rates]
    assert ceilings.limit(Case(SMALL, "plain", WHOLE), slow) == 5 * SMALL.weight_bytes
    assert ceilings.limit(Case(SMALL, "ours", STEP), []) is None


def test_readmes_numbers_are_those_of_the_committed_results() -> None:
    root = Path(__file__).parent.parent
    committed = results.load(root / "reports" / "perf")
    text = (root / "README.md").read_text()
    assert readme.rewritten(text, committed) == text, "make readme-numbers"
    assert "**" in readme.numbers(committed)
    assert len(committed.rows) > 300


def test_readmes_numbers_follow_the_results(written: Path) -> None:
    found = results.load(written)
    text = f"before {readme.BEGIN} old {readme.END} after"
    made = readme.rewritten(text, found)
    assert made.startswith("before ")
    assert made.endswith(" after")
    assert " old " not in made
    assert "comparisons" in made
    with pytest.raises(ValueError, match="end of numbers"):
        readme.rewritten("nothing", found)


# -- comparing runs ----------------------------------------------------------------------------------------------


def slowed(before: results.Results, factor: float, **changed: object) -> results.Results:
    rows, samples = before.rows.copy(), before.samples.copy()
    ours = rows["provider"].str.startswith("ours")
    rows.loc[ours, ["median_s", "x_gemm"]] *= factor
    samples.loc[samples["provider"].str.startswith("ours"), "seconds"] *= factor
    for column, value in changed.items():
        rows.loc[ours, column] = value
    return before._replace(rows=rows, samples=samples)


def spread(found: results.Results, part: float) -> results.Results:
    """The run as if its steps had scattered by that part of their time, and nothing else."""
    samples = found.samples.copy()
    place = samples["round"] % 2
    samples["seconds"] = 1.0 + part * (2 * place - 1) * (samples["provider"] != grid.YARDSTICK)
    return found._replace(samples=samples)


@pytest.fixture
def steady(written: Path) -> results.Results:
    return spread(results.load(written), 0.001)


def test_a_slowdown_of_fifteen_percent_is_found(steady: results.Results) -> None:
    assert compare.regressions(compare.compare(steady, steady, 0.1), 0.1) == []
    found = compare.compare(steady, slowed(steady, 1.15), 0.1)
    assert set(found.loc[found["provider"].str.startswith("ours"), "verdict"]) == {"slower"}
    assert set(found.loc[~found["provider"].str.startswith("ours"), "verdict"]) == {""}
    assert any("ours as a whole" in line for line in compare.regressions(found, 0.1))
    faster = compare.compare(steady, slowed(steady, 1 / 1.15), 0.1)
    assert "faster" in set(faster["verdict"])
    assert compare.regressions(faster, 0.1) == []


def test_noise_hides_what_it_must(steady: results.Results) -> None:
    noisy = spread(steady, 0.5)
    found = compare.compare(noisy, slowed(noisy, 1.15), 0.1)
    assert set(found["verdict"]) == {""}
    assert any("ours as a whole" in line for line in compare.regressions(found, 0.1)), "many rows see it all the same"


def test_a_bands_width_is_that_of_the_ratio() -> None:
    def line(provider: str, number: int, seconds: float, place: str = "") -> dict[str, object]:
        size = {"loss": "arcface", "dtype": "float32", "N": 1, "D": 1, "C": 1, "device": "cpu"}
        return {**size, "provider": provider, "mode": STEP, "round": number, "place": place, "seconds": seconds}

    # A machine that slows down as a whole scatters times and not ratios.
    lines = [line(name, k, (1.0 + k) * factor) for k in range(8) for name, factor in (("ours", 1.0), ("plain", 2.0))]
    assert noise.of_ratios(pd.DataFrame(lines), "ours").tolist() == pytest.approx([0.0, 0.0])
    lines = [line("ours", k, 1.0) for k in range(8)] + [line("plain", k, 2.0 + k % 2) for k in range(8)]
    found = noise.of_ratios(pd.DataFrame(lines), "ours")
    assert found.tolist() == pytest.approx([0.0, 1.2533 / 1.349 / math.sqrt(8) / 2.5])
    yard = [line("gemm", k, 1.0, "first") for k in range(8)] + [line("gemm", k, 1.0 + 0.1 * (k % 2)) for k in range(8)]
    assert noise.of_yardstick(pd.DataFrame(yard)) == pytest.approx(1.2533 * 0.1 / 1.349 / math.sqrt(8) / 1.05)


def test_wrong_results_errors_and_memory_are_regressions_too(steady: results.Results) -> None:
    for changed, word in (({"wrong": "off"}, "wrong"), ({"error_dw": 1.0}, "error"), ({"peak_mb": 1e4}, "memory")):
        bad = compare.regressions(compare.compare(steady, slowed(steady, 1.0, **changed), 0.1), 0.1)
        assert bad
        assert all(word in line for line in bad)


def test_compare_command(written: Path, tmp_path: Path, steady: results.Results) -> None:
    results.save(tmp_path / "a", steady)
    results.save(tmp_path / "b", slowed(steady, 1.5))
    same = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "a")])
    assert same.exit_code == 0, same.output
    slower = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert slower.exit_code == 1
    assert "slower" in slower.output
    assert CliRunner().invoke(app, ["compare", str(tmp_path), str(written)]).exit_code == 2


def test_counts_are_those_that_are_committed() -> None:
    """No step does more products, passes, operations or allocations than the last time somebody looked."""
    found = check.counts()
    assert check.grown(check.committed(), found) == []
    products = {name: value["flops"] / (2 * 64 * 64 * 5000) for name, value in found.items() if "float32" in name}
    for name, expected in {"ours, no-grad": 1, f"ours, {STEP}": 4, "ours, frozen W": 3, f"ours-retain, {STEP}": 3,
                           f"ours-in-backward, {WHOLE}": 4, f"ours-sampled, {STEP}": 0.4}.items():  # fmt: skip
        assert products[f"{name}, arcface, float32, N=64, D=64, C=5,000"] == pytest.approx(expected)


def test_more_work_is_told() -> None:
    before = {"a": {"flops": 100, "elements": 1000, "peak": 10}, "gone": {"flops": 1}}
    now = {"a": {"flops": 101, "elements": 1010, "peak": 11}, "b": {"flops": 1}}
    assert check.grown(before, now) == [
        "gone: not counted any more",
        "a: flops 100 -> 101",
        "a: peak 10 -> 11",
        "b: new",
    ]


# -- what bounds a step ------------------------------------------------------------------------------------------


def flops(provider: str, mode: str, p: Problem) -> float:
    return sum(part.amount for part in counts.parts(provider, mode, p) if counts.RATES[part.rate].unit == "flop")


def test_counted_products() -> None:
    expected = {
        ("ours", STEP): 4, ("ours-retain", STEP): 3, ("ours", "forward"): 1, ("ours", "no-grad"): 1,
        ("ours", "frozen W"): 3, ("plain", STEP): 3, ("plain", "frozen W"): 2, ("plain", "no-grad"): 1,
    }  # fmt: skip
    for (provider, mode), products in expected.items():
        assert flops(provider, mode, SMALL) == products * SMALL.flops
    with pytest.raises(ValueError, match="pml"):
        counts.parts("pml", STEP, SMALL)


def test_counted_products_are_those_that_run() -> None:
    p = Problem(n=16, d=8, classes=300)
    for name in ("ours", "ours-retain", "plain"):
        for mode in set(FOUND[name].modes) & {STEP, "frozen W", "no-grad"}:
            assert check.count(ready(name, p), mode)["flops"] == flops(name, mode, p), (name, mode)


def test_roofline_names_what_bounds_a_row() -> None:
    speed = dict.fromkeys(counts.RATES, 1e12)
    frame = roofline.audit(SMALL, {("ours", STEP): 2.0}, speed | {"exp": 1.0})
    summary = roofline.summary(frame).set_index(["provider", "mode"])
    assert summary.loc[("ours", STEP), "bound by"] == "passes over the logits (100%)"
    assert summary.loc[("ours", STEP), "predicted_s"] == pytest.approx(2 * SMALL.n * SMALL.classes)
    assert summary.loc[("ours", STEP), "measured_s"] == 2.0
    assert pd.isna(summary.loc[("plain", STEP), "measured_s"])
    assert summary.loc[("plain", STEP), "bound by"].startswith("memory traffic")
    slow = roofline.summary(roofline.audit(SMALL, {}, speed | {"dX product": 1.0}))
    assert slow.set_index(["provider", "mode"]).loc[("ours", STEP), "bound by"] == "GEMMs (100%)"


# -- other commands ----------------------------------------------------------------------------------------------


def test_wrong_names_are_told(tmp_path: Path) -> None:
    for wrong in (
        ["--classes", "x"],
        ["--classes", "10", "--providers", "nobody"],
        ["--classes", "10", "--losses", "no"],
    ):
        assert CliRunner().invoke(app, ["run", "--tiny", *wrong, "--out", str(tmp_path)]).exit_code == 2
    assert CliRunner().invoke(app, ["report", "--out", str(tmp_path)]).exit_code == 2
    with pytest.raises(ValueError, match="dtype"):
        _ = Problem(1, 1, 1, "float31").torch_dtype


def test_providers_are_listed() -> None:
    listed = CliRunner().invoke(app, ["providers"])
    assert listed.exit_code == 0
    assert "ours-in-backward" in listed.output


def test_plan_and_roofline_commands(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["plan", "--c", "1000000", "--d", "128", "--memory", "4000"])
    assert made.exit_code == 0, made.output
    assert "retain_bytes=1024000000" in made.output
    line = ["roofline", "--n", "8", "--d", "8", "--c", "200", "--rounds", "1", "--out", str(tmp_path)]
    audited = CliRunner().invoke(app, line)
    assert audited.exit_code == 0, audited.output
    assert "what bounds the rows" in audited.output
    assert "aten::mm" in (tmp_path / "profile_ours_float32_N8_D8_C200.txt").read_text()
    assert (pd.read_csv(tmp_path / "roofline_float32_N8_D8_C200.csv")["measured_s"] > 0).all()


def test_the_cost_of_a_sampled_step_is_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sampled", "--tiny", "--rounds", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "sampled.csv")
    assert (frame[["full_s", "sampled_s", "sampling_s"]] > 0).all(axis=None)
    assert frame["machine"].str.contains("torch").all()


def test_the_head_of_millions_reports_at_a_small_size(tmp_path: Path) -> None:
    from examples import million

    million.main(["--classes", "2e4", "--dim", "16", "--steps", "2", "--out", str(tmp_path / "million")])
    found = json.loads((tmp_path / "million.json").read_text())
    assert [row["rows"] for row in found["sampled"]] == [500, 1000, 2000, 4000]
    assert found["usual code"]["first that does not fit"] is None
    first, last = found["loss of the first batch, first and last"]
    assert last < first
    assert "20,000 classes" in (tmp_path / "million.md").read_text()


def test_margins_of_the_suite_are_the_recipes() -> None:
    assert isinstance(margin_of("softmax"), tm.Softmax)
    assert float(margin_of("arcface").m) == 0.5
    assert margin_of("cosface").s == 64.0
