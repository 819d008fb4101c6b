"""Steps of the GPU gate (`perf/gate.py`) that time whole steps: ours beside the others."""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from perf import correct
from perf.clock import seconds
from perf.compiled import DTYPES, multiplying
from perf.grid import COMMON, PLANS, Case, Grid, Plan
from perf.problem import LOSSES, Problem
from perf.providers import class_of, make, skipped_words
from perf.providers.base import STEP, WHOLE
from perf.rows import measured

if TYPE_CHECKING:
    from perf.gate import Gate

SIZES = [(1024, 512, 1_000_000), (1024, 512, 100_000), (256, 512, 1_000_000)]
KINDS = {100_000: ("bfloat16", "float32", "tf32", "float16")}  # of the sizes with so many classes; of others bfloat16
GRAPH = "ours-graph"
ROWS = {
    "arcface": ("ours", GRAPH, "plain", "ours-torch", "ours-retain", "ours-in-backward", "ours-sampled", "pml"),
    "softmax": ("ours", "torch-lce", "liger", "cce", "quack"),
}
COMPILED = {"arcface": ("plain-compiled", "ours-compiled")}  # last: it takes a minute to compile


def speed(gate: Gate) -> list[dict[str, Any]]:
    """Forward and backward of every provider that can, median and peak memory beyond what is given."""
    sizes = [(8, 16, 200)] if gate.dry else SIZES
    asked = [
        {"provider": name, "loss": loss, "dtype": dtype, "N": n, "D": d, "C": c}
        for rows, of in ((ROWS, sizes), (COMPILED, sizes[:2]))
        for n, d, c in of
        for dtype in KINDS.get(c, ("bfloat16",))
        for loss, names in rows.items()
        for name in names
    ]
    tensors = functools.lru_cache(1)(gate.tensors)

    def row(line: dict[str, Any]) -> dict[str, Any]:
        return row_of(line, tensors, gate)

    return measured(asked, gate.result("speed"), row, lambda: gate.left, lambda rows: gate.keep("speed", rows))


def row_of(line: dict[str, Any], tensors: Callable[[Problem], Any], gate: Gate) -> dict[str, Any]:
    """What there is to say of a provider at a size."""
    if not gate.dry:
        torch.cuda.synchronize()  # raises where the row before broke the GPU's context: no row is blamed for it
    name, kind = line["provider"], line["dtype"]
    dtype = str(DTYPES[kind]).removeprefix("torch.")
    p = Problem(line["N"], line["D"], line["C"], dtype, gate.device_of(name), line["loss"])
    if name != GRAPH and class_of(name) is None:
        return {"failed": skipped_words(name) or "not found"}
    with multiplying(kind):
        if name == GRAPH:
            return in_a_graph(p, tensors(p), gate)
        provider = make(name)
        why = provider.supports(p)
        return {"failed": why} if why else one(provider, p, tensors(p), gate, line.get("mode"))


EVERY = [(n, d, c) for c in (1_000_000, 100_000, 4_000_000, 10_000) for d in (512, 128) for n in (1024, 256, 32)]
BESIDE = {"arcface": ("ours", GRAPH, "plain", "pml"), "softmax": ("ours", GRAPH, "plain", "cce", "quack", "liger")}
MODES_OF: dict[str, dict[str, tuple[str, ...]]] = {
    STEP: BESIDE,
    WHOLE: {"arcface": ("ours-in-backward", "ours", "plain")},
    "forward": {"arcface": ("ours", "plain"), "softmax": ("ours", "plain", "cce")},
}
ELSEWHERE = ("ours-sharded", "ours-torch")  # a CPU's alone; in the step `speed`
LONGEST = 2.0  # seconds of a step: what is predicted to take longer, by fewer classes, is left out


def sizes_of(dry: bool) -> list[tuple[int, int, int]]:
    return [(8, 16, 200)] if dry else EVERY


def asked_first(dry: bool) -> list[Case]:
    return [
        Case(Problem(n, d, c, dtype, "cuda", loss), name, mode)
        for mode, beside in MODES_OF.items()
        for n, d, c in sizes_of(dry)
        if mode == STEP or dry or (d == 512 and c >= 100_000)
        for dtype in ("bfloat16", "float32")
        for loss, names in beside.items()
        for name in names
    ]


def planned(dry: bool) -> list[dict[str, Any]]:
    """The rows of the table: what is looked at first, what else `--full` has at its sizes, and what compiles long."""
    sizes = sizes_of(dry)
    small = Plan((Grid((200,), (16,), (8,), ("bfloat16",), LOSSES, modes=(STEP,)),), PLANS["full"].budget)
    plan = (small if dry else PLANS["full"]).on("cuda")
    others = [
        case
        for cases in plan.blocks().values()
        for case in cases
        if case.mode in COMMON and ":" not in case.provider and case.provider not in ELSEWHERE
        and (case.problem.n, case.problem.d, case.problem.classes) in sizes
    ]  # fmt: skip

    def late(case: Case) -> tuple[Any, ...]:
        p, kind = case.problem, class_of(case.provider)
        compiles = kind is not None and kind.compiles
        return compiles, list(MODES_OF).index(case.mode), sizes.index((p.n, p.d, p.classes)), p.dtype

    return [
        {"provider": name, "loss": p.loss, "mode": mode, "dtype": p.dtype, "N": p.n, "D": p.d, "C": p.classes}
        for p, name, mode in dict.fromkeys([*asked_first(dry), *sorted(others, key=late)])
    ]


def table(gate: Gate) -> list[dict[str, Any]]:
    """The planned sizes; a provider's error against float64 comes first, and its time counts if that is small."""
    asked = planned(gate.dry)
    if not gate.dry and gate.result("table") is None:
        compiled_ahead(asked_first(gate.dry))
    tensors = functools.lru_cache(1)(gate.tensors)  # W alone may be 8 GB
    taken: dict[tuple[Any, ...], tuple[int, float]] = {}

    def of(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in asked[0] if name != "C")

    def learn(line: dict[str, Any]) -> None:
        if "milliseconds" in line:
            taken[of(line)] = max(taken.get(of(line), (0, 0.0)), (line["C"], line["milliseconds"] / 1e3))

    for line in gate.result("table") or []:
        learn(line)

    @functools.cache
    def wrong(name: str, loss: str, dtype: str, d: int) -> str:
        if name == GRAPH:
            return wrong("ours", loss, dtype, d)
        p = Problem(correct.N, d, correct.CLASSES, dtype, gate.device_of(name), loss)
        provider = make(name)
        provider.prepare(p, gate.tensors(p))
        return correct.wrong(correct.errors(provider, p), dtype)

    def row(line: dict[str, Any]) -> dict[str, Any]:
        classes, before = taken.get(of(line), (1, 0.0))
        if (predicted := before * line["C"] / classes) > LONGEST:
            return {"failed": f"left out: {predicted:.1f} s by its time at {classes:,} classes"}
        found = row_of(line, tensors, gate)
        if "milliseconds" in found:
            learn(line | found)
            try:
                found["wrong"] = wrong(*(line[name] for name in ("provider", "loss", "dtype", "D")))
            except Exception as error:
                found["wrong"] = f"not checked: {type(error).__name__}: {error}"[:300]
        return found

    return measured(asked, gate.result("table"), row, lambda: gate.left, lambda rows: gate.keep("table", rows))


def compiled_ahead(asked: list[Case]) -> None:
    """Our kernels for these sizes into Triton's cache, on all cores: one after another they take minutes."""
    kinds = {(p.n, p.d, p.dtype, p.loss, mode): None for p, _, mode in asked}
    workers = min(12, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(step_of_ours, kinds)


def step_of_ours(n: int, d: int, dtype: str, loss: str, mode: str) -> None:
    with suppress(Exception):  # what fails will fail again where it is measured, and its row says so
        p = Problem(n, d, 100_000, dtype, "cuda", loss)
        for name in {"ours-in-backward", "ours"} if mode == WHOLE else {"ours"}:
            provider = make(name)
            provider.prepare(p, p.tensors())
            provider.reset(mode)
            provider.run(mode)
        torch.cuda.synchronize()


def in_a_graph(p: Problem, tensors: Any, gate: Gate) -> dict[str, Any]:
    """Our forward and backward captured once and replayed: what the GPU takes where no launch waits for the CPU."""
    if gate.dry:
        return {"failed": "a dry run has no CUDA graphs"}
    try:
        taken = replayed(make("ours"), p, tensors, gate)
        return {"title": "tritonmargin, in a CUDA graph", "mode": STEP, "milliseconds": 1e3 * taken}
    except Exception as error:
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def replayed(provider: Any, p: Problem, tensors: Any, gate: Gate) -> float:
    """Seconds of its forward and backward in a graph."""
    provider.prepare(p, tensors)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # kernels are compiled and buffers made before they are captured
        for _ in range(3):
            provider.reset(STEP)
            provider.run(STEP)
    torch.cuda.current_stream().wait_stream(beside)
    provider.reset(STEP)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        provider.run(STEP)
    return median(captured.replay, gate)


def one(provider: Any, p: Problem, tensors: Any, gate: Gate, mode: str | None = None) -> dict[str, Any]:
    mode = mode or (STEP if STEP in provider.modes else WHOLE)

    def step() -> None:
        provider.reset(mode)
        provider.run(mode)

    try:
        provider.prepare(p, tensors)
        step()
        taken, peak = 0.0, None
        if not gate.dry:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            taken, _ = seconds(step, gate.clock)
            peak = (torch.cuda.max_memory_allocated() - held) / 1e6
        taken = taken if taken > 1.0 else median(step, gate)  # of long steps one number is enough
        return {"title": provider.title, "mode": mode, "milliseconds": 1e3 * taken, "peak_MB": peak}
    except Exception as error:  # out of memory, a peer that does not compile: a row of the table
        if not gate.dry:
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
        return {"title": provider.title, "failed": f"{type(error).__name__}: {error}"[:300]}


def median(call: Callable[[], Any], gate: Gate) -> float:
    """Seconds, after a warm-up; of fewer rounds where a call takes long."""
    call()
    rounds = 1 if gate.dry else max(3, min(15, int(0.3 / max(seconds(call, gate.clock)[0], 1e-9))))
    return statistics.median(seconds(call, gate.clock)[0] for _ in range(rounds))


def alone(call: Callable[[], Any], gate: Gate) -> float:
    """Seconds of a short kernel in a CUDA graph of many: between two events its launch would count as well."""
    if gate.dry:
        return median(call, gate)
    import triton.testing

    return 1e-3 * float(triton.testing.do_bench_cudagraph(call, return_mode="median"))
