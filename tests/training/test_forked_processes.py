"""Processes that are forked after, or during, an asynchronous save: their own calls work, or say what is the matter."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import cpu_only
from ranks import on_ranks

import tritonmargin as tm
from tritonmargin.checkpoint import CheckpointError

pytestmark = [cpu_only, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]


def in_child(function: Callable[..., None], *args: Any) -> None:
    """`function` in a forked process: without an error, in ten seconds."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    child.join(30.0)
    hangs = child.is_alive()
    if hangs:
        child.kill()
    assert not hangs, "it hangs"
    assert child.exitcode == 0


def state(number: int) -> dict[str, Any]:
    return {"a": torch.full((3,), float(number)), "epoch": number}


def saves_and_loads(folder: Path) -> None:
    torch.set_num_threads(1)
    tm.checkpoint.save(folder, state(2), step=2, asynchronous=True).result()
    tm.checkpoint.save(folder, state(3), step=3)
    found = state(0)
    assert tm.checkpoint.load(folder, found, step=2) == 2
    assert found["a"].tolist() == [2.0, 2.0, 2.0]
    assert tm.checkpoint.load(folder, found) == 3


def test_forked_after_a_save(tmp_path: Path) -> None:
    done = tm.checkpoint.save(tmp_path / "parent", state(1), step=1, asynchronous=True)
    done.result()

    def child() -> None:
        assert done.result().name == "step_0000000001"  # it was there before
        saves_and_loads(tmp_path / "child")

    in_child(child)
    saves_and_loads(tmp_path / "parent")


def test_forked_during_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, save = threading.Event(), threading.Event(), dcp.save

    def slow(*args: Any, **options: Any) -> Any:
        begun.set()
        go_on.wait()
        return save(*args, **options)

    monkeypatch.setattr(dcp, "save", slow)
    running = tm.checkpoint.save(tmp_path / "parent", state(1), step=1, asynchronous=True)
    assert begun.wait(30.0)

    def child() -> None:
        begin = time.monotonic()
        for ask in (running.result, running.exception):
            with pytest.raises(CheckpointError, match="forked while its parent saved"):
                ask()
        assert time.monotonic() - begin < 5.0
        monkeypatch.setattr(dcp, "save", save)
        saves_and_loads(tmp_path / "child")

    in_child(child)
    assert not running.done()
    go_on.set()
    assert running.result(30.0).name == "step_0000000001"


def test_forked_from_a_process_with_ranks(tmp_path: Path) -> None:
    on_ranks(1, forked_rank, tmp_path)


def forked_rank(folder: Path) -> None:
    tm.checkpoint.save(folder, state(1), step=1)

    def child() -> None:
        for call in (
            lambda: tm.checkpoint.save(folder, state(2), step=2),
            lambda: tm.checkpoint.load(folder, state(0)),
        ):
            with pytest.raises(CheckpointError, match="forked from one that had initialised"):
                call()
        os._exit(0)  # without what torch.distributed does in the end

    in_child(child)
    assert dist.is_initialized()
    assert tm.checkpoint.load(folder, state(0)) == 1
