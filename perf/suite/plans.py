"""Which cases are measured: sizes x providers x modes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from perf.providers import class_of, split
from perf.providers.base import GRAPH, GRAPHS, MODES, STEP, WHOLE, WHOLE_GRAPH
from perf.suite.problem import DTYPES, LOSSES, Problem

BASELINE = "gemm"
SHORT = {"graph": GRAPH, "whole graph": WHOLE_GRAPH}  # modes without a comma, for the command line
PEERS = ("plain", "plain-compiled", "pml", "insightface", "torch-lce", "torch-lce-chunked", "torch-lce-rows64")
ON_GPU = ("liger", "cce", "quack")
OURS = ("ours", "ours-retain", "ours-in-backward", "ours-sampled")
EVERYONE = (*OURS, *PEERS, "plain-sampled")
COMMON = ("forward", STEP, WHOLE)

KEY = ["loss", "dtype", "N", "D", "C", "device", "provider", "mode"]
Row = dict[str, Any]


class Case(NamedTuple):
    problem: Problem
    provider: str
    mode: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What names the case in results, in the order of KEY."""
        p = self.problem
        return p.loss, p.dtype, p.n, p.d, p.classes, p.device, self.provider, self.mode

    @property
    def offered(self) -> bool:
        """Whether the provider has the loss, dtype and mode; one that needs what is not there is left in, to say so."""
        kind, p = class_of(self.provider), self.problem
        if not p.on_gpu and (p.dtype == "tf32" or self.mode in GRAPHS):
            return False
        return p.loss in kind.losses and p.dtype in kind.dtypes and self.mode in kind.modes


class Budget(NamedTuple):
    """How long a case may take."""

    most: int  # rounds
    seconds: float  # after which a case has no further round; three it always gets
    longest: float  # seconds of a step; a case that is predicted to take longer is left out and says so
    minutes: float = math.inf  # of the run; a size that would begin later is left to the next run, and says so

    def another(self, number: int, spent: float) -> bool:
        """Whether a case that has run for `spent` seconds takes part in round `number`, counted from 0."""
        return number < self.most and (number < 3 or spent < self.seconds)


@dataclass(frozen=True)
class Grid:
    """Every combination."""

    classes: tuple[int, ...] = (10_000, 100_000)
    dims: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (256,)
    dtypes: tuple[str, ...] = ("float32",)
    losses: tuple[str, ...] = ("arcface",)
    providers: tuple[str, ...] = EVERYONE
    modes: tuple[str, ...] = COMMON
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, known in (("losses", LOSSES), ("modes", MODES), ("dtypes", DTYPES.values())):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} are among {', '.join(known)}, got {value!r}")
        for name in ("classes", "dims", "batches"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def cases(self) -> list[Case]:
        every = itertools.product(self.losses, self.dtypes, self.dims, self.classes, self.batches)
        problems = [Problem(n, d, c, dtype, self.device, loss) for loss, dtype, d, c, n in every]
        cases = itertools.starmap(Case, itertools.product(problems, self.providers, self.modes))
        return [case for case in cases if case.offered]


def custom_grid(device: str = "cpu", **given: Any) -> Grid:
    """A grid from the command line: any fields of Grid, whose defaults stand for what is not given (or empty)."""
    short = {"dtypes": DTYPES, "modes": SHORT}
    given = {name: tuple(short.get(name, {}).get(v, v) for v in values) for name, values in given.items() if values}
    everyone = EVERYONE if device == "cpu" else (*EVERYONE, *ON_GPU)
    grid = Grid(**{"providers": everyone, **given}, device=device)
    for name in grid.providers:
        split(name)  # ValueError for one that does not exist
    able = tuple(name for name in grid.providers if replace(grid, providers=(name,)).cases())
    return grid if "providers" in given else replace(grid, providers=able or everyone)


class Plan(NamedTuple):
    grids: tuple[Grid, ...]
    budget: Budget
    in_order: bool = False  # as the grids are written, instead of small sizes first

    def on(self, device: str, heads: tuple[str, ...] = (), **limits: float | None) -> Plan:
        """The plan on a device, with `heads` and limits of its budget; sweeps of our settings are a CPU's alone."""
        grids = []
        for grid in self.grids:
            if device == "cpu" and grid.device != device:
                raise ValueError("this plan needs --device cuda")
            own = [name for name in grid.providers if grid.device == device or ":" not in name]
            grids.append(replace(grid, device=device, providers=tuple(dict.fromkeys([*own, *heads]))))
        budget = self.budget._replace(**{name: value for name, value in limits.items() if value is not None})
        return self._replace(grids=tuple(grids), budget=budget)

    def check(self) -> None:
        """ValueError for a provider that was chosen and can do nothing of what is asked, or if nobody can."""
        can = {case.provider for grid in self.grids for case in grid.cases()}
        for grid in self.grids:
            anyone = can and set(PEERS) <= set(grid.providers)  # those of them who can
            for name in [name for name in grid.providers if name not in can | set(EVERYONE if anyone else ())]:
                kind = class_of(name)
                has = {"--losses": kind.losses, "--dtype": kind.dtypes, "--modes": kind.modes}
                said = ", ".join(f"{option} {'|'.join(values)}" for option, values in has.items())
                hint = "; tf32 and CUDA graphs need a GPU, --device cuda" if grid.device == "cpu" else ""
                raise ValueError(f"{name} can do nothing of what is asked, it has {said}{hint}")

    def blocks(self) -> dict[Problem, list[Case]]:
        """The cases of a size together, small sizes first: what is known of them says what large ones will take."""
        cases = list(dict.fromkeys(case for grid in self.grids for case in grid.cases()))
        blocks: dict[Problem, list[Case]] = {}
        for case in cases if self.in_order else sorted(cases, key=lambda case: case.problem.flops):
            blocks.setdefault(case.problem, []).append(case)
        return blocks


BOTH = ("float32", "bfloat16")
# The effect of a setting, one at a time.
CHUNKS = tuple(f"ours:chunk_bytes={1 << power}" for power in range(18, 28, 2))
RETAINED = tuple(f"ours:retain={part}" for part in (0.25, 0.5, 0.75))
RATES = tuple(f"ours-sampled:rate={rate}" for rate in (0.01, 0.03, 0.3))
SWEEPS = Grid((100_000,), providers=("ours", *CHUNKS, *RETAINED, *RATES), modes=(WHOLE,))
LINEAR = Grid((10_000, 100_000, 300_000, 1_000_000), (128,), providers=("ours", "plain"), modes=(STEP,))
SOFTMAX = ("ours", "ours-in-backward", "plain", "torch-lce", "torch-lce-chunked", "torch-lce-rows64")
MANY = (10_000, 100_000, 1_000_000)
ALL = (*MANY, 4_000_000)
TARGETS = Grid((131_072,), (512,), (32, 256), BOTH, providers=("ours", "ours-retain", "plain", "pml"), modes=MODES)
LARGE_BATCH = Grid((32_768,), (512,), (2048,), BOTH, providers=("ours", "ours-retain", "plain"), modes=(STEP,))
OTHER_LOSSES = Grid((131_072,), (512,), (256,), BOTH, ("cosface", "arcface-straight-through"),
                    ("ours", "plain", "pml", "insightface"), (STEP,))  # fmt: skip


def face(*sizes: Any, compiled: tuple[str, ...] = ()) -> list[Grid]:
    """What a person with a GPU asks first."""
    return [
        Grid(*sizes, ("arcface",), ("ours",), (STEP, GRAPH), "cuda"),
        Grid(*sizes, ("arcface",), ("ours-retain", "plain", "pml", *compiled), (STEP,), "cuda"),
        Grid(*sizes, ("arcface",), ("ours-sampled",), (WHOLE, WHOLE_GRAPH), "cuda"),
        Grid(*sizes, ("arcface",), ("plain-sampled", "ours", "ours-in-backward", "plain"), (WHOLE,), "cuda"),
        Grid(*sizes, ("softmax",), ("ours",), (STEP, GRAPH), "cuda"),
        Grid(*sizes, ("softmax",), ("plain", "torch-lce", *ON_GPU, *compiled), (STEP,), "cuda"),
    ]


# Its first four sizes take about five minutes on an H200: torch.compile and the first compilation of every kernel are
# most of that, a step of ours takes 1 to 12 ms there.
BF16 = ("bfloat16",)
SIZES = (1_000_000, 100_000, 4_000_000, 10_000), (512, 128), (1024, 256, 32)
ON_H200 = (
    *face((100_000, 1_000_000), (512,), (1024,), BF16, compiled=("plain-compiled",)),
    *face((100_000,), (512,), (1024,), ("tf32", "float16", "float32")),
    Grid(*SIZES, BF16, ("arcface",), ("ours", "plain", "pml", "ours-in-backward"), ("forward", STEP, WHOLE), "cuda"),
    Grid(*SIZES, BF16, ("softmax",), ("ours", "plain", *ON_GPU), (STEP,), "cuda"),
    Grid(*SIZES, (*BF16, "float32"), ("arcface",), ("ours",), (STEP, GRAPH), "cuda"),
    Grid(*SIZES, ("float32",), ("arcface",), ("plain", "pml"), (STEP,), "cuda"),
)

PLANS = {
    "tiny": Plan((
        Grid((300, 2000), (16,), (8,), BOTH, ("arcface", "softmax"), (*EVERYONE, "ours:retain=0.5"), MODES),
    ), Budget(2, 0.0, 5.0)),
    "quick": Plan((
        Grid((10_000, 100_000), (128,), providers=("ours", "plain"), modes=(STEP,)),
        Grid((32_768,), (512,), (256,), ("bfloat16",), providers=("ours", "ours-retain", "plain"), modes=(STEP,)),
        Grid((131_072,), (512,), (32,), providers=("ours", "plain"), modes=(STEP,)),
        Grid((131_072,), (512,), (256,), losses=("softmax",), providers=("ours", "torch-lce"), modes=(STEP,)),
        Grid((131_072,), (512,), (256,), providers=("ours", "ours-retain", "plain"), modes=(STEP,)),
        Grid((131_072,), (512,), (256,), providers=("ours",), modes=("forward",)),
        Grid((131_072,), (512,), (256,), providers=("ours", "ours-in-backward", "ours-sampled"), modes=(WHOLE,)),
    ), Budget(5, 4.0, 6.0, minutes=2.5)),
    "default": Plan((
        TARGETS, LINEAR, SWEEPS, OTHER_LOSSES, LARGE_BATCH,
        Grid(MANY, (512,), (32, 256), BOTH,
             providers=("ours", "ours-in-backward", "ours-sampled", "plain", "plain-sampled")),
        Grid((131_072,), (512,), (256,), BOTH, ("softmax",), (*SOFTMAX, "ours-retain", "plain-compiled"), (STEP,)),
        Grid((10_000, 100_000, 131_072), (512,), (256,), BOTH, providers=("ours", "plain-compiled"), modes=(STEP,)),
    ), Budget(8, 3.0, 5.0, minutes=26.0)),
    # No public table of fused softmax cross-entropy has D = 512 and C >= 10^6.
    "full": Plan((
        TARGETS, LINEAR, SWEEPS, OTHER_LOSSES, LARGE_BATCH,
        Grid(ALL, (128, 512), (32, 256, 1024), BOTH),
        Grid(ALL, (128, 512), (32, 256, 1024), BOTH, ("arcface-straight-through",), ("ours", "insightface")),
        Grid(ALL, (128, 512), (32, 256, 1024), BOTH, ("softmax",), (*SOFTMAX, "plain-compiled")),
    ), Budget(15, 6.0, 10.0)),
    "gpu": Plan(ON_H200, Budget(5, 0.3, 2.0, minutes=30.0), in_order=True),
}  # fmt: skip
