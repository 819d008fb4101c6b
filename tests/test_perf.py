"""The perf suite: what it counts, compares and writes, at tiny sizes. No test looks at a time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for module in ("pandas", "matplotlib", "tabulate", "typer", "rich"):
    pytest.importorskip(module, reason=f"{module} is part of the perf extra: pip install -e '.[perf]'")

import pandas as pd  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import tritonmargin as tm  # noqa: E402
from perf import audit, bounds, counts, memory, plan, providers, report, timing  # noqa: E402
from perf.cli import app  # noqa: E402
from perf.problem import MARGIN, SCALE, Problem  # noqa: E402
from perf.providers.base import MODES, Provider  # noqa: E402
from perf.tables import SCALES, STEP, Row, Table, tables  # noqa: E402

SMALL = Problem(n=6, d=8, classes=50)
FOUND = providers.discover().providers


def ready(name: str, problem: Problem = SMALL) -> Provider:
    return memory.fresh(FOUND[name], problem)


# -- providers ---------------------------------------------------------------------------------------------------


def test_expected_competitors_are_found() -> None:
    assert {"gemm", "ours", "ours-retain", "ours-linear", "plain"} <= set(FOUND)
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


@pytest.mark.parametrize("name", [name for name, provider in FOUND.items() if provider.loss])
def test_every_provider_computes_the_reference(name: str) -> None:
    problem = replace(SMALL, n=70)  # more rows than the chunk of 64
    if needs := FOUND[name]().supports(problem):
        pytest.skip(needs)
    provider = ready(name, problem)
    loss = provider.run(STEP)
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (provider.x, problem.tensors().weight))
    margin = tm.ArcFace(m=MARGIN, s=SCALE) if provider.loss == "arcface" else tm.Softmax()
    expected = tm.reference.margin_cross_entropy(x, weight, provider.target, margin)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert provider.x.grad is not None
    assert provider.weight.grad is not None
    own = provider.weight.grad if provider.weight.shape == weight.shape else provider.weight.grad.t()
    for gradient, right in ((provider.x.grad, x.grad), (own, weight.grad)):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize("name", [name for name, provider in FOUND.items() if provider.modes == MODES])
def test_modes_do_what_they_say(name: str) -> None:
    provider = ready(name)
    losses = {}
    for mode in MODES:
        provider.reset(mode)
        loss = provider.run(mode)
        losses[mode] = float(loss.detach())
        assert loss.requires_grad == (mode == "forward")
        assert (provider.x.grad is not None) == (mode in (STEP, "frozen W"))
        assert (provider.weight.grad is not None) == (mode == STEP)
        provider.reset(mode)
        assert provider.x.grad is None
        assert provider.weight.grad is None
    assert len(set(losses.values())) == 1


def test_what_does_not_fit_is_refused_before_it_runs() -> None:
    assert FOUND["ours"]().supports(SMALL) is None
    huge = Problem(n=1 << 20, d=8, classes=1 << 24)
    assert "GiB" in str(FOUND["plain"]().supports(huge))
    assert FOUND["plain"]().supports(replace(SMALL, dtype="float64")) == "no float64"


# -- timing ------------------------------------------------------------------------------------------------------


def table(*rows: tuple[str, str], rounds: int = 3, problem: Problem = SMALL) -> Table:
    return Table("fp32", "", [Row(problem, provider, mode) for provider, mode in rows], rounds)


def quiet(_: str) -> None:
    """Says nothing."""


def test_rows_are_timed_round_robin_and_divided_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = {"gemm": [9.0, 1.0, 2.0, 4.0], "ours": [9.0, 3.0, 8.0, 16.0], "plain": [9.0, 9.0, 16.0, 80.0]}
    order, now = [], {name: iter(values) for name, values in scripted.items()}

    def step(provider: Provider, mode: str) -> tuple[float, float]:
        order.append(provider.name)
        return next(now[provider.name]), 7.0

    monkeypatch.setattr(timing, "step", step)
    frame = timing.measure(table(("gemm", "no-grad"), ("ours", STEP), ("plain", STEP)), quiet)
    assert order == ["gemm", "ours", "plain"] * 4  # a warm-up and three rounds
    gemm, ours, plain = (row for _, row in frame.iterrows())
    assert list(frame["samples"]) == [3, 3, 3]
    assert (ours["q25"], ours["median_s"], ours["q75"]) == (5.5, 8.0, 12.0)  # without the warm-up
    assert gemm["ratio_to_gemm"] == 1.0
    assert ours["ratio_to_gemm"] == 4.0  # median of 3, 4, 4
    assert plain["ratio_to_gemm"] == 9.0  # median of 9, 8, 20
    assert plain["ratio_of_medians"] == 8.0  # 16 / 2
    assert plain["times_ours"] == 3.0  # median of 3, 2, 5


def test_every_row_is_there_measured_or_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Provider) -> torch.Tensor:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(FOUND["plain"], "forward", fail)
    rows = [("gemm", "no-grad"), ("ours", "forward"), ("nobody", STEP), ("plain", STEP), ("ours-retain", "no-grad")]
    frame = timing.measure(table(*rows, rounds=1), quiet).set_index("provider")
    assert list(frame["samples"]) == [1, 1, 0, 0, 0]
    assert frame.at["plain", "note"] == "out of luck"
    assert frame.at["ours-retain", "note"] == "has no mode 'no-grad'"
    assert frame.at["nobody", "note"]
    assert frame.at["ours", "median_s"] > 0.0


def test_our_own_failure_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Provider) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(FOUND["ours"], "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        timing.measure(table(("ours", STEP)), quiet)


def test_rows_that_compute_something_else_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FOUND["plain"].forward
    monkeypatch.setattr(FOUND["plain"], "forward", lambda self: 1.01 * right(self))
    with pytest.raises(timing.Disagreement, match="plain"):
        timing.measure(table(("ours", STEP), ("plain", STEP)), quiet)
    timing.measure(table(("ours-linear", STEP), ("ours", STEP), rounds=1), quiet)  # two losses: no comparison


# -- memory ------------------------------------------------------------------------------------------------------


def test_peak_leaves_out_the_gradient_from_its_allocation_on() -> None:
    assert memory.peak_without([5, 10, -10, 7], 0) == 15
    assert memory.peak_without([10, 5, -10, 10, 2], 10) == 15  # the first 10 is a temporary, the last the gradient
    assert memory.peak_without([5, 10, 2], 10) == 7
    assert memory.peak_without([], 10) == 0


def peak_mb(name: str, classes: int, mode: str = STEP) -> float:
    problem = Problem(n=64, d=16, classes=classes)
    provider = ready(name, problem)
    memory.run(provider, mode)
    provider.reset(mode)
    events = memory.allocations(lambda: memory.run(provider, mode))
    return memory.peak_without(events, problem.weight_bytes if mode == STEP else 0) / 1e6


def test_our_memory_does_not_grow_with_classes_and_full_logits_do() -> None:
    small, large = peak_mb("ours", 200_000), peak_mb("ours", 400_000)
    assert large <= 1.02 * small
    assert large < 0.15 * 64 * 400_000 * 4 / 1e6
    assert peak_mb("plain", 20_000) > 4 * 64 * 20_000 * 4 / 1e6
    assert peak_mb("ours", 400_000, "no-grad") <= large


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    numbers = memory.in_subprocess(Row(Problem(n=64, d=16, classes=30_000), "plain", STEP))
    logits = 64 * 30_000 * 4 / 1e6
    assert set(numbers) == {"beyond_rss_mb", "beyond_profiler_mb"}
    assert 4 * logits < float(numbers["beyond_profiler_mb"]) < 8 * logits
    assert 2 * logits < float(numbers["beyond_rss_mb"]) < 12 * logits
    assert set(memory.in_subprocess(Row(SMALL, "nobody", STEP))) == {"note"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "d"), [(64, 32), (16, 128), (128, 16)])
def test_plan_predicts_the_measured_peak(dtype: str, n: int, d: int) -> None:
    p = Problem(n, d, 20_000, dtype)
    made = plan.plan(p, chunk_bytes=0)
    for name, expected in (("ours", made.ours), ("plain", made.full_logits)):
        provider = ready(name, p)
        memory.run(provider, STEP)
        provider.reset(STEP)
        events = memory.allocations(lambda provider=provider: memory.run(provider, STEP))
        assert memory.peak_without(events, p.weight_bytes) == pytest.approx(expected, rel=0.2)


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


# -- tables and bounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_tables_name_known_rows(scale: str) -> None:
    for table in tables(scale).values():
        assert table.rows
        for row in table.rows:
            if row.provider in FOUND:
                assert row.mode in FOUND[row.provider].modes
            else:
                assert row.provider.startswith(("pml", "torch-lce"))
                assert providers.discover().skipped


def test_quick_covers_every_bound_with_enough_samples() -> None:
    quick = tables("quick")
    for bound in bounds.BOUNDS:
        rows = [
            row
            for row in quick[bound.table].rows
            if (row.provider, row.mode) == (bound.provider, bound.mode)
            and row.problem == Problem(bound.n, bound.d, bound.classes, bound.dtype)
        ]
        assert len(rows) == 1, bound
        if not quick[bound.table].memory:
            assert quick[bound.table].rounds >= 5
            assert Row(rows[0].problem, "gemm", "no-grad") in quick[bound.table].rows
    assert set(quick) <= set(tables("full"))


def fp32_line(provider: str, mode: str, **numbers: float) -> dict[str, object]:
    return {"table": "fp32", "provider": provider, "mode": mode, "dtype": "float32", "N": 256, "D": 512, "C": 131_072,
            "samples": 5, **numbers}  # fmt: skip


def test_bounds_are_checked_where_they_apply() -> None:
    frame = pd.DataFrame([
        fp32_line("ours", STEP, ratio_to_gemm=3.91),
        fp32_line("ours-retain", STEP, ratio_to_gemm=3.0),
        fp32_line("ours", "forward", ratio_to_gemm=1.0),
        fp32_line("plain", STEP, ratio_to_gemm=9.0, times_ours=2.4),
        fp32_line("ours", "no-grad", ratio_to_gemm=50.0),
        fp32_line("ours", STEP, ratio_to_gemm=50.0) | {"D": 64},
    ])  # fmt: skip
    checked = bounds.check(frame)
    assert list(checked["met"]) == ["NO", "yes", "yes", "yes", "", ""]
    assert checked["bound"].iloc[0] == "x GEMM <= 3.9"
    assert checked["bound"].iloc[3] == "x ours >= 2.4"


def test_growth_and_time_per_class_compare_with_a_hundred_thousand() -> None:
    def line(classes: int, peak: float, seconds: float) -> dict[str, object]:
        return {"table": "linear", "provider": "ours", "mode": STEP, "dtype": "float32", "N": 256, "D": 128,
                "C": classes, "samples": 5, "beyond_profiler_mb": peak, "median_s": seconds}  # fmt: skip

    frame = pd.DataFrame([line(10_000, 1.0, 1.0), line(100_000, 10.0, 2.0), line(1_000_000, 11.0, 24.0)])
    made = bounds.derive(frame)
    assert made["growth"].isna().tolist() == [True, False, False]
    assert made["growth"].iloc[2] == pytest.approx(1.1)
    assert made["per_class"].iloc[2] == pytest.approx(1.2)
    assert bounds.check(made)["met"].tolist() == ["", "", "NO"]


# -- audit -------------------------------------------------------------------------------------------------------


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
            provider = ready(name, p)
            provider.reset(mode)
            cpu = torch.profiler.ProfilerActivity.CPU
            with memory.quiet_stderr(), torch.profiler.profile(activities=[cpu], record_shapes=True) as record:
                provider.run(mode)
            done = 0
            for event in record.events():
                if event.name in ("aten::mm", "aten::addmm_"):
                    (rows, inner), (_, columns) = event.input_shapes[event.name == "aten::addmm_" :][:2]
                    done += 2 * rows * inner * columns
            assert done == flops(name, mode, p), (name, mode)


def test_audit_names_what_bounds_a_row() -> None:
    speed = dict.fromkeys(counts.RATES, 1e12)
    frame = audit.audit(SMALL, {("ours", STEP): 2.0}, speed | {"exp": 1.0})
    summary = audit.summary(frame).set_index(["provider", "mode"])
    assert summary.loc[("ours", STEP), "bound by"] == "passes over the logits (100%)"
    assert summary.loc[("ours", STEP), "predicted_s"] == pytest.approx(2 * SMALL.n * SMALL.classes)
    assert summary.loc[("ours", STEP), "measured_s"] == 2.0
    assert pd.isna(summary.loc[("plain", STEP), "measured_s"])
    assert summary.loc[("plain", STEP), "bound by"].startswith("memory traffic")
    slow = audit.summary(audit.audit(SMALL, {}, speed | {"dX product": 1.0}))
    assert slow["bound by"].iloc[0] == "GEMMs (100%)"


# -- commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports")
    line = ["run", "--tiny", "--only", "fp32", "--only", "linear", "--only", "audit", "--profile", "--out", str(out)]
    before = torch.get_num_threads()
    done = CliRunner().invoke(app, [*line, "--threads", "1"])
    torch.set_num_threads(before)
    assert done.exit_code == 0, done.output
    assert "fp32: float32" in done.output
    return out


def test_run_writes_tables_machine_page_and_profiles(written: Path) -> None:
    frame = pd.read_csv(written / "fp32.csv")
    columns = "table provider dtype N D C mode median_s q25 q75 ratio_to_gemm ratio_of_medians times_ours samples note"
    assert set(columns.split()) <= set(frame.columns)
    assert len(frame) == len(tables("tiny")["fp32"].rows)
    assert set(pd.read_csv(written / "audit.csv")["provider"]) == {"ours", "ours-retain", "plain"}
    facts = json.loads((written / "machine.json").read_text())
    assert set(facts) == {"fp32", "linear", "audit"}
    for name in ("cpu", "cores", "caches", "torch", "threads", "date", "load_before"):
        assert name in facts["fp32"]
    page = (written / "perf.md").read_text()
    assert "## float32" in page
    assert "bound by" in page
    assert str(written) not in page
    assert (written / "speed.png").stat().st_size > 1000
    assert (written / "linear.png").stat().st_size > 1000
    profiles = sorted(written.glob("profile_ours_*.txt"))
    assert profiles
    assert "aten::mm" in profiles[0].read_text()


def test_report_renders_again_from_the_csvs(written: Path) -> None:
    before = (written / "perf.md").read_text()
    (written / "perf.md").unlink()
    assert CliRunner().invoke(app, ["report", "--out", str(written)]).exit_code == 0
    assert (written / "perf.md").read_text() == before
    short = CliRunner().invoke(app, ["report", "--markdown", "--out", str(written)])
    assert short.exit_code == 0
    assert "| tritonmargin" in short.output
    assert "quartiles" not in short.output


def test_page_says_what_holds_and_what_could_not_run(tmp_path: Path) -> None:
    frame = pd.DataFrame([
        fp32_line("gemm", "no-grad", median_s=0.1, q25=0.1, q75=0.1, ratio_to_gemm=1.0) | {"title": "one GEMM"},
        fp32_line("ours", STEP, median_s=0.5, q25=0.4, q75=0.6, ratio_to_gemm=5.0) | {"title": "tritonmargin"},
        fp32_line("pml", STEP) | {"samples": 0, "title": "other", "note": "not installed"},
    ])  # fmt: skip
    frame.to_csv(tmp_path / "fp32.csv", index=False)
    page = report.page(report.load(tmp_path), {})
    assert "0 of 1 stated bounds are met." in page
    assert "Not measured: other: not installed." in page
    assert "NO" in page


def test_wrong_names_are_told(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(app, ["run", "--tiny", "--only", "nothing", "--out", str(tmp_path)])
    assert wrong.exit_code == 2
    assert CliRunner().invoke(app, ["report", "--out", str(tmp_path)]).exit_code == 2
    with pytest.raises(ValueError, match="dtype"):
        _ = Problem(1, 1, 1, "float31").torch_dtype


def test_plan_and_roofline_commands() -> None:
    made = CliRunner().invoke(app, ["plan", "--c", "1000000", "--d", "128", "--memory", "4000"])
    assert made.exit_code == 0, made.output
    assert "retain_bytes=1024000000" in made.output
    audited = CliRunner().invoke(app, ["roofline", "--n", "8", "--d", "8", "--c", "200", "--rounds", "1"])
    assert audited.exit_code == 0, audited.output
    assert "what bounds the rows" in audited.output


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
