"""The kernels' audit, the search for tiles and the model of a step: compiled, counted, executed. Nothing is timed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import perf_cases  # skips where the perf extra is missing
import pytest
import torch
from cases import cpu_only

from perf.kernels import audit, cases, model, tune
from perf.kernels.compile import Compiled, compiling_for
from perf.kernels.gpus import GPUS
from perf.kernels.ttsem import played
from tritonmargin.backends import tiles

pd = pytest.importorskip("pandas")

SOME = ("", "sgd", "adamw", "label smoothing", "a sample, W in float32", "hinge, bias, statistics")
pytestmark = cpu_only


def in_this_process(work: Callable[[Any], Any], asked: list[Any], progress: object) -> list[Any]:
    return [work(each) for each in asked]


@pytest.mark.slow  # compiles three steps and more; `python -m perf audit` compiles all
def test_kernels_are_audited() -> None:
    """Of a step and some other losses of H100, and of a step of an AMD card.

    Matrix instructions where there are products, an exp for every logit, registers and blocks that fit.
    """
    parts = [("sm_90", "bfloat16", 512, name) for name in (*SOME, audit.DRAWS)]
    parts += [("sm_90", "float16", 512, name) for name in cases.IN_A_STEP] + [("gfx942", "bfloat16", 512, "")]
    audited = pd.DataFrame([line for part in parts for line in audit.lines(part)])
    amd, low = audited["target"] == "gfx942", audited["dtype"] == "bfloat16"
    step = set(cases.STEP) - {"extremes", "half"}
    assert set(audited[amd]["case"]) == step
    assert set(audited[~low]["case"]) == {*cases.STEP, cases.SGD, cases.ADAMW}
    tiled = audited[audited["case"].isin(cases.TILED)]
    assert set(tiled["matrix_kind"]) == {"HGMMA", "mfma"}
    assert set(tiled[tiled["target"] == "sm_90"]["loads_ahead"]) == {"UTMALDG"}
    for line in tiled.itertuples():
        (m, n, _), gpu = map(int, line.block.split("x")), GPUS[line.target]
        threads = line.warps * gpu.lanes
        assert line.exp2 % (m * n // threads) == 0 < line.exp2  # some compilers write the last round out a second time
        assert line.blocks * line.registers * threads <= gpu.registers
        assert line.blocks * line.shared_memory <= gpu.shared_total
    products = audited["kernel"].isin(["reduce_kernel", "weigh_kernel", "finish_kernel"])
    assert set(audited[~products]["matrix_kind"]) == {""}
    finish = audited[low & ~amd].set_index("case")["instructions"]
    assert finish["finish"] < finish[cases.SGD] < finish[cases.ADAMW]
    draws = audited[audited["case"].str.startswith("draw: ")].set_index("kernel")["block"].to_dict()
    assert draws == {"candidates_kernel": "512", "ranks_kernel": "128", "replace_kernel": "128"}
    # On H100 no spill, and two programs to a processor; registers differ between versions of Triton.
    found = audited[low & ~amd & products].set_index("case")
    assert (found["spills"] <= [audit.ADAMW_SPILLS * (case == cases.ADAMW) for case in found.index]).all()
    assert (found["blocks"] >= 2).all()
    assert (found["registers"] <= 128).all()


def test_budgets_fail_on_what_is_not_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed audit has nothing that is not declared; changes of it have."""
    audited = pd.read_csv(perf_cases.ROOT / "reports/kernels.csv", keep_default_na=False)
    assert set(audit.budgets(audited)["met"]) <= {"yes", "no, as declared"}
    assert {*cases.IN_A_STEP, *cases.CASES} <= {case.partition(", ")[2] for case in audited["case"]}
    same = (audited["target"] == "sm_90") & (audited["dtype"] == "bfloat16") & (audited["D"] == 512)
    audited = audited[same & ((audited["spills"] == 0) | (audited["case"] == cases.ADAMW))]
    spill, few, units = audit.NO_SPILL, audit.FEW_SPILLS, audit.MATRIX_UNITS
    why = audit.Declared("sm_90", spill, ("loss",), why="a reason", spills=8)
    monkeypatch.setattr(audit, "DECLARED", (why,))
    for case, changes, budget, expected in (
        ("classes", {"spills": 8}, spill, "NO"), ("weigh", {"spill_instructions": 1}, spill, "NO"),
        ("loss", {"spills": 8}, spill, "no, as declared"), ("loss", {"spills": 16}, spill, "NO"),
        ("loss", {"spills": 8, "target": "sm_100"}, spill, "NO"),
        (cases.ADAMW, {"spills": audit.ADAMW_SPILLS + 8}, few, "NO"), (cases.SGD, {"spills": 8}, spill, "NO"),
        ("finish", {"blocks": 1}, audit.OVERLAPPED, "NO"), ("reduce", {"matrix_kind": ""}, units, "NO"),
    ):  # fmt: skip
        worse = audited.copy()
        at = (worse["case"] == case) & (worse["target"] == "sm_90")
        worse.loc[at, list(changes)] = list(changes.values())
        rules = audit.budgets(worse).set_index("budget")
        assert rules.loc[budget, "met"] == expected, (case, changes)
        assert f"{changes.get('target', 'sm_90')} {case}: bfloat16 D=512" in rules.loc[budget, "where not"]
    assert cases.HEAVIEST in audit.write(audited, tmp_path).read_text()
    assert len(pd.read_csv(tmp_path / "kernels.csv")) == len(audited)


def test_a_spill_is_seen() -> None:
    free = tiles.pick_tiles("sm_80", torch.bfloat16, 1024, 512, 4096)
    compiled = tune.compile_with(free._replace(registers=64), GPUS["sm_80"], "bfloat16", ("weigh, bias",))
    assert all(each.spills > 0 and each.instructions["spill"] > 0 for each in compiled)
    assert not any(each.spills for each in tune.compile_with(free, GPUS["sm_80"], "bfloat16"))


def test_a_step_is_predicted_beside_what_was_measured() -> None:
    half, whole = (model.predict(1024, 512, c, "bfloat16") for c in (2_000_000, 4_000_000))
    assert whole[model.GRAPH] == pytest.approx(2 * half[model.GRAPH], rel=0.05)
    assert whole[model.STEP] >= whole[model.GRAPH] > whole["dX"] > 0
    # The kernels before these could not have been slower than they were; these have to be as fast as was asked.
    frame = model.table()
    before = frame.dropna()
    assert len(before) == 2 * 5
    assert (before["predicted_ms"] < before["measured_before_ms"]).all()
    figures = frame.set_index(["figure", "N", "C", "dtype"])["predicted_ms"]
    assert figures[model.STEP, 1024, 1_000_000, "bfloat16"] <= 7.6
    assert figures[model.STEP, 1024, 100_000, "bfloat16"] <= 0.9
    assert figures[model.SAMPLED, 1024, 100_000, "bfloat16"] <= 0.9
    with pytest.raises(ValueError, match="no rate of tf32"):
        model.predict(1024, 512, 100_000, "tf32")


def test_pick_tiles_reads_the_fastest_that_does_not_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says the time each call is given; on a GPU of sm_103, of which nothing is published here."""
    some = [tile for tile in tune.candidates(GPUS["sm_100"], "bfloat16") if tile.block_d == 64 and tile.descriptors]
    spilling, good, slow = some[0], some[-1], some[-2]
    times = iter((3.0, 2.0, 1.0, *[4.0] * 9))

    def compile_with(tile: tiles.Tiles, gpu: object, dtype: str, names: Any = (), d: int = 512) -> list[Compiled]:
        bad = tile._replace(programs=2) == spilling and (names, d) == ((cases.HEAVIEST,), 64)
        return [Compiled("weigh_kernel", gpu, {"num_warps": 8}, 99_000, 8, 120, 64 * bad, Counter())]

    def bench(call: Callable[[], None], **options: Any) -> float:
        with compiling_for("sm_100"):  # as far as a launch goes without a GPU
            call()
        return next(times)

    monkeypatch.setattr(tune, "in_processes", in_this_process)
    monkeypatch.setattr(tune, "compile_with", compile_with)
    monkeypatch.setattr(tune, "candidates", lambda gpu, dtype: iter((slow, good, spilling)))
    monkeypatch.setattr(cases, "this_gpu", lambda index: tiles.Device("sm_103", 148, 180 << 30))
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", bench)
    table = tmp_path / "tiles.json"
    table.write_text('{"sm_90 bfloat16": {"kept": 1}}')
    frame = tune.tune(["bfloat16"], lambda *_: None, "cpu", table)
    assert frame[["microseconds", "passes"]].to_numpy().tolist()[:2] == [[1000.0, False], [2000.0, True]]
    assert sorted(frame["programs"]) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    written = json.loads(table.read_text())
    assert set(written) == {"sm_90 bfloat16", "sm_100 bfloat16"}
    monkeypatch.setattr(tiles, "table", lambda: written)
    assert tiles.pick_tiles("sm_103", torch.bfloat16, 1000, 512, 4096, 148)[:4] == good[:4]


def test_without_a_gpu_what_could_be_used_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [tile for tile in tune.candidates(GPUS["sm_80"], "bfloat16") if tile.block_d == 64][:2]
    too_few = some[0]._replace(registers=32)
    monkeypatch.setattr(tune, "candidates", lambda gpu, dtype: iter((too_few, *some)))
    monkeypatch.setattr(tune, "in_processes", in_this_process)
    frame = tune.usable(["sm_80"], ["bfloat16"], lambda *_: None)
    assert frame[["usable", "registers"]].to_numpy().tolist() == [[True, 0], [True, 0], [False, 32]]


def test_a_missing_ttsem_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ttsem", None)
    with pytest.raises(RuntimeError, match="pip install --no-deps --ignore-requires-python ttsem") as said, played():
        pass
    assert "\n" not in str(said.value)
