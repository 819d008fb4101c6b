"""`python -m perf gate --out DIR`: what a person with a GPU for ten minutes runs.

Steps in order, each with what it found written at once; no step begins after the time is up. One that has not come to
its end is partial: the next run does it again, and measures the rows that are missing. A step that fails is a result
too. Steps that work on the GPU have a process each: a kernel that breaks it stops no other step. `--dry-run` runs every
step on this machine without a GPU, at tiny sizes: our kernels executed by ttsem, peers on the CPU, a search among two
tiles. What ttsem does not play fails there, in a row that says so: CUDA graphs, drawing a sample, torch.compile. Its
numbers say nothing, it shows that the gate works.

    environment  versions, the GPU, clocks
    tests        tests/test_kernels.py on this GPU, in at most 30 % of the time
    errors       loss and gradients against float64, beside plain torch in the same dtype
    rate         what cuBLAS makes of the three products of a step
    profile      a step's kernels by the GPU's clock, and how long the CPU takes to launch them
    chunks       the step by the size of its chunks, launched one by one and in a CUDA graph
    speed        the head's step beside the others, time and peak memory
    table        the sizes of `python -m perf run --full`, by provider and mode, each provider checked first
    search       tiles by the clock
    verdict      measured over predicted, for every figure that `python -m perf audit` predicts
    other_tests  the losses' own tests on this GPU, in the time that is left

It leaves gate.json (everything), errors.csv, speed.csv, table.csv, search.csv, verdict.csv, tests.txt and gate.html.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

import tritonmargin as tm
from perf import correct, kernels, machine, static, tune
from perf.clock import seconds, synchronise
from perf.compiled import DTYPES, multiplying
from perf.gpus import Gpu, card
from perf.problem import Problem, Tensors
from perf.providers import class_of, make, skipped_words
from perf.providers.base import STEP, WHOLE
from perf.results import replace
from perf.rows import UP, measured
from tritonmargin.kernels import tiles

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("errors", "speed", "table", "search", "verdict")
PLAYED = ("ours", "ours-retain", "ours-in-backward")  # by the kernels, in a dry run too
APART = ("errors", "rate", "speed", "profile", "chunks", "table", "search")
TESTS_SHARE = 0.3  # of the minutes: what is measured should have some left
GRACE = 60.0  # seconds that a step may take to see that the time is up: a compilation ends by itself


@dataclass
class Gate:
    out: Path
    dry: bool
    minutes: float
    say: Callable[[str], Any] = print
    apart: bool = False  # whether steps on the GPU have a process of their own
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.begin = time.monotonic()
        self.load()

    def load(self) -> None:
        path = self.out / "gate.json"
        if path.exists():
            self.state = json.loads(path.read_text())
            if self.state.get("dry_run") != self.dry:
                raise ValueError(
                    f"{path} is of {'a dry run' if self.state.get('dry_run') else 'a GPU'}; choose another --out"
                )
        self.state |= {"dry_run": self.dry}
        self.state.setdefault("steps", {})

    @property
    def left(self) -> float:
        """Seconds."""
        return 60.0 * self.minutes - (time.monotonic() - self.begin)

    device = "cuda"  # in a dry run ttsem plays it

    @property
    def clock(self) -> str:
        """Whose time is taken."""
        return "cpu" if self.dry else self.device

    def device_of(self, name: str) -> str:
        """Where a provider runs: peers, and what ttsem does not play, on the CPU of a dry run."""
        return self.device if name in PLAYED or not self.dry else "cpu"

    def tensors(self, p: Problem) -> Tensors:
        if not (self.dry and p.device == self.device):
            return p.tensors()
        # ttsem's GPU draws no numbers.
        made = dataclasses.replace(p, device="cpu").tensors()
        x, weight, target = (each.detach().to(p.device) for each in (made.x, made.weight, made.target))
        return Tensors(x.requires_grad_(), weight.requires_grad_(), target)

    def run(self) -> bool:
        """Every step that is not done; whether all are, and none failed."""
        steps = self.state["steps"]
        for name in STEPS:
            if steps.get(name, {}).get("status") == "done":
                continue
            if self.left <= 0:
                steps.setdefault(name, {"status": f"not begun, {UP}"})
                continue
            self.say(f"gate: {name}")
            if name in ("rate", "speed") and steps.get("verdict", {}).get("status") == "done":
                steps["verdict"]["status"] = "partial"  # it is judged again by what is measured now
            if self.apart and name in APART:
                self.step_apart(name)
            else:
                self.step(name)
            steps = self.state["steps"]
        self.save()
        return all(step.get("status") == "done" for step in steps.values())

    def step(self, name: str) -> None:
        start = time.monotonic()
        try:
            result = STEPS[name](self)
            found = {"status": status_of(result), "result": result}
        except Exception as error:
            found = self.failed(name, f"{type(error).__name__}: {error}"[:2000])
        self.state["steps"][name] = found | {"seconds": round(time.monotonic() - start, 1)}
        self.save()

    def step_apart(self, name: str) -> None:
        """The same in a process, which leaves its rows in gate.json however it ends."""
        start = time.monotonic()
        self.save()
        arguments = (self.out, self.dry, self.left / 60.0, name)
        process = multiprocessing.get_context("spawn").Process(target=only, args=arguments)
        process.start()
        process.join(self.left + GRACE)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        self.load()
        if process.exitcode:
            found = self.failed(name, f"stopped, {UP}" if late else f"its process ended with {process.exitcode}")
            taken = round(time.monotonic() - start, 1)
            self.state["steps"][name] = found | {"seconds": taken} | ({"status": "partial"} if late else {})
            self.save()

    def failed(self, name: str, why: str) -> dict[str, Any]:
        """With the rows that it had."""
        rows = self.result(name)
        return {"status": "failed", "error": why} | ({"result": rows} if isinstance(rows, list) else {})

    def keep(self, name: str, rows: list[dict[str, Any]]) -> None:
        """What a step has so far."""
        self.state["steps"][name] = {"status": "partial", "result": rows}
        self.save_rows(name)

    def result(self, name: str) -> Any:
        return self.state["steps"].get(name, {}).get("result")

    def save(self) -> None:
        for name in TABLES:
            self.save_rows(name)
        (self.out / "gate.html").write_text(page(self.state))

    def save_rows(self, name: str) -> None:
        """Without the page, which takes longer than a row of hundreds."""
        replace(self.out / "gate.json", json.dumps(self.state, indent=1).encode() + b"\n")
        if name in TABLES and self.result(name):
            pd.DataFrame(self.result(name)).to_csv(self.out / f"{name}.csv", index=False)


def status_of(result: Any) -> str:
    rows = result if isinstance(result, list) else [result]
    if any(not row.get("within_budget", True) for row in rows):
        return "failed"
    return "partial" if any(row.get("failed") == UP for row in rows) else "done"


# -- the steps ---------------------------------------------------------------------------------------------------


def environment(gate: Gate) -> dict[str, Any]:
    import triton

    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
        "tritonmargin": tm.__version__, "commit": machine.commit(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }  # fmt: skip
    if gate.dry:
        return facts | {"gpu": "none: a dry run", "target": "sm_90"}
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "gpu": properties.name, "processors": properties.multi_processor_count, "target": tiles.gpu(0).target,
        "memory_GB": round(properties.total_memory / 1e9, 1), "capability": torch.cuda.get_device_capability(0),
        "cache_MB": getattr(properties, "L2_cache_size", 0) / 2**20,
    }  # fmt: skip
    asked = "clocks.max.sm,clocks.max.memory,power.limit,driver_version"
    query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        facts[asked] = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        facts[asked] = "not available"
    return facts


def tests(gate: Gate) -> dict[str, Any]:
    """The kernel tests in a process of their own."""
    most = TESTS_SHARE * 60.0 * gate.minutes
    return run_tests(gate, ["test_kernels"], "ties or descriptors_only or not_a_number", most)


def other_tests(gate: Gate) -> dict[str, Any]:
    """Last, because they take longest: every other test that runs on a GPU."""
    files = ["test_functional", "test_op", "test_failures", "test_optim", "test_stream", "test_budget", "test_modules"]
    return run_tests(gate, files[2:3] if gate.dry else files, "first_chunk_that_holds and softmax")


def run_tests(gate: Gate, files: list[str], chosen_if_dry: str, most: float = math.inf) -> dict[str, Any]:
    """Their words are in tests.txt as they come. Tests that are run again find their kernels compiled."""
    chosen = ["-k", chosen_if_dry] if gate.dry else ["-m", "not slow", *side_by_side()]
    call = [sys.executable, "-m", "pytest", *(f"tests/{name}.py" for name in files), *chosen]
    environment = os.environ | {"TRITONMARGIN_TESTS": "ttsem-90" if gate.dry else "cuda", "PYTHONUNBUFFERED": "1"}
    path, code = gate.out / "tests.txt", None
    before = path.stat().st_size if path.exists() else 0
    with path.open("a") as file:
        options: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(call, cwd=ROOT, env=environment, **options)
        try:
            code = process.wait(min(most, gate.left))
        except subprocess.TimeoutExpired:
            # Its workers too: what is measured next has the GPU for itself.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            file.write(f"\n{UP}\n")
    said = path.read_bytes()[before:].decode(errors="replace")
    last = [line for line in said.splitlines() if " passed" in line or " failed" in line]
    if code:
        raise RuntimeError(last[-1] if last else said[-500:])
    return {"failed": UP} if code is None else {"summary": last[-1]}


def side_by_side() -> list[str]:
    """Most of a test on a GPU is the compilation of its kernels, on one core."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadgroup"]


def errors(gate: Gate) -> list[dict[str, Any]]:
    """Ours and plain torch in the same dtype, both against float64 on the same rounded numbers."""
    n, d, c = (24, 32, 300) if gate.dry else (512, 512, 50_000)
    margin = tm.ArcFace(m=0.5, s=64.0)
    lines = []
    for kind in ("float32", "bfloat16", "float16") if gate.dry else ("float32", "tf32", "bfloat16", "float16"):
        dtype, size = DTYPES[kind], f"arcface, {kind}, N={n}, D={d}, C={c:,}"
        made = torch.Generator().manual_seed(0)
        x = torch.randn(n, d, generator=made).to(gate.device, dtype)
        w = (0.01 * torch.randn(c, d, generator=made)).to(gate.device, dtype)
        target = torch.randint(c, (n,), generator=made).to(gate.device)

        def step(to: torch.dtype, backend: str, x: Any = x, w: Any = w, target: Any = target) -> list[torch.Tensor]:
            a, b = x.to(to).requires_grad_(), w.to(to).requires_grad_()
            with tm.use_backend(backend):
                loss = tm.margin_cross_entropy(a, b, target, margin)
            return [loss.detach(), *torch.autograd.grad(loss, (a, b))]

        def plain(to: torch.dtype, x: Any = x, w: Any = w, target: Any = target) -> list[torch.Tensor]:
            a, b = x.to(to).requires_grad_(), w.to(to).requires_grad_()
            cos = F.linear(F.normalize(a), F.normalize(b)).float()
            own = cos.gather(1, target[:, None]).clamp(-1.0, 1.0)
            t = margin.target_cosine(own[:, 0])[:, None]
            loss = F.cross_entropy(64.0 * cos.scatter(1, target[:, None], t), target)
            return [loss.detach(), *torch.autograd.grad(loss, (a, b))]

        exact = step(torch.float64, "reference")
        with multiplying(kind):
            found, usual = step(dtype, "triton"), plain(dtype)
        for name, ours, theirs, want in zip(("loss", "dx", "dw"), found, usual, exact, strict=True):
            error = float((ours.double() - want).norm() / want.norm())
            other = float((theirs.double() - want).norm() / want.norm())
            lines.append({"size": size, "of": name, "tritonmargin": error, "plain_torch": other,
                          "within_budget": error <= 2.0 * other + 1e-7})  # fmt: skip
    return lines


def rate(gate: Gate) -> dict[str, float]:
    """Flops per second of the three shapes of a step, in bfloat16 and float32, into buffers that exist."""
    n, d, k = (16, 16, 64) if gate.dry else (1024, 512, 32_768)
    made = {}
    shapes = {"logits": ((n, d), (d, k)), "dX": ((n, k), (k, d)), "dW": ((k, n), (n, d))}
    for dtype, (what, (a, b)) in itertools.product((torch.bfloat16, torch.float32), shapes.items()):
        name = what if dtype == torch.bfloat16 else f"{what}, float32"
        left, right = (torch.randn(*shape, device=gate.device).to(dtype) for shape in (a, b))
        out = torch.empty(a[0], b[1], dtype=dtype, device=gate.device)
        taken = alone(lambda left=left, right=right, out=out: torch.mm(left, right, out=out), gate)
        made[name] = 2.0 * n * d * k / taken
    return made


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
LONGEST = 2.0  # seconds of a step: what is predicted to take longer, by fewer classes, is left out


def table(gate: Gate) -> list[dict[str, Any]]:
    """The planned sizes; a provider's error against float64 comes first, and its time counts if that is small."""
    asked = [
        {"provider": name, "loss": loss, "mode": mode, "dtype": dtype, "N": n, "D": d, "C": c}
        for mode, beside in MODES_OF.items()
        for n, d, c in ([(8, 16, 200)] if gate.dry else EVERY)
        if mode == STEP or gate.dry or (d == 512 and c >= 100_000)
        for dtype in ("bfloat16", "float32")
        for loss, names in beside.items()
        for name in names
    ]
    if not gate.dry and gate.result("table") is None:
        compiled_ahead(asked)
    tensors = functools.lru_cache(1)(gate.tensors)  # W alone may be 8 GB
    taken: dict[tuple[Any, ...], tuple[int, float]] = {}

    @functools.cache
    def wrong(name: str, loss: str, dtype: str, d: int) -> str:
        if name == GRAPH:
            return wrong("ours", loss, dtype, d)
        p = Problem(correct.N, d, correct.CLASSES, dtype, gate.device_of(name), loss)
        provider = make(name)
        provider.prepare(p, gate.tensors(p))
        return correct.wrong(correct.errors(provider, p), dtype)

    def row(line: dict[str, Any]) -> dict[str, Any]:
        of = tuple(line[name] for name in line if name != "C")
        classes, before = taken.get(of, (1, 0.0))
        if (predicted := before * line["C"] / classes) > LONGEST:
            return {"failed": f"left out: {predicted:.1f} s by its time at {classes:,} classes"}
        found = row_of(line, tensors, gate)
        if "milliseconds" in found:
            taken[of] = max(taken.get(of, (0, 0.0)), (line["C"], found["milliseconds"] / 1e3))
            try:
                found["wrong"] = wrong(*(line[name] for name in ("provider", "loss", "dtype", "D")))
            except Exception as error:
                found["wrong"] = f"not checked: {type(error).__name__}: {error}"[:300]
        return found

    return measured(asked, gate.result("table"), row, lambda: gate.left, lambda rows: gate.keep("table", rows))


def compiled_ahead(asked: list[dict[str, Any]]) -> None:
    """Our kernels for every size into Triton's cache, on all cores: one after another they take minutes."""
    kinds = {(line["N"], line["D"], line["dtype"], line["loss"], line["mode"]): None for line in asked}
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


def profile(gate: Gate) -> list[dict[str, Any]]:
    """Our forward and backward: every kernel with its launches and the GPU's time for it, longest first.

    Two rows that are no kernel: the step by the wall clock, and what the CPU takes until all of it is launched.
    """
    rows: list[dict[str, Any]] = []
    for n, d, c in [(8, 16, 200)] if gate.dry else SIZES[:1]:
        p = Problem(n, d, c, "bfloat16", gate.device)
        provider = make("ours")
        provider.prepare(p, gate.tensors(p))

        def step(provider: Any = provider) -> None:
            provider.reset(STEP)
            provider.run(STEP)

        begun = []
        for _ in range(1 if gate.dry else 10):
            synchronise(gate.clock)
            start = time.perf_counter()
            step()
            launched = time.perf_counter()
            synchronise(gate.clock)
            begun.append((time.perf_counter() - start, launched - start))
        size = {"N": n, "D": d, "C": c, "dtype": p.dtype}
        whole, cpu = (1e6 * statistics.median(each) for each in zip(*begun, strict=True))
        rows += [
            size | {"what": "the step", "launches": None, "microseconds": whole},
            size | {"what": "the CPU, until all is launched", "launches": None, "microseconds": cpu},
        ]
        kinds = [torch.profiler.ProfilerActivity.CPU if gate.dry else torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as seen:
            step()
            synchronise(gate.clock)
        of_kernel: dict[str, list[float]] = {}
        for event in seen.events():
            taken = event.cpu_time if gate.dry else event.device_time
            if taken > 0.0:
                of_kernel.setdefault(event.name[:120], []).append(taken)
        rows += [
            size | {"what": name, "launches": len(times), "microseconds": sum(times)}
            for name, times in sorted(of_kernel.items(), key=lambda item: -sum(item[1]))[:30]
        ]
    return rows


CHUNKS = (0, 2_112, 4_224, 8_448, 16_896, 33_792, 67_584, 135_168)  # 0: the one that the library chooses


def chunks(gate: Gate) -> list[dict[str, Any]]:
    """What a chunk's size does to the step: few launches, or dL/dz that stays in the cache."""
    asked = [
        {"N": n, "D": d, "C": c, "dtype": dtype, "chunk": chunk}
        for n, d, c, dtype in ([(8, 16, 200, "bfloat16")] if gate.dry else [(*SIZES[0], "bfloat16")])
        for chunk in ((0, 64) if gate.dry else CHUNKS)
    ]
    tensors = functools.lru_cache(1)(gate.tensors)

    def row(line: dict[str, Any]) -> dict[str, Any]:
        p = Problem(line["N"], line["D"], line["C"], line["dtype"], gate.device)
        provider = make("ours")
        provider.chosen["chunk_bytes"] = line["chunk"] * (p.n + 2 * p.d) * 4 or None  # see walk.chunk_classes
        found = one(provider, p, tensors(p), gate)
        kept = {name: found[name] for name in ("milliseconds", "peak_MB", "failed") if name in found}
        if gate.dry or "failed" in kept:
            return kept
        try:
            return kept | {"milliseconds_in_a_graph": 1e3 * replayed(provider, p, tensors(p), gate)}
        except Exception as error:
            return kept | {"failed": f"{type(error).__name__}: {error}"[:300]}

    return measured(asked, gate.result("chunks"), row, lambda: gate.left, lambda rows: gate.keep("chunks", rows))


def alone(call: Callable[[], Any], gate: Gate) -> float:
    """Seconds of a short kernel in a CUDA graph of many: between two events its launch would count as well."""
    if gate.dry:
        return median(call, gate)
    import triton.testing

    return 1e-3 * float(triton.testing.do_bench_cudagraph(call, return_mode="median"))


def search(gate: Gate) -> list[dict[str, Any]]:
    small = tune.Small(lambda call: median(call, gate)) if gate.dry else None
    frame = tune.measure(
        "bfloat16", gate.say, left=lambda: gate.left, found=gate.result("search"),
        keep=lambda rows: gate.keep("search", rows), small=small,
    )  # fmt: skip
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def verdict(gate: Gate) -> list[dict[str, Any]]:
    """Each predicted figure beside what was measured."""
    facts = gate.result("environment")
    gpu = card(tiles.family(facts["target"]), facts["gpu"])
    if gpu is None:
        raise ValueError(f"nothing is predicted for {facts['target']}")
    found = {(row["provider"], row["N"], row["D"], row["C"], row["dtype"]): row.get("milliseconds")
             for row in gate.result("speed") or []
             if row["provider"] != "ours" or row["loss"] == "arcface"}  # fmt: skip
    rates = gate.result("rate") or {}
    lines: list[dict[str, Any]] = []
    for name, got in rates.items():
        dtype = name.partition(", ")[2] or "bfloat16"
        peak = static.SUSTAINED * gpu.peak(dtype)
        lines.append({"figure": f"{dtype} products, flops per second: {name}", "predicted": peak, "measured": got})
    floor = [got for name, got in rates.items() if "," not in name]
    lines += kernel_figures(gate, gpu)
    names = {"tritonmargin, in a CUDA graph": GRAPH, "tritonmargin, launched one by one": "ours",
             "full logits, the usual code": "plain",
             "Cut Cross-Entropy's schedule, W normalised before": "cce",
             "Liger's schedule, W normalised before": "liger"}  # fmt: skip
    for n, d, c in SIZES[:1] if gate.dry else SIZES:
        for row in kernels.predict(gpu, "bfloat16", n, d, c).to_dict("records"):
            measured = found.get((names.get(row["schedule"], ""), n, d, c, "bfloat16"))
            if row["schedule"].startswith("floor") and floor:
                measured = 1e3 * sum(2.0 * n * d * c / got for got in floor)
            lines.append({
                "figure": f"{row['schedule']}, ms, N={n} D={d} C={c}", "predicted": row["predicted_ms"],
                "measured": measured,
            })  # fmt: skip
    for line in lines:
        measured = line["measured"]
        line["measured_over_predicted"] = None if measured is None else measured / line["predicted"]
    return lines


KERNELS = {
    "prepare_kernel": ("prepare_rows",), "tile_kernel": ("reduce_chunk", "weigh_chunk"),
    "finish_kernel": ("finish_rows",), "products": ("products",),
}  # fmt: skip


def kernel_figures(gate: Gate, gpu: Gpu) -> list[dict[str, Any]]:
    """Of the profile: our kernels by their names, and all of the library's as the products."""
    rows = gate.result("profile") or []
    if gate.dry or not rows:
        return []
    n, d, c = (rows[0][name] for name in ("N", "D", "C"))
    found = dict.fromkeys(KERNELS, 0.0)
    for row in rows:
        library = any(word in row["what"] for word in ("nvjet", "gemm", "cublas", "cutlass", "Cijk"))
        name = "products" if library else row["what"]
        if name in found:
            found[name] += row["microseconds"] / 1e3
    parts = kernels.step_parts(gpu, rows[0]["dtype"], n, d, c)
    return [
        {"figure": f"{name} of a step, ms, N={n} D={d} C={c}",
         "predicted": 1e3 * sum(parts[part] for part in KERNELS[name]), "measured": taken}
        for name, taken in found.items()
    ]  # fmt: skip


STEPS: dict[str, Callable[[Gate], Any]] = {
    "environment": environment, "tests": tests, "errors": errors, "rate": rate, "profile": profile,
    "chunks": chunks, "speed": speed, "table": table, "search": search, "verdict": verdict, "other_tests": other_tests,
}  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------


def page(state: dict[str, Any]) -> str:
    """All of it on one page."""
    parts = []
    if state["dry_run"]:
        parts.append("<p><b>A dry run: no GPU was there, no number of it says anything.</b></p>")
    for name, step in state["steps"].items():
        parts.append(f"<h2>{html.escape(name)}: {html.escape(step['status'])}</h2>")
        if "error" in step:
            parts.append(f"<pre>{html.escape(step['error'])}</pre>")
        result = step.get("result")
        if isinstance(result, list):
            parts.append(
                pd.DataFrame(result).to_html(index=False, na_rep="", float_format=lambda value: f"{value:.4g}")
            )
        elif isinstance(result, dict):
            parts.append(pd.Series(result).to_frame("").to_html())
    style = """
        body { font: 15px sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color-scheme: light dark }
        table { border-collapse: collapse; display: block; overflow-x: auto }
        td, th { padding: .2em .6em; border: 1px solid #8888 }
    """
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><style>{style}</style>"
    body = f"<body><h1>GPU gate</h1>{''.join(parts)}</body>"
    return f"<!doctype html><html lang='en'><head>{head}<title>GPU gate</title></head>{body}</html>"


def judge(out: Path) -> bool:
    """The verdict on what an earlier run measured, by the predictions of today: it needs no GPU."""
    if not (out / "gate.json").exists():
        raise ValueError(f"{out} holds no gate.json")
    gate = Gate(out, dry=False, minutes=1.0)
    gate.step("verdict")
    return bool(gate.state["steps"]["verdict"]["status"] == "done")


@contextmanager
def played() -> Iterator[None]:
    """ttsem in the GPU's place."""
    from ttsem import harness, sanitize

    parse, capturing = harness.mlir.parse, torch.cuda.is_current_stream_capturing
    harness.mlir.parse = functools.lru_cache(maxsize=1000)(parse)  # a launch like an earlier one is parsed once
    torch.cuda.is_current_stream_capturing = lambda: False  # it has no graphs
    try:
        with sanitize.session(cc=90):
            yield
    finally:
        harness.mlir.parse, torch.cuda.is_current_stream_capturing = parse, capturing


def run(out: Path, dry: bool, minutes: float, say: Callable[[str], Any] = print) -> bool:
    if not dry and not torch.cuda.is_available():
        raise ValueError("there is no GPU here; --dry-run shows that the gate works")
    if not dry:
        return Gate(out, dry, minutes, say, apart=True).run()
    with played():  # no GPU's state could break: one process for all steps
        return Gate(out, dry, minutes, say).run()


def only(out: Path, dry: bool, minutes: float, name: str) -> None:
    """One step, in this process."""
    with played() if dry else nullcontext():
        Gate(out, dry, minutes, functools.partial(print, flush=True)).step(name)
