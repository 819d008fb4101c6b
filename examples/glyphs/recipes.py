"""What is trained and how: a recipe for each loss, and the table of what was tried before it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tritonmargin as tm


@dataclass(frozen=True)
class Recipe:
    """The settings that each loss has its own of."""

    optimizer: str  # "sgd" (Nesterov, momentum 0.9) or "adamw"
    lr: float  # of the network
    head_lr: float  # of the class weights
    s: float = 0.0
    m: float = 0.0
    margin_steps: int = 0  # the margin grows from 0 to m over so many steps
    weight_decay: float = 5e-4  # of the network's matrices
    head_weight_decay: float = 0.0

    def margin(self, loss: str) -> tm.Margin:
        if loss == "softmax":
            return tm.Softmax()
        margin = {"arcface": tm.ArcFace, "cosface": tm.CosFace}[loss](m=self.m, s=self.s)
        return margin.with_schedule(m=tm.WarmUp(0.0, self.m, self.margin_steps))


RECIPES = {
    "arcface": Recipe(optimizer="adamw", lr=4e-3, head_lr=2e-2, s=16.0, m=0.2, margin_steps=400),
    "cosface": Recipe(optimizer="adamw", lr=4e-3, head_lr=2e-2, s=16.0, m=0.15, margin_steps=400),  # not tuned
    "softmax": Recipe(optimizer="sgd", lr=0.2, head_lr=1.0),
}


@dataclass(frozen=True)
class Budget:
    """How long to train: in seconds of training time, or in steps. Progress runs from 0 to 1."""

    seconds: float | None = None
    steps: int | None = None

    def progress(self, step: int, seconds: float) -> float:
        return step / self.steps if self.steps is not None else seconds / self.seconds

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds / 60:g} minutes"


@dataclass(frozen=True)
class Settings:
    """Everything that a training run depends on. Runs with different settings live in different folders."""

    loss: str
    budget: Budget
    classes: int = 20_000
    scripts: tuple[str, ...] = ("han",)
    limit: int | None = None  # only the first code points of the scripts
    unseen: int = 6000
    batch: int = 256
    seed: int = 0
    warm_up: int = 50  # steps in which the learning rates grow
    decay: float = 0.3  # the last part of the budget, in which they fall to 0
    recipe: Recipe = field(default=None)  # type: ignore[assignment]  # default: the loss's own

    def __post_init__(self) -> None:
        if self.recipe is None:
            object.__setattr__(self, "recipe", RECIPES[self.loss])

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.loss}-{self.classes}-{str(self.budget).replace(' ', '-')}-{digest}"

    def rate(self, step: int, seconds: float) -> float:
        """Factor of the learning rates: a ramp, a plateau, and a straight line to 0.

        On the plateau nothing depends on the budget. That is what lets a finished run be taken up where its plateau
        ended and be given more steps, as if it had been planned so.
        """
        left = 1.0 - self.budget.progress(step, seconds)
        return max(0.0, min(1.0, (step + 1) / self.warm_up, left / self.decay))


TRIED = Path(__file__).with_name("tried.json")  # what the recipes were chosen from; `tune.py` writes it
