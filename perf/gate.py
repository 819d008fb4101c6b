"""`python -m perf gate --out DIR`: what a person with a GPU for ten minutes runs.

Steps in order, each with what it found written at once; no step begins after the time is up. One that has not come to
its end is partial: the next run does it again, and measures the rows that are missing. A step that fails is a result
too. Steps that work on the GPU have a process each: a kernel that breaks it stops no other step. `--dry-run` runs every
step on this machine without a GPU, at tiny sizes: our kernels executed by ttsem, peers on the CPU, a search among two
tiles. What ttsem does not play fails there, in a row that says so: CUDA graphs, torch.compile. Its numbers say nothing,
it shows that the gate works.

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
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

import tritonmargin as tm
from perf import kernels, machine, static, tune
from perf.clock import synchronise
from perf.compiled import DTYPES, multiplying
from perf.gate_speed import GRAPH, SIZES, alone, median, one, replayed, speed, table
from perf.gpus import Gpu, card
from perf.played import played
from perf.problem import Problem, Tensors
from perf.providers import make
from perf.providers.base import STEP
from perf.results import replace
from perf.rows import UP, measured
from tritonmargin.kernels import tiles

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("errors", "speed", "table", "search", "verdict")
PLAYED = ("ours", "ours-retain", "ours-in-backward", "ours-sampled")  # by the kernels, in a dry run too
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
        """What a step has so far, without the page: it takes longer than a row of hundreds."""
        self.state["steps"][name] = {"status": "partial", "result": rows}
        self.save_state()
        self.save_rows(name)

    def result(self, name: str) -> Any:
        return self.state["steps"].get(name, {}).get("result")

    def save(self) -> None:
        self.save_state()
        for name in TABLES:
            self.save_rows(name)
        (self.out / "gate.html").write_text(page(self.state))

    def save_state(self) -> None:
        replace(self.out / "gate.json", json.dumps(self.state, indent=1).encode() + b"\n")

    def save_rows(self, name: str) -> None:
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
