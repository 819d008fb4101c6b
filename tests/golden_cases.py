"""200 random cases of all options, and what a commit made of them: the losses and gradients that later code is held to.

    python tests/golden_cases.py

draws the cases and writes tests/golden/cases.npz: each case as its options and a seed, from which its inputs are made
again, and its loss, gradients and statistics, bit by bit. The file is made by the code before a change, never by the
code that it judges. It names its commit and its machine: another CPU sums in another order.
"""

from __future__ import annotations

import io
import json
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import DEVICE, using
from torch import Tensor

import tritonmargin as tm
from tritonmargin.margins import MARGINS
from tritonmargin.objectives import OBJECTIVES

FILE = Path(__file__).parent / "golden" / "cases.npz"
CASES = 200
STATS = ("target_logit", "rest_logsumexp", "hardest_class", "hardest_logit", "correct")


@dataclass(frozen=True)
class Case:
    """A call, all that its inputs are made from."""

    seed: int
    n: int
    d: int
    c: int
    margin: str
    numbers: dict[str, Any]  # the margin's
    objective: str
    reduction: str
    x_dtype: str
    w_dtype: str
    autocast: str | None
    bias: bool
    walked: float | None  # fraction of the classes beside the targets in class_ids; None: no class_ids
    class_weight: bool
    ignored: int  # samples
    ignore_index: int
    label_smoothing: float
    logq_correction: bool
    sparse_grad: bool
    retain_bytes: int
    chunk_bytes: int | None
    return_stats: bool
    strided: bool
    frozen: str | None  # "x" or "w" has no gradient

    def __str__(self) -> str:
        told = [f"{self.seed}", self.margin, self.objective, self.reduction, self.x_dtype, self.w_dtype]
        return "-".join(told + ([f"autocast {self.autocast}"] if self.autocast else []))

    @property
    def compute(self) -> torch.dtype:
        """Of the products."""
        common = torch.promote_types(getattr(torch, self.x_dtype), getattr(torch, self.w_dtype))
        return common if self.autocast is None or common == torch.float64 else getattr(torch, self.autocast)


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # [N, D]
    w: Tensor  # [C, D]
    y: Tensor  # [N]
    upstream: Tensor  # [N]
    bias: Tensor | None  # [C]
    class_weight: Tensor | None  # [C]
    class_ids: Tensor | None  # [S]


# -- cases and their inputs ------------------------------------------------------------------------------------------


def margin_numbers(name: str, rng: random.Random) -> dict[str, Any]:
    """What the margin is made with."""
    s = rng.choice([4.0, 16.0, 30.0, 64.0, 150.0])  # the last one is beyond the bounded path
    gradient = rng.choice(["exact", "exact", "straight-through"])
    beyond_pi = rng.choice(["cos-mm", "continuous", "raw", "easy", "clip"])
    angular = {"s": s, "gradient": gradient, "beyond_pi": beyond_pi}
    return {
        "Softmax": {},
        "L2Softmax": {"s": min(s, 30.0)},
        "NormFace": {"s": s},
        "LSoftmax": {"m": rng.choice([1, 2, 3, 4]), "lam": rng.choice([0.0, 1.0, 5.0])},
        "ASoftmax": {"m": rng.choice([2, 3, 4]), "lam": rng.choice([0.0, 1.0, 5.0])},
        "SphereFaceR": {"m": rng.choice([1.4, 1.7, 2.5]), "s": s, "gradient": gradient},
        "CosFace": {"m": rng.choice([0.1, 0.35]), "s": s},
        "ArcFace": {"m": rng.choice([0.2, 0.5, 0.9])} | angular,
        "CombinedMargin": {"m1": rng.choice([0.9, 1.0, 1.3]), "m2": rng.choice([0.0, 0.3]), "m3": 0.1} | angular,
    }[name]


def drawn(index: int, attempt: int) -> Case:
    """Every margin under every objective in turn, the rest at random."""
    seed = 1000 * index + attempt
    rng = random.Random(seed)

    def often(share: float) -> bool:
        return rng.random() < share

    name = list(MARGINS)[index % len(MARGINS)]
    objective = list(OBJECTIVES)[index // len(MARGINS) % len(OBJECTIVES)]
    halves = ["bfloat16", "float16"]
    x_dtype = rng.choice(["float32"] * 6 + ["float64", *halves])
    w_dtype = x_dtype if often(0.8) else rng.choice(["float32", "float64", *halves])
    c = rng.choice([1, 2, 5, 33, 64, 65, 65, 100, 129, 129, 150, 257])
    n = rng.choice([1, 2, 3, 5, 8, 20])
    smoothing = rng.choice([0.1, 0.3, 1.0]) if objective == "softmax" and often(0.35) else 0.0
    walked = rng.choice([0.0, 0.3, 0.7]) if often(0.4) else None
    corrected = bool(walked) and c > 30 and objective in ("softmax", "lse-hinge") and not smoothing
    return Case(
        seed=seed, n=n, d=rng.choice([2, 3, 4, 5, 7, 8, 9, 17]), c=c, margin=name, numbers=margin_numbers(name, rng),
        objective=objective, reduction=rng.choice(["mean", "sum", "none"]), x_dtype=x_dtype, w_dtype=w_dtype,
        autocast="bfloat16" if often(0.15) else None, bias=often(0.3), walked=walked, class_weight=often(0.3),
        ignored=rng.randrange(n) if often(0.4) else 0, ignore_index=rng.choice([-100, -1, c + 3]),
        label_smoothing=smoothing, logq_correction=corrected and often(0.6), sparse_grad=often(0.3),
        retain_bytes=rng.choice([0, 0, 64 * n * 4, 10**6]), chunk_bytes=rng.choice([None, 1, 1, 20_000]),
        return_stats=often(0.3), strided=often(0.25), frozen=rng.choice(["x", "w"]) if often(0.2) else None,
    )  # fmt: skip


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every second element of a larger buffer, a matrix the other way round in memory."""
    turned = tensor.t()
    return torch.stack([turned, turned], dim=-1)[..., 0].t()


def inputs(case: Case) -> Inputs:
    """On the CPU from the case's seed, then on the machine of this run."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def put(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        tensor = tensor.to(dtype or tensor.dtype).to(DEVICE)
        return strided(tensor) if case.strided else tensor

    margin = MARGINS[case.margin](**case.numbers)
    x, w = normal(case.n, case.d), normal(case.c, case.d)
    if not margin.unit_weight:
        w = w / case.d**0.5  # logits that a network has
    upstream, bias, class_weight = normal(case.n), normal(case.c), normal(case.c).abs() + 0.1
    y = torch.randint(case.c, (case.n,), generator=generator, device="cpu")
    class_ids = None
    if case.walked is not None:
        others = torch.rand(case.c, generator=generator, device="cpu") < case.walked
        others[y] = True
        class_ids = others.nonzero().squeeze(1)
    y[: case.ignored] = case.ignore_index
    of_x, of_w = getattr(torch, case.x_dtype), getattr(torch, case.w_dtype)
    return Inputs(
        x=put(x, of_x), w=put(w, of_w), y=put(y), upstream=put(upstream), bias=put(bias, of_w) if case.bias else None,
        class_weight=put(class_weight, of_w) if case.class_weight else None,
        class_ids=None if class_ids is None else class_ids.to(DEVICE),
    )  # fmt: skip


def is_steady(case: Case) -> bool:
    """No target's angle near the ends, where arccos has no slope, or near a jump of the margin."""
    given, margin = inputs(case), MARGINS[case.margin](**case.numbers)
    valid = given.y != case.ignore_index
    x, w = given.x[valid].double(), given.w[given.y[valid]].double()
    cos = torch.nn.functional.cosine_similarity(x, w, dim=1)
    m1, m2 = float(getattr(margin, "m1", 1.0)), float(getattr(margin, "m2", getattr(margin, "m", 0.0)))
    jumps = [(torch.pi - m2) / m1] if "beyond_pi" in case.numbers else []
    jumps += [torch.pi / 2] if jumps and case.numbers["beyond_pi"] == "easy" else []
    far = all(((cos.arccos() - jump).abs() > 0.05).all() for jump in jumps)
    return bool((cos.abs() < 0.95).all()) and far


def draw_cases() -> list[Case]:
    found = []
    for index in range(CASES):
        attempts = (drawn(index, attempt) for attempt in range(1000))
        found.append(next(case for case in attempts if is_steady(case)))
    return found


# -- results -----------------------------------------------------------------------------------------------------


Loss = Callable[..., Any]


def results(case: Case, given: Inputs, loss: Loss = tm.margin_cross_entropy, backend: str | None = None) -> dict:
    """The loss, its gradients and, if the case asks for them, the statistics by name."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in (("x", given.x), ("w", given.w), ("bias", given.bias))
        if tensor is not None and name != case.frozen
    }
    taken = {"x": given.x, "w": given.w, "bias": given.bias} | leaves
    autocast = getattr(torch, case.autocast or "bfloat16")
    with using(backend), torch.autocast(DEVICE, autocast, enabled=case.autocast is not None):
        found = loss(
            taken["x"], taken["w"], given.y, MARGINS[case.margin](**case.numbers), bias=taken["bias"],
            class_ids=given.class_ids, class_weight=given.class_weight, ignore_index=case.ignore_index,
            label_smoothing=case.label_smoothing, reduction=case.reduction, objective=case.objective,
            sparse_grad=case.sparse_grad, retain_bytes=case.retain_bytes, chunk_bytes=case.chunk_bytes,
            return_stats=case.return_stats, logq_correction=case.logq_correction,
        )  # fmt: skip
    value, stats = found if case.return_stats else (found, None)
    upstream = given.upstream.to(value.dtype) if value.ndim else torch.full((), 1.5, dtype=value.dtype).to(value.device)
    grads = torch.autograd.grad(value, list(leaves.values()), upstream)
    named = {f"d{name}": grad.to_dense() for name, grad in zip(leaves, grads, strict=True)}
    told = {} if stats is None else {name: getattr(stats, name) for name in STATS}
    return {"loss": value.detach(), **named, **told}


# -- the file ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What decides the order of sums on a CPU."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu_model(),
    }


def cpu_model() -> str:
    """Vendor, family, model and name, as Linux tells them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    wanted = ("vendor_id", "cpu family", "model", "model name")
    return ", ".join(known[name] for name in wanted if name in known) or platform.machine()


def commit() -> str:
    """That the working tree is at."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=FILE.parents[1], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(cases: list[Case], found: list[dict[str, Tensor]]) -> bytes:
    layout = [
        [[name, str(each.dtype).removeprefix("torch."), list(each.shape)] for name, each in row.items()]
        for row in found
    ]
    told = {"commit": commit(), "machine": machine(), "cases": [asdict(case) for case in cases], "layout": layout}
    file = io.BytesIO()
    np.savez_compressed(
        file,
        told=np.frombuffer(json.dumps(told).encode(), dtype=np.uint8),
        numbers=np.frombuffer(b"".join(as_bytes(each) for row in found for each in row.values()), dtype=np.uint8),
    )
    return file.getvalue()


def load() -> tuple[dict[str, str], list[tuple[Case, dict[str, Tensor]]]]:
    """The machine of the file, and its cases with what they gave."""
    with np.load(FILE, allow_pickle=False) as file:
        told, numbers = json.loads(file["told"].tobytes()), file["numbers"].tobytes()
    start, rows = 0, []
    for case, layout in zip(told["cases"], told["layout"], strict=True):
        row = {}
        for name, dtype, shape in layout:
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            stop = start + empty.numel() * empty.itemsize
            part = torch.frombuffer(bytearray(numbers[start:stop]), dtype=empty.dtype) if stop > start else empty
            row[name], start = part.reshape(shape), stop
        rows.append((Case(**case), row))
    assert start == len(numbers)
    return told["machine"], rows


def main() -> None:
    torch.set_num_threads(1)
    cases = draw_cases()
    content = save(cases, [results(case, inputs(case), backend="torch") for case in cases])
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(content)
    sys.stdout.write(f"{len(cases)} cases, {len(content)} bytes, {machine()}\n")


if __name__ == "__main__":
    main()
