"""Training with the classes split over the ranks of a process group, killed and resumed on any number of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import tritonmargin as tm
from examples.glyphs.data import Batches
from examples.glyphs.network import EMBEDDING_DIM, GlyphNet, autocast
from examples.glyphs.recipes import Settings
from examples.glyphs.synced import synced
from examples.glyphs.train import RETAINED, Interrupted, make_optimizer, stopped_by_signals


@dataclass
class Run:
    """The state of a run on one rank: the whole network, and the rows of its classes.

    Without a group the same run in one process. `progress` holds what a resumed run goes on from: the step, the
    seconds of training, the last losses, and for every start so far its step and its number of ranks.
    """

    settings: Settings
    group: dist.ProcessGroup | None
    network: GlyphNet
    model: nn.Module  # the network, in DistributedDataParallel if there are ranks
    head: tm.MarginSoftmaxLoss
    optimizer: torch.optim.Optimizer  # of the network
    rows: tm.optim.RowAdamW  # of the head
    progress: dict[str, Any] = field(default_factory=lambda: {"step": 0, "seconds": 0.0, "losses": [], "starts": []})

    @classmethod
    def start(cls, settings: Settings, sample_rate: float, group: dist.ProcessGroup | None) -> Run:
        recipe = settings.recipe
        torch.manual_seed(settings.seed)  # the same network on all ranks; the head draws its own rows on each
        network = GlyphNet()
        head = tm.MarginSoftmaxLoss(
            EMBEDDING_DIM, settings.classes, recipe.margin(settings.loss), sample_rate=sample_rate, sparse_grad=True,
            retain_bytes=RETAINED, process_group=group, on_nonfinite="raise", seed=settings.seed,
        )  # fmt: skip
        rows = tm.optim.RowAdamW(
            head.parameters(), lr=recipe.head_lr, betas=(0.9, 0.98), weight_decay=recipe.head_weight_decay
        )
        head.update_in_backward(rows)
        optimizer = make_optimizer(network, None, recipe)
        # Without the option, DistributedDataParallel orders the gradients anew after the first step of a process, and
        # three or more ranks then add them up in another order after a restart than without one.
        model = network
        if group is not None:
            # A group of its own: its exchanges come between those of DistributedDataParallel.
            synced(network, dist.new_group(dist.get_process_group_ranks(group)))
            model = DistributedDataParallel(network, find_unused_parameters=True)
        return cls(settings, group, network, model, head, optimizer, rows)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def state(self) -> dict[str, Any]:
        return {
            "head": self.head.state_dict(),
            "rows": self.rows.state_dict(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": self.progress,
        }

    def load(self, folder: Path) -> bool:
        """Go on from the newest checkpoint, if there is one, of whatever number of ranks."""
        make_state(self.optimizer)
        state = self.state()
        if tm.checkpoint.load(folder, state, group=self.group) is None:
            return False
        self.head.load_state_dict(state["head"])
        self.rows.load_state_dict(state["rows"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        return True

    def save(self, folder: Path) -> None:
        tm.checkpoint.save(folder, self.state(), self.progress["step"], group=self.group)


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """A step that moves nothing: torch's optimisers have no tensors to load a checkpoint into before their first."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # every training step sets it
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def train(run: Run, batches: Batches, folder: Path, interval: float = 15.0, every: int | None = None) -> None:
    """Train until the budget is used up, or go on with the run that `folder` holds.

    Args:
        folder: of the checkpoints.
        interval: seconds between checkpoints, by the clock of rank 0.
        every: write a checkpoint after so many steps instead.

    Raises:
        Interrupted: rank 0 was stopped by a signal; the checkpoint is written.
    """
    run.load(folder)
    progress, steps = run.progress, run.settings.budget.steps
    if progress["step"] < steps:
        progress["starts"].append([progress["step"], run.world_size])
    written = time.monotonic()
    with (
        stopped_by_signals() as stopped,
        tqdm(total=steps, initial=progress["step"], unit="step", disable=run.rank > 0) as bar,
    ):
        while progress["step"] < steps:
            began = time.monotonic()
            loss = train_step(run, *batches(progress["step"]))
            now = time.monotonic()
            progress["step"] += 1
            progress["losses"] = [*progress["losses"], loss][-20:]
            due = progress["step"] % every == 0 if every else now - written >= interval
            # All ranks have to do the same, so rank 0's clock and signals count.
            seconds, save, stop = agreed(run.group, progress["seconds"] + now - began, due, bool(stopped))
            progress["seconds"] = seconds
            bar.update()
            bar.set_postfix(loss=loss, refresh=False)
            if save or stop or progress["step"] == steps:
                run.save(folder)
                written = time.monotonic()
            if stop:
                raise Interrupted(f"stopped after step {progress['step']}; its checkpoint is written")


def train_step(run: Run, pictures: Tensor, target: Tensor) -> float:
    """One step with this rank's part of the global batch; the loss of all of it."""
    step, head = run.progress["step"], run.head
    rate = run.settings.rate(step, 0.0)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * rate
    for group in run.rows.param_groups:
        group["lr"] = run.settings.recipe.head_lr * rate
    head.margin.schedule(step)
    with autocast():
        loss = head(run.model(own_part(pictures, run)), own_part(target, run))
    run.optimizer.zero_grad()
    loss.backward()  # updates the head's rows
    run.rows.step()
    run.optimizer.step()
    return loss.item()


def own_part(batch: Tensor, run: Run) -> Tensor:
    return batch.tensor_split(run.world_size)[run.rank]


def agreed(group: dist.ProcessGroup | None, *values: float) -> list[float]:
    """What rank 0 says, on all ranks."""
    numbers = torch.tensor(values, dtype=torch.float64)
    if group is not None:
        dist.broadcast(numbers, src=dist.get_global_rank(group, 0), group=group)
    return numbers.tolist()
