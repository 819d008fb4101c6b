"""The first checkpoint, while a rank is dead or has an error of its own: the others hear of it in time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cpu_only
from ranks import on_ranks
from sharded import D

import tritonmargin as tm
from tritonmargin.checkpoint import CheckpointError
from tritonmargin.distributed import agreement

pytestmark = cpu_only

SECONDS = 4.0  # the group's timeout


def made(group: dist.ProcessGroup | None = None) -> tm.MarginSoftmaxLoss:
    return tm.MarginSoftmaxLoss(D, 10, process_group=dist.group.WORLD if group is None else group)


def calls(folder: Path, head: tm.MarginSoftmaxLoss, group: Any = None) -> dict[str, Callable[..., Any]]:
    """Each takes arguments that replace its own."""

    def call(function: Callable[..., Any], **own: Any) -> Callable[..., Any]:
        return lambda **other: function(**(own | other))

    return {
        "save": call(tm.checkpoint.save, folder=folder, state={"a": torch.ones(2)}, step=1, group=group),
        "load": call(tm.checkpoint.load, folder=folder, state={"a": torch.ones(2)}, group=group),
        "export": call(tm.checkpoint.export_centers, head=head, path=folder / "centers"),
        "import": call(tm.checkpoint.import_insightface, folder=folder, head=head),
    }


# -- a rank that is gone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["save", "load", "export", "import"])
def test_a_dead_rank(name: str, tmp_path: Path) -> None:
    said, seconds = on_ranks(2, one_is_dead, name, tmp_path, timeout=SECONDS)[0]
    assert "lost contact with the other ranks" in said
    assert seconds < SECONDS + 10
    assert os.listdir(tmp_path) == []


def one_is_dead(name: str, folder: Path) -> tuple[str, float]:
    head = made()
    if dist.get_rank() == 1:
        os._exit(1)
    return failed(calls(folder, head)[name])


def test_a_dead_rank_of_a_group_with_a_timeout_of_its_own(tmp_path: Path) -> None:
    said, seconds = on_ranks(3, one_of_a_group_is_dead, tmp_path)[0]
    assert "lost contact with the other ranks" in said
    assert seconds < SECONDS + 10


def one_of_a_group_is_dead(folder: Path) -> tuple[str, float] | None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=SECONDS))
    if dist.get_rank() == 2:
        return None
    if dist.get_rank() == 1:
        os._exit(1)
    return failed(calls(folder, tm.MarginSoftmaxLoss(D, 10), group)["save"])


def failed(call: Callable[..., Any]) -> tuple[str, float]:
    begin = time.monotonic()
    try:
        call()
    except CheckpointError as error:
        return str(error), time.monotonic() - begin
    return "nothing happened", 0.0


# -- a rank with an error of its own -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "step": ("save", dict(step=-1), ValueError, "step must be"),
    "keep": ("save", dict(keep=0), ValueError, "keep must be"),
    "state": ("save", dict(state=[]), TypeError, "state must be"),
    "state in the background": ("save", dict(state=None, asynchronous=True), TypeError, "state must be"),
    "resize": ("load", dict(resize="shrink"), ValueError, "resize must be"),
    "folder": ("load", dict(folder=3), TypeError, "folder must be"),
    "dtype": ("export", dict(dtype=torch.int8), ValueError, "dtype must be"),
    "chunk_classes": ("export", dict(chunk_classes=0), ValueError, "chunk_classes must be"),
    "insightface": ("import", dict(folder=None), TypeError, "folder must be"),
}


def waited(found: Any) -> Any:
    return found.result() if hasattr(found, "result") else found


def test_what_is_wrong_on_one_rank_is_heard_by_all(tmp_path: Path) -> None:
    seconds = on_ranks(2, wrong_on_one, tmp_path, timeout=30.0)
    assert max(seconds) < 20.0


def wrong_on_one(folder: Path) -> float:
    begin, rank, every = time.monotonic(), dist.get_rank(), calls(folder, made())
    for name, arguments, kind, message in WRONG.values():
        background = {"asynchronous": True} if "asynchronous" in arguments else {}
        if rank == 1:
            with pytest.raises(kind, match=message):
                every[name](**arguments)
        else:
            with pytest.raises(CheckpointError, match=f"rank 1: {kind.__name__}: {message}"):
                waited(every[name](**background))
    assert agreement.timeout_of(agreement._gloo[dist.group.WORLD]) == timedelta(seconds=30)
    every["save"]()
    assert every["load"]() == 1  # they are still in step
    return time.monotonic() - begin
