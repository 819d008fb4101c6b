"""Which cases are measured: sizes x providers x modes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from perf.problem import LOSSES, Problem
from perf.providers import class_of
from perf.providers.base import MODES, STEP, WHOLE

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
YARDSTICK = "gemm"
PEERS = ("plain", "plain-compiled", "pml", "insightface", "torch-lce", "torch-lce-chunked", "torch-lce-rows64")
ON_GPU = ("ours-torch", "liger", "cce", "quack")
OURS = ("ours", "ours-retain", "ours-in-backward", "ours-sampled", "ours-sharded")
EVERYONE = (*OURS, *PEERS, "plain-sampled")
COMMON = ("forward", STEP, WHOLE)


def offers(name: str, loss: str, mode: str) -> bool:
    """Whether a provider has the loss and the mode; one that is not installed is left in, to say so."""
    kind = class_of(name)
    return kind is None or (loss in kind.losses and mode in kind.modes)


class Case(NamedTuple):
    problem: Problem
    provider: str
    mode: str


class Budget(NamedTuple):
    """How long a case may take."""

    rounds: int  # at least that many rounds ...
    most: int  # ... and at most that many;
    seconds: float  # between the two, none begins after a case has run that long
    longest: float  # seconds of a step; a case that is predicted to take longer is left out and says so
    patience: float = math.inf  # seconds that a case may run for the rounds that it gets at least; three it always gets
    minutes: float = math.inf  # of the run; a size that would begin later is left to the next run, and says so

    @property
    def words(self) -> str:
        words = f"at least {self.rounds} rounds, 3 for long steps, steps of at most {self.longest:g} s"
        return words + (f", {self.minutes:g} minutes" if math.isfinite(self.minutes) else "")

    def another(self, number: int, spent: float) -> bool:
        """Whether a case that has run for `spent` seconds takes part in round `number`, counted from 0."""
        if number < self.rounds:
            return number < 3 or spent < self.patience
        return spent < self.seconds


@dataclass(frozen=True)
class Grid:
    """Every combination."""

    classes: tuple[int, ...]
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
        problems = [
            Problem(n, d, c, dtype, self.device, loss)
            for loss in self.losses for dtype in self.dtypes for d in self.dims for c in self.classes
            for n in self.batches
        ]  # fmt: skip
        return [
            Case(problem, name, mode)
            for problem in problems
            for name in self.providers
            for mode in self.modes
            if offers(name, problem.loss, mode)
        ]


class Plan(NamedTuple):
    grids: tuple[Grid, ...]
    budget: Budget

    def on(self, device: str, others: bool = True) -> Plan:
        """The plan on another device, with those that run there alone, unless somebody chose who runs."""
        peers = ON_GPU if device != "cpu" and others else ()
        return self._replace(
            grids=tuple(replace(grid, device=device, providers=(*grid.providers, *peers)) for grid in self.grids)
        )

    def blocks(self) -> dict[Problem, list[Case]]:
        """The cases of a size together, small sizes first: what is known of them says what large ones will take."""
        cases = dict.fromkeys(case for grid in self.grids for case in grid.cases())
        blocks: dict[Problem, list[Case]] = {}
        for case in sorted(cases, key=lambda case: case.problem.flops):
            blocks.setdefault(case.problem, []).append(case)
        return blocks


BOTH = ("float32", "bfloat16")
# The effect of a setting, one at a time.
CHUNKS = tuple(f"ours:chunk_bytes={1 << power}" for power in range(18, 28, 2))
KEPT = tuple(f"ours:retain={part}" for part in (0.25, 0.5, 0.75))
RATES = tuple(f"ours-sampled:rate={rate}" for rate in (0.01, 0.03, 0.3))
RANKS = ("ours-sharded", *(f"ours-sharded:ranks={ranks}" for ranks in (1, 3, 4)))  # itself: two
SWEEPS = Grid((100_000,), providers=("ours", *CHUNKS, *KEPT, *RATES, *RANKS), modes=(WHOLE,))
LINEAR = Grid((10_000, 100_000, 300_000, 1_000_000), (128,), providers=("ours", "plain"), modes=(STEP,))
SOFTMAX = ("ours", "ours-in-backward", "plain", "torch-lce", "torch-lce-chunked", "torch-lce-rows64")
MANY = (10_000, 100_000, 1_000_000)
ALL = (*MANY, 4_000_000)
# The rows that promise something, in every mode.
PROMISED = Grid((131_072,), (512,), (32, 256), BOTH, providers=("ours", "ours-retain", "plain", "pml"), modes=MODES)
LARGE_BATCH = Grid((32_768,), (512,), (2048,), BOTH, providers=("ours", "ours-retain", "plain"), modes=(STEP,))
OTHER_LOSSES = Grid((131_072,), (512,), (256,), BOTH, ("cosface", "arcface-straight-through"),
                    ("ours", "plain", "pml", "insightface"), (STEP,))  # fmt: skip

PLANS = {
    "tiny": Plan(
        (Grid((300, 2000), (16,), (8,), BOTH, ("arcface", "softmax"), (*EVERYONE, "ours:retain=0.5"), MODES),),
        Budget(2, 2, 0.0, 5.0),
    ),
    "quick": Plan(
        (
            Grid((10_000, 100_000), (128,), providers=("ours", "plain"), modes=(STEP,)),
            Grid((32_768,), (512,), (256,), ("bfloat16",), providers=("ours", "ours-retain", "plain"), modes=(STEP,)),
            Grid((131_072,), (512,), (32,), providers=("ours", "plain"), modes=(STEP,)),
            Grid((131_072,), (512,), (256,), losses=("softmax",), providers=("ours", "torch-lce"), modes=(STEP,)),
            Grid((131_072,), (512,), (256,), providers=("ours", "ours-retain", "plain"), modes=(STEP,)),
            Grid((131_072,), (512,), (256,), providers=("ours",), modes=("forward",)),
            Grid((131_072,), (512,), (256,), providers=("ours", "ours-in-backward", "ours-sampled"), modes=(WHOLE,)),
        ),
        Budget(5, 5, 0.0, 6.0, patience=4.0, minutes=2.5),
    ),
    "default": Plan(
        (
            PROMISED, LINEAR, SWEEPS, OTHER_LOSSES, LARGE_BATCH,
            Grid(MANY, (512,), (32, 256), BOTH,
                 providers=("ours", "ours-in-backward", "ours-sampled", "plain", "plain-sampled")),
            Grid((131_072,), (512,), (256,), BOTH, ("softmax",), (*SOFTMAX, "ours-retain", "plain-compiled"), (STEP,)),
            Grid((10_000, 100_000), (512,), (256,), BOTH, providers=("ours", "plain-compiled"), modes=(STEP,)),
        ),
        Budget(5, 8, 1.0, 5.0, patience=6.0, minutes=26.0),
    ),
    # No public table of fused softmax cross-entropy has D = 512 and C >= 10^6.
    "full": Plan(
        (
            PROMISED, LINEAR, SWEEPS, OTHER_LOSSES, LARGE_BATCH,
            Grid(ALL, (128, 512), (32, 256, 1024), BOTH),
            Grid(ALL, (128, 512), (32, 256, 1024), BOTH, ("arcface-straight-through",), ("ours", "insightface")),
            Grid(ALL, (128, 512), (32, 256, 1024), BOTH, ("softmax",), (*SOFTMAX, "plain-compiled")),
        ),
        Budget(5, 15, 1.0, 10.0, patience=12.0),
    ),
}  # fmt: skip
