"""Memory of a head before it runs, versus measured peaks; and work of a step, counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from perf_cases import ROOT

from perf.counts import check as counting
from perf.counts import step_ops
from perf.planner import check
from perf.planner import memory as planner
from perf.planner.memory import GRADIENTS, Head, memory, memory_on, plan, plan_table, verdict
from perf.providers.base import STEP, WHOLE

pd = pytest.importorskip("pandas")

REPORTS, BACKWARD = ROOT / "reports", "update in backward"
HUGE = Head(100_000_000, 512, 512, ranks=64, compute_item=2)


@pytest.mark.parametrize("head", [
    Head(20_000, 64, 256), Head(20_000, 64, 256, gradient="sparse"),
    Head(30_000, 64, 32, rate=0.1, gradient="sparse", optimizer="adamw"),
    Head(20_000, 128, 32, rate=0.5, gradient="backward", optimizer="adamw"),
], ids=lambda head: f"{head.title}, {head.setting}")  # fmt: skip
def test_the_formula_is_within_one_percent_of_a_measured_peak(head: Head) -> None:
    assert memory_on(head, None).peak == pytest.approx(check.step_peak(head, None), rel=check.WITHIN)


@pytest.mark.parametrize("head", [
    Head(20_000, 64, 256), Head(20_000, 64, 256, gradient="backward", optimizer="adamw", weight_item=4),
    Head(20_000, 128, 32, rate=0.1, gradient="backward"), Head(20_000, 128, 256, rate=0.5, gradient="sparse"),
], ids=lambda head: f"{head.title}, {head.setting}")  # fmt: skip
@pytest.mark.parametrize("item", [2, 4])
def test_of_kernels_too(head: Head, item: int) -> None:
    """The same buffers are made where no launch runs; those that a GPU's products or sorts make are not seen."""
    head = head._replace(compute_item=item)
    with step_ops.stubbed(), torch.autocast("cpu", torch.bfloat16, enabled=item == 2):
        found = check.step_peak(head)
    assert memory_on(head, "h100").peak == pytest.approx(found, rel=check.WITHIN)


@pytest.mark.slow
def test_the_formula_holds_on_ranks() -> None:
    head = Head(30_000, 64, 64, ranks=2, rate=0.1)
    assert check.worst(check.table([head])) <= check.WITHIN


def test_the_grid_has_every_setting_and_its_committed_check_holds() -> None:
    heads = check.grid()
    assert len(set(heads)) == len(heads) == 48
    for field, values in {
        "classes": {20_000, 200_000}, "dim": {64, 256}, "batch": {32, 256}, "ranks": {1, 2}, "rate": {0.1, 1.0},
        "gradient": set(GRADIENTS), "optimizer": {"momentum", "adamw"},
    }.items():  # fmt: skip
        assert {getattr(head, field) for head in heads} == values
    frame = pd.read_csv(REPORTS / "plan_check.csv")
    assert check.worst(frame) <= check.WITHIN == 0.01
    assert [Head(*line) for line in frame[list(Head._fields)].itertuples(index=False)] == heads
    frame.loc[3, "formula_over_measured"] = 0.98
    assert check.worst(frame) == pytest.approx(0.02)


def test_a_ranks_memory_falls_with_the_ranks_and_with_the_settings_and_a_draw_counts_by_its_sample() -> None:
    drawn = Head(100_000_000, 64, 128, ranks=2, rate=0.1, compute_item=2, gradient="backward")
    assert memory(drawn, 64)[2:5] == ("draw", 0, 48 * 5_000_000)
    assert memory(drawn._replace(rate=1.0), 64).phase != "draw"
    head = Head(10_000_000, 512, 128, ranks=8, compute_item=2)
    dense, _, backward, state, weight = [memory_on(each, "h100") for each in planner.ladder(head)[:5]]
    assert dense.weight == dense.state == dense.gradient == 10_000_000 * 512 * 4 // 8
    assert backward.peak < dense.peak
    assert (state.state, weight.weight) == (dense.state // 2, dense.weight // 2)
    assert memory_on(head._replace(ranks=16, batch=64), "h100").weight == dense.weight // 2


@pytest.mark.parametrize(("capacity", "setting"), [
    (None, "dense gradient, float32 state, float32 weights;"), (8.0e9, f"{BACKWARD}, float32 state, float32 weights;"),
    (6.4e9, f"{BACKWARD}, bfloat16 state, float32 weights;"), (4.8e9, f"{BACKWARD}, bfloat16 state, bfloat16 weights;"),
    (4.55e9, f"{BACKWARD}, bfloat16 state, bfloat16 weights, sample rate 0.01;"),
])  # fmt: skip
def test_less_memory_takes_other_settings(capacity: float | None, setting: str) -> None:
    made = plan(HUGE, "h100", capacity)
    assert made.fitting
    assert f"of each for the head: {setting}" in verdict(made)
    assert verdict(made).startswith("fits on 64 x H100 SXM")
    shown = plan_table(made).set_index("setting")
    assert shown.loc[made.fitting[0].setting, ["fits", "ranks needed"]].tolist() == ["yes", "64"]


def test_plans_that_are_impossible_say_so() -> None:
    made = plan(HUGE._replace(ranks=1), "h100")
    assert made.fitting is None
    assert "no setting fits on 1 x H100 SXM, 78 GB of each for the head; 4 ranks would do" in verdict(made)
    assert set(plan_table(made)["fits"]) == {"NO"}
    assert "not even 65,536 ranks would do" in verdict(plan(HUGE, "h200", 1e6))
    assert verdict(plan(Head(1_000_000, 128, 256), capacity=4e9)).startswith("fits on 1 x CPU, 4 GB of each")


def test_the_page_of_published_sizes(tmp_path: Path) -> None:
    planner.write_table(tmp_path)
    for name in ("plan.csv", "plan.md"):
        assert (tmp_path / name).read_text() == (REPORTS / name).read_text(), "python -m perf plan-check"
    frame = pd.read_csv(tmp_path / "plan.csv", index_col=["classes", "rate"])
    assert frame.loc[(29_000_000, 0.1), "published_gb"] == 32.324
    assert (frame["bfloat16_too_gb"] < frame["update_in_backward_gb"]).all()


def test_counts_are_those_that_are_committed() -> None:
    """No step does more products, passes, operations, launches or allocations than the last time somebody looked."""
    found = counting.counts()
    assert counting.grown(counting.committed(), found) == []
    products = {name: value["flops"] / (2 * 64 * 64 * 5000) for name, value in found.items() if "flops" in value}
    for name, expected in {"ours, no-grad": 1, f"ours, {STEP}": 4, "ours, frozen W": 3, f"ours-retain, {STEP}": 3,
                           f"ours-in-backward, {WHOLE}": 4, f"ours-sampled, {STEP}": 0.4}.items():  # fmt: skip
        assert products[f"{name}, arcface, float32, N=64, D=64, C=5,000"] == pytest.approx(expected)


def test_more_work_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(counting, "PATH", tmp_path / "counts.json")
    gpu = counting.ON_GPU + "arcface"
    before = {"a": {"flops": 100, "elements": 1000, "peak": 10}, "gone": {"flops": 1}, gpu: {"launches": 5}}
    now = {"a": {"flops": 101, "elements": 1010, "peak": 11}, "b": {"flops": 1}}
    told = ["a: flops 100 -> 101", "a: peak 10 -> 11", "b: new", "gone: not counted any more"]
    monkeypatch.setattr(step_ops, "missing", lambda: "")
    assert counting.grown(before, now) == sorted([*told, f"{gpu}: not counted any more"])
    assert counting.grown(before, before | {gpu: {"launches": 6}}) == [f"{gpu}: launches 5 -> 6"]
    counting.write(before)
    monkeypatch.setattr(step_ops, "missing", lambda: "no ttsem")  # then those of a GPU stay as they are
    assert counting.grown(before, now) == told
    counting.write(now)
    assert counting.committed() == now | {gpu: {"launches": 5}}
    assert len(counting.PATH.read_text().splitlines()) == 3 + 2


def test_an_operation_counts_once_and_a_view_is_none() -> None:
    x = torch.ones(3, 4)
    for step, works, views in (
        (lambda: x.t().contiguous(), 1, 1), (lambda: x.contiguous(), 0, 0), (lambda: x.to(torch.float32), 0, 1),
        (lambda: x.to(torch.bfloat16), 1, 0), (lambda: torch.nn.functional.linear(x, x), 1, 0),
        (lambda: x.new_empty(3).fill_(1.0), 1, 1), (lambda: x.sum().item(), 1, 1),
        (torch.profiler.record_function("somebody else's")(lambda: x.add(1)), 1, 0),
    ):  # fmt: skip
        outermost = [event for event in step_ops.recorded(step) if event.cpu_parent is None]
        found = [works for _, works in step_ops.operations(outermost)]
        assert (found.count(True), found.count(False)) == (works, views)
    # What ttsem fills is not counted, what somebody fills is.
    outermost = [
        event for event in step_ops.recorded(lambda: x.new_empty(3).fill_(0.0).fill_(1.0)) if event.cpu_parent is None
    ]
    assert list(step_ops.operations(outermost, poisoned=True)) == [("new_empty", False), ("fill_", True)]
