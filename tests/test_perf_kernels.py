"""The kernels' audit, the search for tiles and the model of a step: compiled, counted, executed. Nothing is timed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cpu_only
from counted import counting
from perf_cases import ROOT

from perf.kernels import audit, cases, model, tune
from perf.kernels.compile import Compiled, compiling_for
from perf.kernels.gpus import GPUS
from perf.kernels.ttsem import played
from perf.suite.problem import matmul_precision
from tritonmargin.kernels import tiles

pd = pytest.importorskip("pandas")

HERE = lambda work, asked, progress: [work(each) for each in asked]  # noqa: E731  in this process
COUNTED = ("bfloat16", "tf32", "float32")
pytestmark = cpu_only
once = pytest.mark.xdist_group("audit")  # what is compiled is for one worker


@pytest.fixture(scope="module")
def audited() -> pd.DataFrame:
    """Two targets in one width, and whatever else H100 may launch."""
    parts = ("gfx942", "bfloat16", 512), ("sm_90", "bfloat16", 512), ("sm_90", "bfloat16", 0)
    return pd.DataFrame([line for part in parts for line in audit.lines(part)])


@once
def test_kernels_are_audited(audited: pd.DataFrame) -> None:
    """Matrix instructions where there are products, an exp for every logit, registers and blocks that fit."""
    assert (audited.groupby("target").size() == pd.Series({"gfx942": 6, "sm_90": 6 + 33 + 3})).all()
    tiled = audited[audited["case"].isin(cases.TILED)]
    assert set(tiled["matrix_kind"]) == {"HGMMA", "mfma"}
    assert set(tiled[tiled["target"] == "sm_90"]["loads_ahead"]) == {"UTMALDG"}
    for line in tiled.itertuples():
        (n, c, _), gpu = map(int, line.block.split("x")), GPUS[line.target]
        threads = line.warps * gpu.lanes
        assert line.exp2 % (n * c // threads) == 0 < line.exp2  # some compilers write the last round out a second time
        assert line.blocks * line.registers * threads <= gpu.registers
        assert line.blocks * line.shared_memory <= gpu.shared_total
    assert set(audited[audited["kernel"] != "tile_kernel"]["matrix_kind"]) == {""}
    finish = audited[audited["target"] == "sm_90"].set_index("case")["instructions"]
    assert finish["prepare_rows"] < finish["finish_rows"] < finish[cases.SGD] < finish[cases.ADAMW]
    draws = audited[audited["case"].str.startswith("draw: ")].set_index("kernel")["block"].to_dict()
    assert draws == {"candidates_kernel": "512", "ranks_kernel": "128", "replace_kernel": "128"}
    # Every epilogue with hardly a spill and two to a processor; registers differ between versions of Triton.
    found = audited[audited["target"] == "sm_90"].set_index("case")
    keeping = found.index.str.contains(cases.KEEPING)  # they store logits for backward
    assert (found["spills"][~keeping] <= audit.TOLERATED).all(), found.to_string()
    # The limit of registers lets two in; what does not do with it has none, see tiles.json and `launch`.
    assert set(found.index[found["blocks"] < 2]) == {*found.index[keeping], cases.HINGE_GRADIENT}


@once
def test_budgets_fail_on_what_is_not_declared(audited: pd.DataFrame, tmp_path: Path) -> None:
    assert set(audit.budgets(audited)["met"]) <= {"yes", "no, as declared"}
    few, more, spill, units = audit.TOLERATED, audit.TOLERATED + 8, audit.NO_SPILL, audit.MATRIX_UNITS
    for case, changes, budget, expected in (
        ("prepare_rows", {"spills": 8}, spill, "NO"), ("weigh_chunk", {"spill_instructions": 1}, spill, "NO"),
        (cases.HEAVIEST, {"spills": few}, spill, "no, as declared"), (cases.HEAVIEST, {"spills": more}, spill, "NO"),
        (cases.ONLINE, {"spills": few, "target": "sm_100"}, spill, "NO"),
        ("online", {"blocks": 1}, audit.OVERLAPPED, "NO"), ("reduce_chunk", {"matrix_kind": ""}, units, "NO"),
    ):  # fmt: skip
        worse = audited.copy()
        worse.loc[worse["case"] == case, list(changes)] = list(changes.values())
        rules = audit.budgets(worse).set_index("budget")
        assert rules.loc[budget, "met"] == expected, (case, changes)
        assert f"{changes.get('target', 'sm_90')} {case}: bfloat16 D=512" in rules.loc[budget, "where not"]
    assert cases.HEAVIEST in audit.write(audited, tmp_path).read_text()
    assert len(pd.read_csv(tmp_path / "kernels.csv")) == len(audited)


@once
def test_a_spill_is_seen_and_the_warps_that_blackwell_adds() -> None:
    """They multiply for the others, so a block alone is not a lost one; the exps stay with the warps asked for."""
    with compiling_for("sm_100") as compiled:
        cases.step("bfloat16", 1024, 512, 4096)["reduce_chunk"]()
    found = compiled[0]
    assert (found.specialised, found.instructions["UTCMMA"] > 0) == (True, True)
    assert found.instructions["exp2"] * found.options["num_warps"] * 32 == 128 * 128
    free = next(tile for tile in tune.candidates(GPUS["sm_80"], "bfloat16") if tile.block_n * tile.block_c >= 1 << 14)
    compiled = tune.compile_with(free._replace(registers=64), GPUS["sm_80"], "bfloat16", cases.BETWEEN)
    assert all(each.spills > 0 and each.instructions["spill"] > 0 for each in compiled)
    assert not any(each.spills for each in tune.compile_with(free, GPUS["sm_80"], "bfloat16"))


def executed(dtype: str) -> Iterator[tuple[str, ...]]:
    """Bytes and flops of every kernel by formula, and counted while it runs under ttsem as code for sm_90."""
    n, d, k = 128, 64, 384  # whole tiles, and several of them
    with played(), matmul_precision(dtype):
        columns, rows = cases.tile_counts(n, d, k, dtype)
        size = model.Size(n, d, k, dtype, columns)
        formulas, launches = {kernel.name: kernel for kernel in model.step(dtype)}, cases.step(dtype, n, d, k)
        for name in formulas.keys() & launches.keys():
            with counting() as count:
                launches[name]()
            # A product reads x for every column of tiles, and the class rows for every row of them.
            again = (columns - 1) * size.x + (rows - 1) * size.rows if formulas[name].rate else 0
            by_formula = formulas[name].bytes(size) + again, formulas[name].flops(size)
            yield name, dtype, *by_formula, count.loaded + count.stored, count.flops


def test_formulas_are_what_the_kernels_do() -> None:
    pytest.importorskip("ttsem")
    # A process of its own: ttsem tells torch for good that there is a GPU.
    code = "import json, test_perf_kernels as t; print(json.dumps([[*t.executed(each)] for each in t.COUNTED]))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = list(itertools.chain.from_iterable(json.loads(done.stdout.splitlines()[-1])))
    assert len(found) == 3 * 4
    for name, dtype, moves, multiplies, moved, multiplied in found:
        assert moves <= moved <= moves * (1.01 if "finish" in name else 1), (name, dtype)  # which looks rows up
        assert multiplied == multiplies == (2 * 128 * 64 * 384 if name in cases.TILED and dtype != "float32" else 0)


def test_a_step_is_predicted_beside_what_was_measured() -> None:
    half, whole = (model.predict(1024, 512, c, "bfloat16") for c in (2_000_000, 4_000_000))
    assert whole[model.GRAPH] == pytest.approx(2 * half[model.GRAPH], rel=0.05)
    assert whole[model.STEP] >= whole[model.GRAPH] > whole["dX"] > 0
    found = model.table().set_index("figure")["ratio"]
    assert found.index.str.contains(model.GRAPH, regex=False).sum() >= 3
    assert found.between(0.5, 2.0).all(), found.to_string()
    with pytest.raises(ValueError, match="no rate of tf32"):
        model.predict(1024, 512, 100_000, "tf32")


def test_pick_tiles_reads_the_fastest_that_does_not_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says the time each call is given; on a GPU of sm_103, of which nothing is published here."""
    some = [tile for tile in tune.candidates(GPUS["sm_100"], "bfloat16") if tile.block_d == 64 and tile.specialised]
    spilling, good, slow = some[0], some[-1], some[-2]
    times = iter((3.0, 2.0, 1.0, *[4.0] * 9))

    def compile_with(tile: tiles.Tiles, gpu: object, dtype: str, names: Any = (), d: int = 512) -> list[Compiled]:
        bad = tile._replace(programs=2) == spilling and (names, d) == ((cases.ONLINE,), 64)
        return [Compiled("tile_kernel", gpu, {"num_warps": 8}, 99_000, 12, 168, 64 * bad, Counter())]

    def bench(call: Callable[[], None], **options: Any) -> float:
        with compiling_for("sm_100"):  # as far as a launch goes without a GPU
            call()
        return next(times)

    monkeypatch.setattr(tune, "in_processes", HERE)
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
    monkeypatch.setattr(tune, "in_processes", HERE)
    frame = tune.usable(["sm_80"], ["bfloat16"], lambda *_: None)
    assert frame[["usable", "registers"]].to_numpy().tolist() == [[True, 0], [True, 0], [False, 32]]


def test_a_missing_ttsem_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ttsem", None)
    with pytest.raises(RuntimeError, match="pip install --no-deps --ignore-requires-python ttsem") as said, played():
        pass
    assert "\n" not in str(said.value)
