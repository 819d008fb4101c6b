"""How the perf suite measures: which cases, taking turns, within their budgets. Times are scripted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

for module in ("pandas", "matplotlib", "tabulate", "typer", "rich", "jinja2"):
    pytest.importorskip(module, reason=f"{module} is part of the perf extra: pip install -e '.[perf]'")

import pandas as pd  # noqa: E402
from perf_cases import SMALL, fp32_line, quiet  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from perf import (  # noqa: E402
    bounds,
    grid,
    machine,
    measure,
    peaks,
    providers,
    results,
    worker,
)
from perf.cli import app  # noqa: E402
from perf.grid import Budget, Case, Grid  # noqa: E402
from perf.problem import Problem  # noqa: E402
from perf.providers.base import STEP, WHOLE  # noqa: E402
from perf.worker import Failed  # noqa: E402

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
        if command == "hold_state":
            self.order.append(f"{self.name}: {command}")
        nothing = dict.fromkeys(("supports", "prepare", "hold_state"))
        return {**nothing, "check": {"error_dx": 0.0}, "peak": {"peak_mb": 2.0}}[command]

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


def test_a_size_that_does_not_fit_is_a_row_before_anything_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "buffers", lambda problem: pytest.fail("filled"))
    large = replace(SMALL, classes=10**9, d=512)
    cases = [Case(large, name, STEP) for name in ("ours", "plain")]
    block = measure.measure(large, cases, Budget(1, 1, 0.0, 9.0), 1, measure.History(), measure.Checks(), quiet)
    assert [row["provider"] for row in block.rows] == ["ours", "plain"]
    assert all("W is 2.05e+03 GB" in row["note"] for row in block.rows)


def test_where_the_momentum_has_no_room_the_steps_without_it_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "times", {"gemm": [1.0] * 6, "ours": [1.0] * 8})
    monkeypatch.setattr(Scripted, "order", [])
    left = iter([4 * SMALL.weight_bytes, SMALL.weight_bytes // 2])
    monkeypatch.setattr(measure.limits, "available_bytes", lambda: measure.limits.RESERVE + next(left))
    cases = [Case(SMALL, "ours", mode) for mode in (STEP, WHOLE)]
    block = measure.measure(SMALL, cases, Budget(3, 3, 0.0, 9.0), 1, measure.History(), measure.Checks(), quiet)
    step, whole = block.rows
    assert step["samples"] == 3
    assert whole["samples"] == 0
    assert "the momentum is" in whole["note"]


def test_a_whole_step_is_measured_with_the_momentum_in_the_resident_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first step would else count the pages of the momentum's file, which a real optimiser holds already."""
    monkeypatch.setattr(measure, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "times", {"gemm": [1.0] * 4, "ours": [1.0] * 4})
    monkeypatch.setattr(Scripted, "order", [])
    cases = [Case(SMALL, "ours", mode) for mode in (STEP, WHOLE)]
    measure.measure(SMALL, cases, Budget(1, 1, 0.0, 9.0), 1, measure.History(), measure.Checks(), quiet)
    turns = ["ours", "gemm", "ours", "gemm"]
    assert Scripted.order == [*turns, "ours: hold_state", *turns]

    problem = replace(SMALL, classes=200_000)
    with measure.buffers(problem) as files:
        desk = worker.Desk("ours")
        desk.prepare(problem, files)
        assert peaks.resident_growth(lambda: None) < problem.weight_bytes / 4
        assert peaks.resident_growth(desk.hold_state) > 0.9 * problem.weight_bytes
        assert peaks.resident_growth(desk.hold_state) < problem.weight_bytes / 4


# -- results -----------------------------------------------------------------------------------------------------


def a_row(provider: str, run: str, seconds: float | None = 1.0, note: str = "") -> dict[str, object]:
    line = fp32_line(provider, STEP, median_s=math.nan if seconds is None else seconds)
    return {**line, "samples": 0 if seconds is None else 5, "note": note, "run": run}


def steps(provider: str, run: str, seconds: float) -> list[dict[str, object]]:
    line = {name: fp32_line(provider, STEP)[name] for name in results.KEY}
    return [{**line, "round": k, "place": "", "seconds": seconds, "run": run} for k in range(5)]


def test_a_second_run_of_a_size_keeps_what_it_did_not_measure() -> None:
    """Ours takes part again to be divided by, plain is past the budget this time, pml is new."""
    first = [a_row("ours", "1"), a_row("plain", "1", 30.0)]
    held = results.load(Path("/nonexistent"))._replace(
        rows=pd.DataFrame(first), samples=pd.DataFrame(steps("ours", "1", 1.0) + steps("plain", "1", 30.0))
    )
    rows = [a_row("ours", "2", 2.0), a_row("plain", "2", None, "predicted 30 s a step"), a_row("pml", "2", 3.0)]
    wanted = {tuple(row[name] for name in results.KEY) for row in rows[1:]}
    found = results.with_block(held, rows, steps("ours", "2", 2.0) + steps("pml", "2", 3.0), wanted)
    kept = found.rows.set_index("provider")
    assert kept["run"].to_dict() == {"ours": "1", "plain": "1", "pml": "2"}
    assert kept["median_s"].to_dict() == {"ours": 1.0, "plain": 30.0, "pml": 3.0}
    assert found.samples.groupby(["provider", "run"]).size().to_dict() == {
        ("ours", "1"): 5, ("ours", "2"): 5, ("plain", "1"): 5, ("pml", "2"): 5,
    }  # fmt: skip
    again = results.with_block(found, [a_row("plain", "3", 20.0)], steps("plain", "3", 20.0), wanted)
    assert again.rows.set_index("provider")["median_s"]["plain"] == 20.0
    assert set(again.samples[again.samples["provider"] == "plain"]["run"]) == {"3"}


def test_what_was_not_installed_is_tried_again_when_it_is() -> None:
    rows = pd.DataFrame([
        a_row("plain", "1", None, "some: No module named 'some'"), a_row("nobody", "1", None, "no provider 'nobody'"),
        a_row("pml", "1", None, "out of memory: 9 GB"), a_row("ours", "1", None, "not begun: no time"),
    ])  # fmt: skip
    assert {key[results.KEY.index("provider")] for key in results.done(rows)} == {"nobody", "pml"}


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


@pytest.mark.parametrize("name", ["default", "full"])
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
    fused = ("torch-lce", "torch-lce-chunked", "torch-lce-rows64")
    for c in (10_000, 100_000, 1_000_000, 4_000_000):
        for n in (32, 256, 1024):
            for d in (128, 512):
                for dtype in ("float32", "bfloat16"):
                    cases = blocks[Problem(n, d, c, dtype)]
                    names = {case.provider for case in cases}
                    assert names >= {*grid.OURS, "plain", "pml", "plain-sampled"}
                    assert {case.mode for case in cases} >= {"forward", STEP, WHOLE}
                    face = blocks[Problem(n, d, c, dtype, loss="arcface-straight-through")]
                    assert {case.provider for case in face} == {"ours", "insightface"}
                    plain = {case.provider for case in blocks[Problem(n, d, c, dtype, loss="softmax")]}
                    assert plain >= {"ours", "plain", "plain-compiled", *fused}


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


# -- one folder, one machine -------------------------------------------------------------------------------------


def folder(path: Path, **facts: object) -> Path:
    results.save(path, results.load(path)._replace(runs={"1": machine.describe() | facts}))
    return path


def test_another_machines_results_are_not_mixed_with_this_ones(tmp_path: Path) -> None:
    mine, out = machine.describe(), tmp_path / "perf"
    assert results.beside(out, mine) == out
    assert results.beside(folder(out), mine) == out
    assert results.beside(folder(out, commit="another", date="1999-01-01"), mine) == out
    here = mine | {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"}
    for name, value in {"cpu": "another", "cores": 1000, "threads": 1000, "torch": "1.0"}.items():
        folder(out, **{name: value})
        assert str(value) in results.another_machine(out, mine)
        assert results.beside(out, here) == tmp_path / "perf-intel-xeon-platinum-8481c"
    folder(tmp_path / "perf-intel-xeon-platinum-8481c", cpu=here["cpu"], threads=1000)
    assert results.beside(out, here) == tmp_path / "perf-intel-xeon-platinum-8481c-2"
    folder(tmp_path / "perf-intel-xeon-platinum-8481c-2", cpu=here["cpu"])
    assert results.beside(out, here) == tmp_path / "perf-intel-xeon-platinum-8481c-2"
    assert "AVX" in results.another_machine(folder(out, instruction_set="AVX"), mine)
    assert results.another_machine(folder(out, caches={"L3 Unified": "1K"}), mine)
    gpu = mine | {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3"}
    for facts in ({}, {"device": "cuda", "gpu": "NVIDIA A100"}):
        assert results.beside(folder(out, **facts), gpu) == tmp_path / "perf-nvidia-h100-80gb-hbm3"


def test_a_folder_of_another_machine_is_refused_by_name(tmp_path: Path) -> None:
    line = ["run", "--tiny", "--out", str(folder(tmp_path / "perf", cpu="an abacus"))]
    said = CliRunner().invoke(app, line)
    assert said.exit_code == 2
    assert "an abacus" in said.output
    assert not (tmp_path / "perf" / "index.html").exists()
