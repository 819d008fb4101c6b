"""The perf suite: who is measured, whether each is right, its processes, memory and counts; no test looks at a time."""

from __future__ import annotations

import json
import os
import re
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
    check,
    correct,
    counts,
    grid,
    limits,
    peaks,
    plan,
    providers,
    roofline,
    shared,
)
from perf.cli import app  # noqa: E402
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


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.001), ("bfloat16", 1.005)])
@pytest.mark.parametrize("name", ["ours", "plain", "ours-in-backward", "ours-sampled", "plain-sampled"])
def test_a_gradient_that_is_a_little_too_large_is_wrong(
    name: str, dtype: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part in 1000 in float32; in bfloat16 plain code is itself off by that."""
    problem = correct.small(Problem(1, 32, 1, dtype))
    provider = ready(name, problem)
    right = provider.gradients

    def off() -> object:
        found = right()
        return found._replace(weight=factor * found.weight)

    assert correct.wrong(correct.errors(provider, problem), dtype) == ""
    provider = ready(name, problem)
    monkeypatch.setattr(provider, "gradients", off)
    right = type(provider).gradients.__get__(provider)
    said = correct.wrong(correct.errors(provider, problem), dtype)
    assert "bias of dw" in said
    assert "dx" not in said
    if dtype == "float32":
        assert "error of dw 1.0e-03" in said
        assert "bias of dw 1.0e-03" in said


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


def test_a_process_cannot_have_more_than_is_left() -> None:
    """The limit is the kernel's: memory that the machine has is refused too, once nothing more may be given away."""
    code = """
import torch
from perf import limits
torch.ones(100 << 18)  # 100 MB, to start with
limits.available_bytes = lambda: 0
left = limits.limit_memory()
torch.ones(left // 8)  # half of it
try:
    torch.ones(left // 2)  # twice as much
except RuntimeError as error:
    print("refused:", error)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "can't allocate memory" in done.stdout


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
        provider.reset(STEP)
        changes = peaks.allocations(lambda provider=provider: provider.run(STEP), scratch=False)
        assert peaks.peak_without(changes, p.weight_bytes) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_product_frees_itself_is_scratch(dtype: torch.dtype) -> None:
    """Its result is not. Whether there is scratch in bfloat16 depends on the CPU."""
    a, b = torch.ones(64, 64, dtype=dtype), torch.ones(64, 1000, dtype=dtype)
    kept = []
    changes = peaks.allocations(lambda: kept.append(torch.mm(a, b)), scratch=False)
    assert changes == [kept[0].nbytes]
    assert sum(peaks.allocations(lambda: kept.append(torch.mm(a, b)))) == kept[1].nbytes


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


# -- counts -----------------------------------------------------------------------------------------------------


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


def test_the_losses_of_samples_are_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sampled", "--losses", "--tiny", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "sampled_losses.csv")
    assert len(frame) == 24
    spread_of_a_mean = frame["corrected_spread"] / frame["draws"] ** 0.5
    assert (frame["bias"] < 0).all(), "a sum over fewer classes is smaller"
    smooth = (frame["s"] == 16) & (frame["rate"] >= 0.1)  # at 0.01 a sample is the batch's classes
    assert (frame["corrected_bias"].abs() < 0.2 * frame["bias"].abs() + 4 * spread_of_a_mean)[smooth].all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run --providers ours", "starts with --classes"),
        ("run --classes 1e4 --dtype fp8", "dtypes are among float32"),
        ("run --classes 1e4 --providers nobody", "no provider 'nobody'"),
        ("run --tiny --device tpu", "'tpu' is not among cpu, cuda"),
        ("tune --measured search.csv --target sm_90", "it says for which target and dtype it is"),
        ("readme --out missing", "no results in missing"),
        ("report --out missing", "no results in missing"),
        ("report --out damaged", "a file in damaged is damaged"),
        ("run --tiny --out damaged", "a file in damaged is damaged"),
        ("report --out cut", "results.csv ends in the middle of a line"),
        ("audit --target sm_75", "'sm_75' is not among"),
        ("tune --dtype float16", "'float16' is not among"),
        ("roofline --dtype fp8", "'fp8' is not among"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "runs.json").write_text("{")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "results.csv").write_text("loss,dtype\narcface,floa")
    (tmp_path / "README.md").write_text("as it was")
    done = CliRunner().invoke(app, line.split(), env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.output
    assert said in re.sub(r"[\s│]+", " ", done.output)
    assert (tmp_path / "README.md").read_text() == "as it was"


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
