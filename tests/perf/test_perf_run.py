"""How the perf suite measures: which cases, in turns, within their budgets, held in a folder. Times are scripted."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from perf_cases import SMALL, fp32_line

from perf import providers
from perf.providers.base import GRAPH, STEP, WHOLE
from perf.suite import machine, plans, results, rounds, runner
from perf.suite.plans import Budget, Case, Grid, Plan
from perf.suite.worker import Failed

pd = pytest.importorskip("pandas")


class Scripted:
    """A worker whose times are written down: the first is the warm-up."""

    def __init__(self, name: str, times: list[float], loss: float, order: list[str]) -> None:
        self.name, self.alive, self.left, self.loss, self.order = name, True, iter(times), loss, order

    def ask(self, command: str, *arguments: object, timeout: float | None = None) -> object:
        if command == "step":
            self.order.append(self.name)
            took = next(self.left)
            if took == math.inf:
                raise Failed("out of luck")
            return took, self.loss
        if self.loss == command:
            self.order.append(f"{self.name} hangs")
            raise Failed(f"stopped after {timeout:.0f} s")
        return {"supports": None, "prepare": None, "check": {"error_dx": 0.0}, "peak": {"peak_mb": 2.0}}[command]

    def tell(self, command: str, *arguments: object) -> None:
        self.order.append(f"{self.name}: {command} {arguments[-1]}")

    def answer(self, timeout: float) -> None:
        raise Failed("its failure ahead is no failure")

    def stop(self) -> None:
        self.alive = False


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    def measure(times: dict[str, list[float]], loss: Any = (), device: str = "cpu", modes: Any = (STEP,)) -> Any:
        order: list[str] = []

        def worker(name: str, threads: int) -> Scripted:
            return Scripted(name, times[name], dict(loss).get(name, 7.0), order)

        monkeypatch.setattr(rounds, "Worker", worker)
        p = replace(SMALL, device=device)
        cases = [Case(p, name, mode) for name in times if name != "gemm" for mode in modes]
        run = measure.run = rounds.Rounds(Budget(3, 0.0, 50.0), 1)
        run.history.add(Case(replace(p, classes=p.classes // 10), "pml", STEP), 9.0)
        rows, samples = run.measure(cases, lambda words: None)
        return pd.DataFrame(rows).set_index("provider"), pd.DataFrame(samples), order

    return measure


def test_providers_take_turns_and_are_divided_within_a_round_on_a_gpu_after_all_have_compiled_at_once(script) -> None:
    rows, samples, order = script({"gemm": [1, 1, 1.5, 2.5, 4, 4], "ours": [9, 3, 8, 16], "plain": [9, 9, 16, 80]})
    assert order == ["ours", "plain", *["gemm", "ours", "plain", "gemm"] * 3]  # first steps, then three rounds
    ours, plain = rows.loc["ours"], rows.loc["plain"]
    assert (ours["q25_s"], ours["median_s"], ours["q75_s"]) == (5.5, 8.0, 12.0)  # without the first step
    assert (ours["samples"], ours["peak_mb"], ours["x_gemm"]) == (3, 2.0, 4.0)  # median of 3/1, 8/2, 16/4
    assert (plain["x_gemm"], plain["times_ours"]) == (9.0, 3.0)  # of 9, 8, 20, and of 3, 2, 5
    assert (len(samples), (samples["position"] == "first").sum()) == (12, 3)
    times = {"gemm": [1] * 12, "ours": [1] * 8, "plain": [1] * 8}
    rows, _, order = script(times, device="cuda", modes=(STEP, GRAPH))
    assert order[:2] == [f"{name}: ahead {[STEP, GRAPH]}" for name in ("ours", "plain")]
    assert list(rows["samples"]) == [3] * 4
    assert list(rows["peak_mb"].notna()) == [True, False] * 2  # a graph's memory is that of the step


def test_a_failing_case_is_a_row_and_ends_nothing_and_a_loss_that_is_not_ours_is_wrong(script) -> None:
    times = {"gemm": [1] * 6, "ours": [1] * 4, "plain": [1, 1, math.inf], "insightface": [math.inf]}
    rows, _, _ = script(times, {"plain": 7.1})
    assert list(rows["samples"]) == [3, 1, 0]
    assert list(rows["note"]) == ["", "out of luck", "out of luck"]
    assert list(rows["wrong"]) == ["", "its loss is 7.1, ours 7", ""]


@pytest.mark.parametrize("command", ["supports", "check", "prepare"])
def test_who_hangs_is_a_row_at_every_size_and_waited_for_once(command: str, script) -> None:
    rows, _, order = script({"gemm": [1] * 12, "ours": [1] * 8, "plain": []}, {"plain": command})
    assert rows.at["plain", "note"].endswith("stopped after 60 s")
    larger = [Case(replace(SMALL, d=16, loss="cosface"), name, STEP) for name in ("ours", "plain")]
    ours, plain = script.run.measure(larger, lambda words: None)[0]
    assert (ours["samples"], plain["samples"], order.count("plain hangs")) == (3, 0, 1)
    assert plain["note"] == f"not run: {rows.at['plain', 'note']}, at {SMALL.title}"


def test_a_step_past_the_budget_is_measured_once_and_predicted_elsewhere(script) -> None:
    rows, _, _ = script({"gemm": [1.0] * 6, "ours": [1.0] * 4, "plain": [60.0], "pml": []})
    assert rows.at["pml", "note"] == "predicted 90 s a step, past the budget of 50 s"
    assert (rows.at["plain", "samples"], rows.at["plain", "median_s"]) == (1, 60.0)
    assert rows.at["plain", "note"] == "one step, the first: past the budget of 50 s"
    history = rounds.History()
    history.add(Case(SMALL, "plain", STEP), 2.0)
    history.add(Case(replace(SMALL, n=24), "plain", STEP), 3.0)
    for other, seconds in (({"classes": 600}, 6.0), ({"n": 24, "classes": 600}, 9.0), ({"d": 32}, 4.0)):
        assert history.predict(Case(replace(SMALL, **other), "plain", STEP)) == pytest.approx(seconds)
    # Three rounds, then until 1 s is over or there were five.
    asked = ((2, 12.0), (3, 0.9), (3, 1.0), (4, 0.9), (5, 0.9))
    assert [Budget(5, 1.0, 10.0).another(*each) for each in asked] == [True, True, False, True, False]


def test_a_matrix_that_does_not_fit_is_a_row_before_anything_is_filled(script, monkeypatch) -> None:
    left = iter([4 * SMALL.weight_bytes, SMALL.weight_bytes // 2])  # W fits, and then the momentum does not
    monkeypatch.setattr(rounds.memory, "available_bytes", lambda: rounds.memory.RESERVE + next(left))
    rows, _, _ = script({"gemm": [1.0] * 6, "ours": [1.0] * 8}, modes=(STEP, WHOLE))
    assert list(rows["samples"]) == [3, 0]
    assert "the momentum is" in rows["note"].iloc[1]


def test_a_second_run_of_a_size_keeps_what_it_did_not_measure_and_tries_again_what_was_not_installed() -> None:
    """Ours takes part again to be divided by, plain is past the budget the second time, pml is new, then again."""
    rows, samples, wanted = {}, [], {results.key_of(fp32_line(name, STEP)) for name in ("plain", "pml")}
    for number, seconds in enumerate(({"ours": 1, "plain": 30}, {"ours": 2, "plain": 0, "pml": 3}, {"pml": 20})):
        made = [fp32_line(name, STEP, run=number, samples=5 * (s > 0), seconds=s) for name, s in seconds.items()]
        results.add_block(rows, samples, (made, [row for row in made if row["samples"]]), wanted)
    assert [(row["provider"], row["run"]) for row in rows.values()] == [("ours", 0), ("plain", 0), ("pml", 2)]
    taken = [(line["provider"], line["run"]) for line in samples]
    assert taken == [("ours", 0), ("plain", 0), ("ours", 1), ("pml", 2)]
    # What was not installed is tried again when it is.
    for note, expected in (
        ("out of memory: 9 GB", False), ("not begun: no time", True), ("", False),
        ("nobodys_package is not installed", False), ("torch is not installed", True),
    ):  # fmt: skip
        assert results.is_open(fp32_line("cce", STEP, note=note)) == expected


FACTS = machine.describe() | {"threads": 1, "plan": "tiny"}
TINY = Grid((300,), (16,), (8,), providers=("ours", "plain"), modes=(STEP,))


def run(folder: Path, grid: Grid, minutes: float = 9.0, **how: Any) -> results.Results:
    return runner.run_plan(Plan((grid,), Budget(2, 0.0, 5.0, minutes=minutes)), folder, FACTS, **how)


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Also one that had no time, and one of which nothing fits: its folder says why, and can be used."""
    late = run(tmp_path, TINY, minutes=-1.0)
    assert set(late.rows["note"].str[:9]) == {"not begun"}
    huge = run(tmp_path, replace(TINY, classes=(10**9,), dims=(512,)))
    assert set(huge.rows["note"].str[:16]) == {"not begun: the -", "out of memory: W"}
    assert (len(huge.rows), len(huge.samples)) == (4, 0)
    (tmp_path / "ceilings.csv").write_text("\n")  # as it was once left by a run of which nothing fitted
    first = run(tmp_path, TINY).rows.set_index("C").loc[300]
    assert list(first["samples"]) == [2, 2]
    assert (first["limit_s"] > 0).all()
    again = run(tmp_path, replace(TINY, providers=("ours", "plain", "pml")))
    assert again.rows.set_index(["C", "provider"])["run"].loc[300].to_dict() == {"ours": "3", "plain": "3", "pml": "4"}
    assert len(run(tmp_path, TINY).runs) == len(again.runs) == 4


def test_a_run_that_is_interrupted_leaves_whole_files(tmp_path: Path) -> None:
    begun = []

    def interrupted(part: float, words: str) -> None:
        if "C=1,000" in words and "round 2" in words:
            begun.extend(multiprocessing.active_children())
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, replace(TINY, classes=(300, 1000)), progress=interrupted)
    signal.signal(signal.SIGINT, before)
    held = results.load(tmp_path)
    assert (list(held.rows["C"]), len(held.samples)) == ([300, 300], 8)
    assert not list(tmp_path.glob("*.part"))
    assert len(begun) >= 3
    assert not set(multiprocessing.active_children()) & set(begun)


def test_another_machines_folder_is_refused_by_name(tmp_path: Path) -> None:
    for name, value in {"cpu": "an abacus", "cores": 1000, "threads": 1000, "torch": "1.0", "gpu": "H100"}.items():
        results.save(tmp_path, results.load(tmp_path)._replace(runs={"1": FACTS | {name: value}}))
        with pytest.raises(ValueError, match=f"another machine: .*{value}"):
            run(tmp_path, TINY)
    results.save(tmp_path, results.load(tmp_path)._replace(runs={"1": FACTS | {"commit": "x", "date": "1999-01-01"}}))
    assert results.of_this_machine(tmp_path, FACTS).runs
    assert machine.one_line({"gpu": "H200", "gpu_memory_gib": 139.8, "date": "1999"}) == "H200, 139.8 GiB; 1999"
    assert f"{FACTS['memory_gib']} GiB, torch {FACTS['torch']}, 1 threads; " in machine.one_line(FACTS)


@pytest.mark.parametrize("name", plans.PLANS)
def test_plans_name_what_exists(name: str) -> None:
    for plan in (plans.PLANS[name], plans.PLANS[name].on("cuda")):
        plan.check()
        for case in itertools.chain(*plan.blocks().values()):
            providers.split(case.provider)
            assert ":" not in case.provider if case.problem.on_gpu else case.mode != GRAPH


def test_the_gpu_plan_begins_with_what_is_asked_first() -> None:
    blocks = plans.PLANS["gpu"].blocks()
    first = list(blocks.items())[:4]
    asked = itertools.product(("arcface", "softmax"), (100_000, 1_000_000))
    assert [(p.loss, p.classes, p.n, p.d, p.dtype) for p, _ in first] == [(*a, 1024, 512, "bfloat16") for a in asked]
    for _, cases in first:
        assert {STEP, GRAPH} <= {case.mode for case in cases if case.provider == "ours"}
        assert {"plain", "plain-compiled"} <= {case.provider for case in cases}
    assert any(case.provider == "ours-sampled" for case in first[0][1])


@pytest.mark.parametrize(("given", "said"), [
    ({"providers": ("liger",)}, "liger can do nothing of what is asked, it has --losses softmax, --dtype float32"),
    ({"providers": ("ours", "insightface")}, "insightface can do nothing"), ({"modes": (GRAPH,)}, "need a GPU"),
    ({"dtypes": ("tf32",)}, "need a GPU"), ({"providers": ("nobody",)}, "no provider 'nobody'"),
    ({"losses": ("arcfase",)}, "losses are among"), ({"classes": (0,)}, "classes must be positive"),
])  # fmt: skip
def test_a_grid_of_your_own_says_what_it_cannot_do(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan((plans.custom_grid(**given),), Budget(1, 0.0, 1.0)).check()
