"""The kernels' audit, the search for tiles and the GPU gate: compiled, counted, executed. No test looks at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import MACHINE

for module in ("pandas", "matplotlib", "tabulate", "typer", "rich", "triton", "ttsem"):
    pytest.importorskip(module, reason=f"{module} is missing: make test installs it")
if MACHINE != "cpu":
    pytest.skip("nothing here runs on another machine", allow_module_level=True)

import pandas as pd  # noqa: E402

import tritonmargin as tm  # noqa: E402
from perf import epilogues, gate, gate_speed, kernels, static, tune  # noqa: E402
from perf.compiled import Compiled, compiling_for  # noqa: E402
from perf.gpus import GPUS, H200, card  # noqa: E402
from perf.providers.base import STEP, WHOLE  # noqa: E402
from tritonmargin.kernels import tiles  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


once = pytest.mark.xdist_group("audit")  # it takes long, so both tests are for one worker


@pytest.fixture(scope="module")
def audited() -> pd.DataFrame:
    return kernels.audit(lambda line: None, ("sm_90", "gfx942"), ("bfloat16",), (64, 512))


@once
def test_kernels_are_audited(audited: pd.DataFrame) -> None:
    """Matrix instructions where there are products, exps where there are exps, and counts that add up."""
    assert len(audited) == 2 * 2 * 6
    tiled = audited[audited["kernel"].isin(["reduce_chunk", "weigh_chunk"])]
    assert set(tiled["matrix_kind"]) == {"HGMMA", "mfma"}
    assert set(tiled[tiled["target"] == "sm_90"]["loads_ahead"]) == {"UTMALDG"}
    # A thread has its share of the tile's elements, and an exp for each.
    size = tiled["block"].str.split("x").map(lambda parts: int(parts[0]) * int(parts[1]))
    threads = tiled["warps"] * tiled["target"].map({"sm_90": 32, "gfx942": 64})
    assert (tiled["exp2"] % (size / threads) == 0).all()  # some compilers write the last round out a second time
    assert (tiled["exp2"] > 0).all()
    block_d = tiled["block"].str.split("x").map(lambda parts: int(parts[2]))
    rate = tiled["target"].map(lambda target: GPUS[target].bfloat16)
    rounds = -(-tiled["D"] // block_d)
    assert (tiled["matrix_cycles"] == 2 * size * rounds * block_d / rate).all()
    assert (audited["spills"] == 0).all()
    finish = audited[audited["target"] == "sm_90"].set_index(["D", "kernel"])
    for update, states in kernels.STATES.items():
        moved = {name: finish.loc[(512, name), "main_memory_bytes"] for name in ("finish_rows", update)}
        state = states * 2 * 512 * finish.loc[(512, update), "chunk"]
        assert moved[update] == moved["finish_rows"] + 2 * state  # of bfloat16, read and written
        assert finish.loc[(512, update), "registers"] > finish.loc[(512, "prepare_rows"), "registers"]
    weigh = tiled[tiled["kernel"] == "weigh_chunk"]
    assert (weigh["launch_bytes"] > weigh["N"] * weigh["chunk"] * 2).all()


def test_formulas_are_what_the_kernels_do() -> None:
    """Bytes and flops of every launch, by formula and counted while it executes."""
    # A process of its own: ttsem tells torch for good that there is a GPU.
    code = "from perf import executed; print(executed.table().to_json(orient='records'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))
    assert set(found["kernel"]) == {"prepare_rows", "reduce_chunk", "weigh_chunk", "finish_rows", *kernels.STATES}
    assert (found["executed_product_flops"] == found["formula_product_flops"]).all()
    tiled = found[found["kernel"].isin(kernels.TILED)].set_index("dtype")["executed_product_flops"]
    assert set(tiled["bfloat16"]) == set(tiled["tf32"]) == {2 * 128 * 64 * 384}
    assert set(tiled["float32"]) == {0}  # the library's
    assert (found["executed_bytes"] / found["tile_bytes"]).between(0.999, 1.03).all(), found.to_string()
    assert not len(kernels.miscounted(found))
    for column, factor in (("executed_bytes", 1.1), ("formula_product_flops", 2.0)):
        wrong = kernels.miscounted(found.assign(**{column: found[column] * factor}))
        assert len(wrong) == (len(found) if column == "executed_bytes" else 4)


@once
def test_every_epilogue_is_compiled_with_hardly_a_spill_and_two_to_a_processor() -> None:
    """The numbers of registers are the compiler's, and differ between versions of Triton."""
    found = epilogues.table(("sm_90",), say=lambda line: None).set_index("epilogue")
    keeping = found.index.str.contains(epilogues.KEEPING)
    assert keeping.sum() == 5
    assert len(found) == 33
    assert (found["spills"][~keeping] <= tune.TOLERATED).all(), found.to_string()
    # The limit of registers lets two in; what does not do with it has none, see tiles.json and `launch`.
    alone = found.index[~found["overlapped"]]
    assert set(alone) == {*found.index[keeping], "gradient of hinge and bias"}, found.to_string()
    tiles = found[~found.index.isin(alone) & ~found.index.str.startswith(epilogues.ROWS)]
    assert (tiles["registers"] <= 128).all()


KNOWN = "no, a known limit"


@once
def test_budgets_say_where_they_are_broken(audited: pd.DataFrame) -> None:
    fine = pd.DataFrame([{"target": "sm_90", "dtype": "bfloat16", "epilogue": "any", "spills": 0, "overlapped": True}])
    met = kernels.budgets(audited, fine).set_index("budget")["met"]
    assert met.pop(kernels.IN_CACHE) == KNOWN
    assert (met == "yes").all()
    others = kernels.budgets(audited, fine.assign(spills=8, overlapped=False, target="sm_80")).set_index("budget")
    assert others.loc[[kernels.NO_SPILL, kernels.OVERLAPPED], "met"].tolist() == ["NO", "NO"]
    assert others.loc[kernels.NO_SPILL, "where not"] == "sm_80 any: bfloat16"
    rules = kernels.budgets(audited, fine).set_index("budget")
    assert rules.loc["no register spills anywhere", "met"] == "yes"
    worse = audited.copy()
    worse.loc[worse.index[0], "spills"] = 8
    worse.loc[worse["kernel"] == "weigh_chunk", ["overlapped", "N"]] = [False, 16]
    rules = kernels.budgets(worse, fine).set_index("budget")
    assert rules.loc["no register spills anywhere", "met"] == "NO"
    assert "sm_90 prepare_rows: bfloat16, D = 64" in rules.loc["no register spills anywhere", "where not"]
    assert rules.loc[kernels.OVERLAP, "met"] == "NO"
    assert rules.loc[kernels.NO_WAIT, "met"] == "NO"


@once
@pytest.mark.parametrize(("bound", "met"), [("shared", KNOWN), ("latency", "NO")])
def test_only_shared_memory_may_bound_sm_100(audited: pd.DataFrame, bound: str, met: str) -> None:
    none = pd.DataFrame(columns=["target", "dtype", "epilogue", "spills", "overlapped"])
    lines = audited.assign(target="sm_100", bound_by=bound)
    for times, expected in ((2.0, met), (2.1, "NO")):
        changed = lines.assign(shared_cycles=times * lines["matrix_cycles"])
        rules = kernels.budgets(changed, none).set_index("budget")
        assert rules.loc[kernels.MATRIX_LARGEST, "met"] == expected


@once
def test_warps_of_sm_100_are_told_apart() -> None:
    """Those that multiply and load have loops of their own, and the epilogue is in neither."""
    found = {d: kernels.compile_step(GPUS["sm_100"], "bfloat16", d)["reduce_chunk"] for d in (512, 1024)}
    for each in found.values():
        code = each.instructions
        assert (code.products["UTCMMA"], code.loads["UTMALDG"]) == (4, 2)  # of 16 numbers each; of x and of the rows
        assert code.rest["exp2"] * each.threads == 128 * 128
        assert not code.rest["UTCMMA"]
        assert each.all_threads > each.threads
    issue = {d: static.tile_bound(each, GPUS["sm_100"], "bfloat16", 0.0).issue for d, each in found.items()}
    assert issue[1024] > issue[512] > 1000


@once
def test_dlogits_may_not_take_more_of_main_memory_than_they_do(
    audited: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = pd.DataFrame(columns=["target", "dtype", "epilogue", "spills", "overlapped"])
    lines = audited[audited["dtype"] == "bfloat16"]
    for allowed, met in ((6.0, KNOWN), (5.9, "NO")):
        monkeypatch.setitem(kernels.LEFT, "bfloat16", allowed)
        assert kernels.budgets(lines, none).set_index("budget").loc[kernels.IN_CACHE, "met"] == met


@once
@pytest.mark.parametrize(("d", "memory", "met"), [(256, 1.1, KNOWN), (256, 1.3, "NO"), (512, 1.1, "NO")])
def test_only_a_narrow_d_may_wait_for_main_memory(audited: pd.DataFrame, d: int, memory: float, met: str) -> None:
    none = pd.DataFrame(columns=["target", "dtype", "epilogue", "spills", "overlapped"])
    lines = audited[(audited["D"] == 512) & (audited["target"] == "sm_90")]
    bound = lines["bound_by"].where(lines["kernel"] != "weigh_chunk", "memory")
    slow = lines.assign(D=d, N=16, memory_cycles=memory * lines["matrix_cycles"] / 0.8, bound_by=bound)
    rules = kernels.budgets(slow, none).set_index("budget")
    assert rules.loc[kernels.NO_WAIT, "met"] == met
    assert rules.loc[kernels.MATRIX_LARGEST, "met"] == met


@once
@pytest.mark.parametrize(
    ("target", "epilogue", "spills", "met"),
    [
        ("sm_90", epilogues.ONLINE, tune.TOLERATED, (KNOWN, KNOWN)),
        ("sm_90", epilogues.HEAVIEST, tune.TOLERATED, (KNOWN, KNOWN)),
        ("sm_90", epilogues.HEAVIEST, tune.TOLERATED + 8, ("NO", KNOWN)),
        ("sm_90", epilogues.HINGE_GRADIENT, 0, ("yes", KNOWN)),
        ("sm_90", "sum of exp, keeping logits", 8, ("NO", KNOWN)),
        ("sm_90", "sum of exp", 900, ("NO", "NO")),
        ("sm_100", epilogues.HEAVIEST, 8, (KNOWN, "NO")),
        ("sm_100", epilogues.ONLINE, 8, ("NO", "NO")),
    ],
)
def test_only_what_is_known_of_an_epilogue_is_excused(
    audited: pd.DataFrame, target: str, epilogue: str, spills: int, met: tuple[str, str]
) -> None:
    line = {"target": target, "dtype": "bfloat16", "epilogue": epilogue, "spills": spills, "overlapped": False}
    rules = kernels.budgets(audited, pd.DataFrame([line])).set_index("budget")
    assert tuple(rules.loc[[kernels.NO_SPILL, kernels.OVERLAPPED], "met"]) == met


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("unit", [True, False])
def test_no_width_spills(target: str, unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library launches at a D that is a multiple of nothing: whole vectors are loaded all the same."""
    monkeypatch.setattr("tritonmargin.kernels.why_not_triton", lambda *_: None)  # nothing runs
    x, weight = (torch.randn(size, 501, dtype=torch.bfloat16, requires_grad=True) for size in (64, 300))
    margin = tm.ArcFace() if unit else tm.Softmax()
    with compiling_for(target) as found, tm.use_backend("triton"):
        tm.margin_cross_entropy(x, weight, torch.arange(64), margin).backward()
    assert {each.kernel for each in found} == {"prepare_kernel", "tile_kernel", "finish_kernel"}
    assert all(each.spills == 0 for each in found), [(each.kernel, each.spills) for each in found]
    assert {each.options["D"] for each in found if each.kernel == "tile_kernel"} == {512}


def test_a_spill_is_seen() -> None:
    """A kernel with a third of the registers it wants, beside the lightest with as many as it wants."""
    free = next(tile for tile in tune.candidates(GPUS["sm_80"], "bfloat16") if tile.block_n * tile.block_c >= 1 << 14)
    compiled = tune.compile_with(free._replace(registers=64), GPUS["sm_80"], "bfloat16", tune.others)
    assert all(each.spills > 0 for each in compiled)
    assert all(each.instructions.per_tile(8)["spill"] > 0 for each in compiled)
    assert not any(each.spills for each in tune.compile_with(free, GPUS["sm_80"], "bfloat16"))


def test_the_step_predicted_grows_with_the_classes_and_is_above_the_floor() -> None:
    small, large = (kernels.predict(GPUS["sm_90"], c=c).set_index("schedule") for c in (500_000, 1_000_000))
    ours = "tritonmargin, in a CUDA graph"
    assert large.loc[ours, "predicted_ms"] == pytest.approx(2 * small.loc[ours, "predicted_ms"], rel=0.05)
    assert large.loc[ours, "times_the_floor"] > 4 / 3
    assert large.loc["full logits, the usual code", "predicted_ms"] > large.loc[ours, "predicted_ms"]


def test_tune_writes_what_pick_tiles_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [tile for tile in tune.candidates(GPUS["sm_80"], "bfloat16") if tile.block_d == 64][:3]
    monkeypatch.setattr(tune, "candidates", lambda gpu, dtype: iter(some))
    frame = tune.search(GPUS["sm_80"], "bfloat16", lambda line: None)
    assert len(frame) == 3
    assert frame["cycles_per_logit"].is_monotonic_increasing
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"sm_90 bfloat16": {"kept": 1}}))
    tune.write({"sm_80 bfloat16": tune.entry(frame.iloc[0], "predicted")}, path)
    written = json.loads(path.read_text())
    assert written["sm_90 bfloat16"] == {"kept": 1}
    monkeypatch.setattr(tiles, "table", lambda: written)
    picked = tiles.pick_tiles("sm_80", torch.bfloat16, 1000, 512, 4096, 108)
    assert picked.block_c == frame.iloc[0]["block_c"]
    assert "no spill" in written["sm_80 bfloat16"]["evidence"]


def test_the_fastest_measured_is_checked_as_the_predicted_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says the time each call is given; on a GPU of sm_103, of which nothing is published here."""
    some = [tile for tile in tune.candidates(GPUS["sm_100"], "bfloat16") if tile.block_d == 64 and tile.specialised]
    spilling, good, slow = some[0], some[-1], some[-2]
    times, compiled = iter((1.0, 2.0, 3.0, *[4.0] * 9)), tune.compile_with

    def spills(tile: tiles.Tiles, *args: Any) -> list[Compiled]:
        same = tile._replace(programs=1) == spilling
        return [each._replace(spills=64 * same) for each in compiled(tile, *args)]

    monkeypatch.setattr(tune, "compile_with", spills)
    monkeypatch.setattr(tune, "candidates", lambda gpu, dtype: iter((spilling, good, slow)))
    monkeypatch.setattr(tiles, "gpu", lambda index: tiles.Device("sm_103", 148, 180 << 30))

    def bench(call: Callable[[], None], **options: Any) -> float:
        with compiling_for("sm_100"):  # as far as a launch goes without a GPU
            call()
        return next(times)

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", bench)
    monkeypatch.setattr(tune, "ahead", lambda *_: None)
    path = tmp_path / "search.csv"
    tune.measure("bfloat16", lambda line: None, device="cpu").to_csv(path, index=False)
    table, write = tmp_path / "tiles.json", tune.write
    monkeypatch.setattr(tune, "write", lambda entries: write(entries, table))
    assert "failed" not in pd.read_csv(path)
    frame = tune.tune_from(path)  # on a machine without that GPU
    assert frame["microseconds"].tolist()[:4] == [2000.0, 1000.0, 3000.0, 4000.0]
    assert frame["usable"].tolist()[:3] == [True, False, True]
    assert sorted(frame["programs"]) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    written = json.loads(table.read_text())["sm_100 bfloat16"]
    assert "measured" in written["evidence"]
    assert {name: written[name] for name in ("block_n", "block_c", "warps")} == {
        name: getattr(good, name) for name in ("block_n", "block_c", "warps")
    }
    assert frame.iloc[0]["blocks"] >= 1


def test_a_gpu_has_the_candidates_of_its_family() -> None:
    for target in ("sm_90", "sm_100"):
        like = GPUS[target]
        newer = like._replace(target=target[:-1] + "3")
        assert [*tune.candidates(newer, "bfloat16")] == [*tune.candidates(like, "bfloat16")]


def test_every_line_of_the_table_of_tiles_has_its_evidence() -> None:
    table = json.loads(tune.TABLE.read_text())
    assert set(table) == {f"{target} {dtype}" for target in GPUS for dtype in tune.KINDS}
    assert all("cycles per logit" in line["evidence"] or "measured" in line["evidence"] for line in table.values())


def test_chunks_are_whole_waves_in_memory_that_is_bounded() -> None:
    for target, gpu in GPUS.items():
        device = tiles.Device(target, gpu.processors, int(gpu.capacity))
        for n, d, dtype, c in (
            (1024, 512, torch.bfloat16, 1_000_000), (256, 128, torch.float32, 100_000),
            (32, 512, torch.bfloat16, 100_000_000), (1024, 512, torch.bfloat16, 100_000),
            (16, 8192, torch.bfloat16, 1_000_000),
        ):  # fmt: skip
            chunk = tiles.default_chunk(device, dtype, n, d, c)
            tile = tiles.pick_tiles(target, dtype, n, d, chunk, gpu.processors)
            wave = max(1, (tile.programs or 2 * gpu.processors) // -(-n // tile.block_n)) * tile.block_c
            assert chunk % (wave if chunk >= wave else tile.block_c) == 0
            taken = (n + 2 * d) * dtype.itemsize * chunk
            most = min(tiles.MOST, gpu.capacity / tiles.SHARE, max(tiles.LEAST, (n + 2 * d) * dtype.itemsize * c // 4))
            assert most / 2 < taken <= most


def test_the_gate_runs_dry_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Every step, in a process of its own; at most eight files; done steps are not done again."""
    call = [sys.executable, "-m", "perf", "gate", "--dry-run", "--minutes", "30", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    times = []
    for _ in range(2):
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        state = json.loads((tmp_path / "gate.json").read_text())
        assert set(state["steps"]) == set(gate.STEPS)
        assert all(step["status"] == "done" for step in state["steps"].values())
        errors = state["steps"]["errors"]["result"]
        assert all(line["within_budget"] for line in errors)
        assert {line["size"].split(", ")[1] for line in errors} == {"float32", "bfloat16", "float16"}
        by_kernels = [line for line in state["steps"]["speed"]["result"] if line["provider"] in gate.PLAYED]
        assert len(by_kernels) == len(gate.PLAYED) + 1  # ours has a softmax's row too
        assert all(line["milliseconds"] > 0.0 for line in by_kernels)
        timed = [line for line in state["steps"]["table"]["result"] if "milliseconds" in line]
        assert {(line["provider"], line["mode"]) for line in timed} >= {("ours", mode) for mode in gate_speed.MODES_OF}
        assert all(line["wrong"] == "" for line in timed)
        assert [line["microseconds"] > 0.0 for line in state["steps"]["search"]["result"]] == [True, True]
        figures = {line["figure"].partition(", ")[0] for line in state["steps"]["verdict"]["result"]}
        assert figures >= {"tritonmargin", "floor: three products at the sustained rate", "full logits"}
        assert len(list(tmp_path.iterdir())) <= 8
        times.append({name: step["seconds"] for name, step in state["steps"].items()})
    assert times[0] == times[1]
    assert "no number of it says anything" in (tmp_path / "gate.html").read_text()


def test_the_gates_table_has_the_providers_of_the_full_plan_and_what_is_asked_first_in_front() -> None:
    rows = gate_speed.planned(dry=False)
    asked = {tuple(row.values()) for row in rows}
    assert len(asked) == len(rows)
    every = {(n, d, c) for n in (32, 256, 1024) for d in (128, 512) for c in (10_000, 100_000, 1_000_000, 4_000_000)}
    for mode in ("forward", STEP, WHOLE):
        for name, loss in (("insightface", "arcface-straight-through"), ("plain-sampled", "arcface"),
                           ("plain-compiled", "softmax"), ("torch-lce", "softmax"), ("pml", "arcface")):  # fmt: skip
            for dtype in ("float32", "bfloat16"):
                assert every == {key[4:] for key in asked if key[:4] == (name, loss, mode, dtype)}
    assert [row["provider"] for row in rows[:4]] == ["ours", gate_speed.GRAPH, "plain", "pml"]
    compiled = [row["provider"] == "plain-compiled" for row in rows]
    assert compiled == sorted(compiled)


def test_the_gate_stops_at_its_time_and_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no GPU here"):
        gate.run(tmp_path, dry=False, minutes=1.0)
    late = gate.Gate(tmp_path, dry=True, minutes=0.0, say=lambda line: None)
    assert not late.run()
    assert {step["status"] for step in late.state["steps"].values()} == {"not begun, the time was up"}
    with pytest.raises(ValueError, match="choose another --out"):
        gate.Gate(tmp_path, dry=False, minutes=1.0)


def test_what_a_gpu_left_is_judged_elsewhere(tmp_path: Path) -> None:
    held = ROOT / "reports" / "gpu-h200" / "gate.json"
    with pytest.raises(ValueError, match=r"no gate\.json"):
        gate.judge(tmp_path / "nothing")
    (tmp_path / "gate.json").write_bytes(held.read_bytes())
    assert gate.judge(tmp_path)
    found = pd.read_csv(tmp_path / "verdict.csv").set_index("figure")
    assert len(found["measured"].dropna()) > 8
    of_tiles = found.loc["tile_kernel of a step, ms, N=1024 D=512 C=1000000"]
    rows = json.loads(held.read_text())["steps"]["profile"]["result"]
    assert of_tiles["measured"] == next(row["microseconds"] for row in rows if row["what"] == "tile_kernel") / 1e3


def test_dlogits_move_six_bytes_past_the_cache_and_none_inside() -> None:
    h100 = GPUS["sm_90"]
    assert kernels.dlogits_bytes(h100, kernels.Size(1024, 512, 131_072, "bfloat16")) == 6.0
    assert kernels.dlogits_bytes(h100, kernels.Size(1024, 512, 131_072, "tf32")) == 12.0
    assert kernels.dlogits_bytes(h100, kernels.Size(1024, 512, 131_072, "float32")) == 20.0
    assert kernels.dlogits_bytes(h100, kernels.Size(1024, 512, 8_448, "bfloat16")) == 0.0


def test_a_card_is_known_by_its_name() -> None:
    assert card("sm_90", "NVIDIA H200") is H200
    for other in ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"):
        assert card("sm_90", other) is GPUS["sm_90"]
    assert card("sm_75", "Tesla T4") is None
    narrow = kernels.Size(1024, 256, 131_072, "bfloat16")
    assert kernels.products_wait(GPUS["sm_90"], narrow)  # what the audit says of its limits
    assert not kernels.products_wait(H200, narrow)


def some_steps(monkeypatch: pytest.MonkeyPatch, **steps: object) -> None:
    monkeypatch.setattr(gate, "STEPS", steps)


def dry(out: Path) -> gate.Gate:
    return gate.Gate(out, dry=True, minutes=10.0, say=lambda line: None)


def test_a_gate_out_of_time_goes_on_with_the_rows_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    judged: list[int] = []

    def one(provider: Any, p: object, tensors: object, of: gate.Gate, mode: object) -> dict[str, object]:
        timed.append(f"{provider.name} {p}")
        if len(timed) == 2:
            of.begin -= 1e9  # the time is up
        if len(timed) == 4:
            raise KeyboardInterrupt
        return {"milliseconds": 1.0}

    def verdict(of: gate.Gate) -> list[dict[str, object]]:
        judged.append(sum(row.get("failed") != gate.UP for row in of.result("speed")))
        return [{"figure": "any"}]

    monkeypatch.setattr(gate_speed, "one", one)
    monkeypatch.setattr(gate.Gate, "tensors", lambda self, p: None)
    some_steps(monkeypatch, speed=gate.speed, verdict=verdict)
    first = dry(tmp_path)
    assert not first.run()
    assert first.state["steps"]["speed"]["status"] == "partial"
    assert first.state["steps"]["verdict"]["status"] == "not begun, the time was up"
    assert len(timed) == 2
    with pytest.raises(KeyboardInterrupt):  # stopped by hand: the third row is kept
        dry(tmp_path).run()
    kept = json.loads((tmp_path / "gate.json").read_text())["steps"]["speed"]
    assert kept["status"] == "partial"
    assert sum("milliseconds" in row for row in kept["result"]) == 3
    assert len(pd.read_csv(tmp_path / "speed.csv")) == len(kept["result"])
    last = dry(tmp_path)
    assert last.run()
    assert len(timed) == len(set(timed)) + 1  # the row that was stopped
    assert not any(row.get("failed") == gate.UP for row in last.result("speed"))
    assert judged == [len(last.result("speed"))]
    assert dry(tmp_path).run()
    assert len(judged) == 1


def test_the_table_leaves_out_what_will_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it goes on with what an earlier run measured, and whatever a smaller size took."""
    asked: list[tuple[str, int]] = []

    def row_of(line: dict[str, Any], tensors: object, of: gate.Gate) -> dict[str, object]:
        asked.append((line["provider"], line["C"]))
        of.begin -= 1e9 * (len(asked) == 40)
        slow = line["provider"] == "liger" and line["C"] == 1_000_000
        return {"milliseconds": 1500.0 if slow else 1.0}

    monkeypatch.setattr(gate_speed, "row_of", row_of)
    monkeypatch.setattr(gate_speed, "compiled_ahead", lambda asked: None)
    some_steps(monkeypatch, table=gate_speed.table)
    for _ in range(2):
        held = gate.Gate(tmp_path, dry=False, minutes=10.0, say=lambda line: None)
        held.run()
    rows = held.result("table")
    left_out = {(row["provider"], row["C"]) for row in rows if "left out" in str(row.get("failed"))}
    assert left_out == {("liger", 4_000_000)}
    assert {row["C"] for row in rows if row["provider"] == "liger" and "milliseconds" in row} == {
        10_000, 100_000, 1_000_000,
    }  # fmt: skip
    assert len(asked) == sum("milliseconds" in row for row in rows)


def test_speed_that_goes_on_is_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"provider": "ours", "failed": gate.UP}
    some_steps(monkeypatch, speed=lambda of: [row], verdict=lambda of: [{"figure": "any", **of.result("speed")[0]}])
    assert not dry(tmp_path).run()
    row = {"provider": "ours", "milliseconds": 2.0}
    again = dry(tmp_path)
    assert again.run()
    assert again.result("verdict") == [{"figure": "any", **row}]


def test_a_missed_error_budget_fails_and_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"of": "dx", "within_budget": True}, {"of": "dw", "within_budget": False}]
    some_steps(monkeypatch, errors=lambda of: lines)
    missed = dry(tmp_path)
    assert not missed.run()
    assert missed.state["steps"]["errors"]["status"] == "failed"
    assert pd.read_csv(tmp_path / "errors.csv")["within_budget"].tolist() == [True, False]


def test_tests_of_the_gate_that_take_too_long_leave_what_they_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = subprocess.Popen, []

    def slow(call: list[str], **options: Any) -> object:
        process = real(["sh", "-c", "echo 300 passed so far; sleep 60 & echo $! > worker; wait"], **options | at)
        waits = process.wait

        def shorter(timeout: float | None = None) -> int:
            asked.append(timeout)
            return waits(timeout and 1.0)

        process.wait = shorter
        return process

    at = {"cwd": tmp_path}
    monkeypatch.setattr(gate.subprocess, "Popen", slow)
    some_steps(monkeypatch, tests=gate.tests, errors=lambda of: [{"within_budget": True}])
    long = dry(tmp_path)
    assert not long.run()
    assert long.state["steps"]["tests"]["status"] == "partial"
    assert long.state["steps"]["errors"]["status"] == "done"
    assert "300 passed so far" in (tmp_path / "tests.txt").read_text()
    assert asked == [0.3 * 600, None]
    worker = Path(f"/proc/{(tmp_path / 'worker').read_text().strip()}/stat")
    assert not worker.exists() or worker.read_text().split()[2] == "Z"  # nobody goes on beside what is measured next


def breaks(of: gate.Gate) -> None:
    of.keep("speed", [{"provider": "ours", "milliseconds": 1.0}])
    os._exit(7)


def test_a_step_that_ends_its_process_fails_alone_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context:
        Process = multiprocessing.get_context("fork").Process

    # Forked, so that the process has the steps of this test; ttsem would change torch in it.
    monkeypatch.setattr(gate.multiprocessing, "get_context", lambda kind: Context)
    monkeypatch.setattr(gate, "only", lambda out, dry, minutes, name: gate.Gate(out, dry, minutes).step(name))
    some_steps(monkeypatch, speed=breaks, verdict=lambda of: [{"figure": "any"}])
    broken = gate.Gate(tmp_path, dry=True, minutes=10.0, say=lambda line: None, apart=True)
    assert not broken.run()
    assert broken.state["steps"]["speed"]["status"] == "failed"
    assert "ended with 7" in broken.state["steps"]["speed"]["error"]
    assert broken.result("speed") == [{"provider": "ours", "milliseconds": 1.0}]
    assert broken.state["steps"]["verdict"]["status"] == "done"
