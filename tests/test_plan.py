"""Plans on many GPUs: the memory formula beside measured peaks, and what the commands say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for module in ("pandas", "matplotlib", "tabulate", "typer", "rich", "triton"):
    pytest.importorskip(module, reason=f"{module} is part of the perf extra: pip install -e '.[perf]'")

import pandas as pd  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from perf import kernels, plan_check, planned, predicted, published  # noqa: E402
from perf.cli import app  # noqa: E402
from perf.gpus import NODES, Gpu  # noqa: E402
from perf.scale import GRADIENTS, Head, chunk_on_cpu, memory  # noqa: E402
from perf.traffic import collectives, drawing_bytes, optimizer_bytes  # noqa: E402

HUGE = ["plan", "--classes", "100e6", "--dim", "512", "--batch", "512", "--gpu", "h100"]


@pytest.fixture
def costed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model of the kernels that compiles nothing: flops alone."""

    def step_parts(gpu: Gpu, dtype: str, n: int, d: int, c: int) -> dict[str, float]:
        gemm = 2.0 * n * d * c / gpu.peak(dtype)
        rows = ("prepare_rows", "finish_rows", kernels.SGD, kernels.ADAMW, "launches")
        return {"reduce_chunk": gemm, "weigh_chunk": gemm, "products": 2 * gemm, **dict.fromkeys(rows, 0.1 * gemm)}

    monkeypatch.setattr(kernels, "step_parts", step_parts)
    predicted.parts.cache_clear()
    yield
    predicted.parts.cache_clear()


def call(*line: str) -> Any:
    return CliRunner().invoke(app, list(line))


# -- the formula -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        Head(20_000, 64, 256),
        Head(20_000, 64, 256, gradient="sparse"),
        Head(30_000, 64, 32, rate=0.1, gradient="sparse", optimizer="adamw"),
        Head(20_000, 128, 32, rate=0.5, gradient="backward", optimizer="adamw"),
        Head(20_000, 64, 64, retain=2_000_000),
    ],
    ids=lambda head: head.title,
)
def test_the_formula_is_within_five_percent_of_a_measured_peak(head: Head) -> None:
    got = plan_check.step_peak(head, None)
    assert memory(head, chunk_on_cpu(head)).peak == pytest.approx(got.peak, rel=plan_check.WITHIN)


@pytest.mark.slow
def test_the_formula_holds_on_every_rank() -> None:
    head = Head(30_000, 64, 64, ranks=2, rate=0.1)
    made = memory(head, chunk_on_cpu(head))
    for got in plan_check.measure(head):
        assert made.peak == pytest.approx(got.peak, rel=plan_check.WITHIN)


def test_the_grid_has_every_setting() -> None:
    heads = plan_check.grid()
    assert len(set(heads)) == len(heads) >= 30
    for field, values in {
        "classes": {20_000, 200_000}, "dim": {64, 256}, "batch": {32, 256}, "ranks": {1, 2}, "rate": {0.1, 1.0},
        "gradient": set(GRADIENTS), "optimizer": {"momentum", "adamw"},
    }.items():  # fmt: skip
        assert {getattr(head, field) for head in heads} == values
    frame = pd.DataFrame({"predicted_over_measured": [1.0, 1.04]})
    assert plan_check.holds(frame)
    assert not plan_check.holds(frame + 0.02)


def test_the_committed_check_holds() -> None:
    frame = pd.read_csv(Path(__file__).resolve().parent.parent / "reports" / "plan_check.csv")
    assert plan_check.holds(frame)
    assert len(frame) >= 30


def test_the_draw_of_a_sample_is_counted_where_a_gpu_draws_by_keys() -> None:
    """As `sampling.fits` says: not of all classes, and not where all ranks have more labels than a rank's sample."""
    head = Head(100_000_000, 64, 128, ranks=2, rate=0.1, compute_item=2, gradient="backward", fused=True)
    drawn = memory(head, 1024).phases[0]
    assert (drawn.name, drawn.chunk) == ("draw", 16 * 50_000_000)
    assert memory(head, 1024).largest.name == "draw"
    assert drawing_bytes(head) > 16 * 50_000_000
    few = head._replace(classes=4000)
    for other in (head._replace(rate=1.0), few, head._replace(fused=False)):
        assert drawing_bytes(other) == 0
    assert memory(head._replace(rate=1.0), 1024).phases[0].chunk == 0
    assert memory(few, 64).phases[0].chunk < 16 * few.rows


def test_a_ranks_memory_falls_with_the_ranks_and_with_the_settings() -> None:
    head = Head(10_000_000, 512, 128, ranks=8, compute_item=2, fused=True)
    options = [memory(each, 1024) for each in planned.ladder(head)]
    assert options[0].weight == options[0].state == options[0].phases[2].gradient == 10_000_000 * 512 * 4 // 8
    assert options[2].peak < options[0].peak
    assert options[3].state == options[2].state // 2
    assert options[4].weight == options[3].weight // 2
    halved = memory(head._replace(ranks=16, batch=64), 1024)
    assert halved.weight == options[0].weight // 2
    assert halved.peak < options[0].peak


# -- traffic and time --------------------------------------------------------------------------------------------


def test_exchanges_of_a_step() -> None:
    assert collectives(Head(1000, 8, 4)) == []
    moved = {each.what: each for each in collectives(Head(1000, 8, 4, ranks=2))}
    assert moved["embeddings"].bytes == moved["dX"].bytes == 2 * 4 * 8 * 4
    assert moved["embeddings"].sent(2) == moved["embeddings"].bytes / 2
    assert moved["sum of exp"].bytes == moved["sum of exp"].sent(2) == 2 * 4 * 4
    assert moved["2 numbers of targets"].bytes == 2 * moved["sum of exp"].bytes


def test_an_optimiser_moves_what_it_reads_and_writes() -> None:
    head = Head(100, 8, 4, rate=0.5)
    assert optimizer_bytes(head._replace(gradient="backward")) == 0
    assert optimizer_bytes(head._replace(rate=1.0, optimizer="sgd")) == 100 * 8 * (8 + 3 * 4)
    sparse, wider = (optimizer_bytes(head._replace(gradient="sparse", rate=rate)) for rate in (0.1, 0.5))
    assert sparse < wider
    assert optimizer_bytes(head._replace(optimizer="adamw")) > optimizer_bytes(head)


@pytest.mark.usefixtures("costed")
def test_more_machines_are_slower_to_exchange_and_what_is_longest_is_named() -> None:
    node = NODES["a100"]
    assert node.rate(8) == node.link > node.rate(16)
    head = Head(1_000_000, 512, 128, ranks=8, compute_item=2, fused=True)
    one, two = (predicted.step(head._replace(ranks=ranks), node) for ranks in (8, 16))
    assert two.exchanges > one.exchanges
    assert one.bound == "matrix products and exp"
    assert one._replace(exchanges=9.0).bound == "exchanges between ranks"
    assert one._replace(launches=9.0).bound == "the CPU's launches"
    assert one._replace(launches=9.0).total == 9.0 + one.optimizer + one.exchanges


@pytest.mark.slow
def test_the_model_of_the_kernels_is_the_audits() -> None:
    """The update in backward costs what its own kernel moves."""
    head = Head(1_000_000, 512, 128, ranks=8, compute_item=2, fused=True)
    found = {form: predicted.step(head._replace(gradient=form), NODES["h100"]) for form in GRADIENTS}
    audited = kernels.step_parts(NODES["h100"].gpu, "bfloat16", 1024, 512, 125_000)
    tiled = sum(audited[name] for name in ("reduce_chunk", "weigh_chunk", "products"))
    assert all(each.products == pytest.approx(tiled) for each in found.values())
    assert found["backward"].optimizer == 0.0
    assert found["backward"].rows > found["dense"].rows
    assert found["backward"].total < found["dense"].total


# -- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("costed")
def test_a_hundred_million_classes_on_64_gpus() -> None:
    done = call(*HUGE, "--gpus", "64")
    assert done.exit_code == 0, done.output
    for part in ("predicted", "all_gather", "reduce_scatter", "bound by", "recommended on 64 x H100"):
        assert part in done.output
    assert "recommended on 64 x H100 SXM, 78 GB of each for the head: update in backward" in done.output


@pytest.mark.usefixtures("costed")
@pytest.mark.parametrize(
    ("megabytes", "setting"),
    [
        ("11000", "update in backward, float32 state, float32 weights"),
        ("7700", "update in backward, float32 state, float32 weights"),
        ("6100", "update in backward, bfloat16 state, float32 weights"),
        ("4500", "update in backward, bfloat16 state, bfloat16 weights, rounded by chance, sample rate 1;"),
    ],
)
def test_less_memory_takes_other_settings(megabytes: str, setting: str) -> None:
    done = call(*HUGE, "--gpus", "64", "--memory", megabytes)
    assert done.exit_code == 0, done.output
    assert f"for the head: {setting}" in done.output


@pytest.mark.usefixtures("costed")
def test_impossible_plans_say_so() -> None:
    done = call(*HUGE, "--gpus", "1")
    assert done.exit_code == 1
    assert "impossible on 1 x H100" in done.output
    assert "4 ranks would do, predicted" in done.output
    assert "more ranks do not help" in call(*HUGE, "--gpus", "64", "--memory", "1").output


@pytest.mark.usefixtures("costed")
def test_options_of_a_plan() -> None:
    line = [*HUGE, "--gpus", "64", "--optimizer", "adamw", "--state-dtype", "bfloat16", "--weight-dtype", "bfloat16"]
    done = call(*line, "--sample-rate", "0.1", "--update-in-backward", "--retain", "100")
    assert done.exit_code == 0, done.output
    assert "for the head: update in backward, bfloat16 state, bfloat16 weights" in done.output
    assert "sample rate 0.1" in done.output
    assert call(*line, "--sparse-grad").exit_code == 0
    for wrong in (["--sparse-grad", "--dense-grad"], ["--gpu", "tpu"], ["--optimizer", "lion"], ["--chunk", "3"],
                  ["--state-dtype", "int8"], ["--classes", "1.5"]):  # fmt: skip
        assert call(*HUGE, *wrong).exit_code == 2


@pytest.mark.usefixtures("costed")
def test_the_page_of_published_sizes(tmp_path: Path) -> None:
    done = call("plan-table", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "plan.csv")
    assert set(frame["classes"]) == set(published.CLASSES)
    own = [name for name in frame if name not in ("classes", "rate", "setting", "fits", "bound_by")]
    assert all(name.startswith(("predicted_", "published_")) for name in own)
    page = (tmp_path / "plan.md").read_text()
    for part in ("predicted, none was measured on a GPU", published.SOURCE, "ResNet50", "V100"):
        assert part in page
