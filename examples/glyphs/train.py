"""Training that may be killed at any moment: all it depends on is in the checkpoint or follows from the step."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import tritonmargin as tm
from examples.glyphs.data import Batches
from examples.glyphs.network import EMBEDDING_DIM, GlyphNet, autocast
from examples.glyphs.recipes import Recipe, Settings

CHECKPOINT, PLATEAU = "checkpoint.pt", "plateau.pt"
RETAINED = 64 << 20  # bytes of logits the head may keep from forward to backward


class Interrupted(Exception):
    """Stopped by a signal, after the checkpoint was written."""


@dataclass
class Run:
    """The state of a training run."""

    settings: Settings
    network: GlyphNet
    head: tm.MarginSoftmaxLoss
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0  # of training, without checkpoints and set-up
    plateau_saved: bool = False
    curves: dict[str, list[float]] | None = None

    @classmethod
    def start(cls, settings: Settings) -> Run:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # both losses start from the same network
            network = GlyphNet()
            head = tm.MarginSoftmaxLoss(
                EMBEDDING_DIM, settings.classes, settings.recipe.margin(settings.loss), retain_bytes=RETAINED
            )
        optimizer = make_optimizer(network, head, settings.recipe)
        return cls(settings, network, head, optimizer, curves={name: [] for name in CURVES})

    def state(self) -> dict[str, object]:
        return {
            "settings": asdict(self.settings),
            "network": self.network.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,  # also the position in the data and in the margin's warm-up
            "seconds": self.seconds,
            "plateau_saved": self.plateau_saved,
            "curves": self.curves,
        }

    def load(self, path: Path, other_budget: bool = False) -> None:
        """Go on from a checkpoint; SystemExit if it was made with other settings (budgets may differ if asked)."""
        state = torch.load(path, weights_only=True)
        found, mine = dict(state["settings"]), asdict(self.settings)
        changed = [name for name in mine if found.get(name) != mine[name] and not (other_budget and name == "budget")]
        if changed:
            told = ", ".join(f"{name} {found.get(name)} (now {mine[name]})" for name in changed)
            raise SystemExit(f"{path} was written with other settings: {told}; --fresh begins again")
        self.network.load_state_dict(state["network"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.curves = state["step"], state["seconds"], state["curves"]
        self.plateau_saved = state["plateau_saved"]


CURVES = ("step", "seconds", "loss", "accuracy", "angle", "hardest_angle", "margin", "rate")


def make_optimizer(network: nn.Module, head: nn.Module | None, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of the network and, unless it has an optimiser of its own, the head."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": others, "lr": recipe.lr, "weight_decay": 0.0},
    ]
    if head is not None:
        head_group = {"lr": recipe.head_lr, "weight_decay": recipe.head_weight_decay}
        groups.append({"params": list(head.parameters()), **head_group})
    for group in groups:
        group["base_lr"] = group["lr"]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(settings: Settings, batches: Batches, folder: Path, interval: float = 15.0, begin: Path | None = None) -> Run:
    """Train until the budget is used up, or go on with the run that `folder` holds.

    Args:
        folder: where the checkpoint is, or will be.
        interval: seconds between checkpoints, so the most that a kill can cost.
        begin: start from this checkpoint of a run that differs in nothing but the budget.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run, checkpoint = Run.start(settings), folder / CHECKPOINT
    if checkpoint.exists():
        run.load(checkpoint)
    elif begin is not None:
        run.load(begin, other_budget=True)
    budget = settings.budget
    written = time.monotonic()
    with stopped_by_signals() as stopped, progress_bar(run) as bar:
        while budget.progress(run.step, run.seconds) < 1.0:
            if not run.plateau_saved and 1.0 - budget.progress(run.step, run.seconds) <= settings.decay:
                run.plateau_saved = True
                save(run, folder / PLATEAU)
            began = time.monotonic()
            numbers = train_step(run, *batches(run.step))
            run.seconds += time.monotonic() - began
            run.step += 1
            record(run, numbers)
            advance(bar, run)
            if time.monotonic() - written >= interval or stopped:
                save(run, checkpoint)
                written = time.monotonic()
            if stopped:
                raise Interrupted(f"{settings.loss} stopped after step {run.step}; its checkpoint is written")
    save(run, checkpoint)
    return run


def train_step(run: Run, pictures: Tensor, target: Tensor) -> dict[str, float]:
    rate = run.settings.rate(run.step, run.seconds)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * rate
    run.head.margin.schedule(run.step)
    watched = run.step % 10 == 0  # the accuracy costs a pass over the logits
    with autocast():
        embeddings = run.network(pictures)
        loss, *stats = as_tuple(run.head(embeddings, target, return_stats=watched))
    run.optimizer.zero_grad()
    loss.backward()
    numbers = {"loss": loss.item(), "rate": rate, "margin": float(getattr(run.head.margin, "m", 0.0))}
    with torch.no_grad():
        numbers["angle"] = mean_angle(embeddings, run.head.weight[target])
        if watched:
            numbers["accuracy"] = stats[0].correct.float().mean().item()
            numbers["hardest_angle"] = mean_angle(embeddings, run.head.weight[stats[0].hardest_class])
    run.optimizer.step()
    return numbers


def as_tuple(value: Tensor | tuple) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def mean_angle(x: Tensor, w: Tensor) -> float:  # [N, D], [N, D] -> degrees
    return math.degrees(F.cosine_similarity(x, w).clamp(-1.0, 1.0).acos().mean().item())


def record(run: Run, numbers: dict[str, float]) -> None:
    numbers |= {"step": run.step, "seconds": run.seconds}
    for name, values in run.curves.items():
        values.append(numbers.get(name, math.nan))


def save(run: Run, path: Path) -> None:
    """Write beside it and rename: a reader, or the next start, finds the old checkpoint or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(run.state(), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def stopped_by_signals() -> Iterator[list[int]]:
    """A list that a first Ctrl-C or SIGTERM puts its number into; the step under way is finished then."""
    received: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def progress_bar(run: Run) -> tqdm:
    budget = run.settings.budget
    if budget.steps is not None:
        return tqdm(total=budget.steps, initial=run.step, desc=run.settings.loss, unit="step")
    return tqdm(
        total=round(budget.seconds), initial=round(run.seconds), desc=run.settings.loss, unit="s",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s {postfix}",
    )  # fmt: skip


def advance(bar: tqdm, run: Run) -> None:
    now = run.step if run.settings.budget.steps is not None else run.seconds
    bar.update(min(now, bar.total) - bar.n)
    if run.step % 10 == 1 and run.curves is not None:
        bar.set_postfix_str(
            f"step {run.step}, loss {run.curves['loss'][-1]:.2f}, accuracy {run.curves['accuracy'][-1]:.3f}, "
            f"angle {run.curves['angle'][-1]:.0f} deg"
        )
