"""The sharded demo: real ranks, killed at random moments, resumed on the same and on other numbers of ranks."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import multiprocessing.connection
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import CONTEXT, on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

for module in ("PIL", "fontTools", "sklearn", "matplotlib", "tqdm", "jinja2", "psutil", "cvttf_NotoSansCJK_Thin"):
    pytest.importorskip(module, reason=f"{module} is part of the demo extra: pip install -e '.[demo]'")

import psutil  # noqa: E402
import tqdm  # noqa: E402

from examples.glyphs import data, fonts, partial_fc, ranks, sharded, synced  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS, EVERY, SECONDS = 40, 2, 60.0
LINE = f"--limit 400 --classes 300 --unseen 80 --batch 16 --rate 0.1 --steps {STEPS} --every {EVERY} --threads 1"
OPTIONS = sharded.arguments(LINE.split())
SETTINGS = partial_fc.settings_of(OPTIONS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("glyphs")
    fonts.load(partial_fc.SCRIPTS, limit=OPTIONS.limit, cache=cache, processes=1)
    return cache


@pytest.fixture(scope="module")
def straight(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run on two ranks that was never killed ends with."""
    folder = tmp_path_factory.mktemp("straight")
    checksums = Started.start(2, trained, cache, folder / "run").results()
    assert checksums[0] == checksums[1]  # the same network on both
    return read(folder / "run")


# -- one network on all ranks -----------------------------------------------------------------------------------


def small_network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(4 * 36, 8, bias=False), torch.nn.BatchNorm1d(8),
    )  # fmt: skip


def three_steps(network: torch.nn.Module, own: slice) -> list[Tensor]:
    """Outputs for the own samples after three steps, gradients of the sum over them, buffers, and outputs in eval."""
    random = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, along = (torch.randn(10, *shape, generator=random, device="cpu") for shape in ((1, 8, 8), (8,)))
        network.zero_grad()
        found = network(x[own])
        (found * along[own]).sum().backward()
    gradients = [parameter.grad for name, parameter in network.named_parameters() if name != "0.bias"]  # that one is 0
    return [found.detach(), *gradients, *network.buffers(), network.eval()(x).detach()]


def steps_on_a_rank() -> list[Any]:
    network = synced.synced(small_network(), dist.group.WORLD)
    own = (slice(0, 7), slice(7, 8), slice(8, 10))[dist.get_rank()]
    return [each.numpy() for each in three_steps(network, own)]


def test_batchnorm_over_ranks_is_that_of_one_process() -> None:
    """On uneven parts: outputs side by side, and gradients of the parameters that add up."""
    one = three_steps(small_network(), slice(None))
    parts = [[*map(torch.as_tensor, part)] for part in on_ranks(3, steps_on_a_rank)]
    shapes = [tuple(each.shape) for each in one]
    assert shapes[1:] == [tuple(each.shape) for each in parts[0][1:]]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), one[0])
    gradients = sum(parameter.requires_grad for parameter in small_network().parameters()) - 1
    for place in range(1, len(one)):
        summed = sum(part[place] for part in parts) if place <= gradients else parts[1][place]
        torch.testing.assert_close(summed, one[place], rtol=1e-4, atol=1e-5)


# -- ranks that can be killed -----------------------------------------------------------------------------------


@dataclass
class Started:
    """Ranks at work on `function(run, pipe, cache, folder)`; they say "started", then what the function sends."""

    processes: list[Any]
    pipes: list[multiprocessing.connection.Connection]

    @classmethod
    def start(cls, world_size: int, function: Callable[..., Any], cache: Path, folder: Path) -> Started:
        folder.parent.mkdir(parents=True, exist_ok=True)
        meeting = folder.parent / f"meeting_{time.monotonic_ns()}"
        processes, pipes = [], []
        for rank in range(world_size):
            pipe, end = CONTEXT.Pipe()
            process = CONTEXT.Process(target=serve, args=(rank, world_size, meeting, end, function, cache, folder))
            process.start()
            end.close()
            processes.append(process)
            pipes.append(pipe)
        return cls(processes, pipes)

    def hear(self) -> list[Any]:
        """The next message of every rank."""
        for pipe in self.pipes:
            assert pipe.poll(SECONDS), "a rank hangs"
        return [pipe.recv() for pipe in self.pipes]

    def results(self) -> list[Any]:
        self.hear()
        found = self.hear()
        for process in self.processes:
            process.join(SECONDS)
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes)
        return found

    def kill(self, victims: list[int], patience: float = SECONDS) -> list[int | None]:
        """The exit codes of all ranks, once the others have noticed; None: one did not and was ended from outside."""
        for victim in victims:
            self.processes[victim].kill()
        end = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes


def serve(
    rank: int, world_size: int, meeting: Path, pipe: Any, function: Callable[..., Any], cache: Path, folder: Path
) -> None:
    with open(f"{folder}.stderr", "a") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)  # sums are split among threads
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill would leave there
    seconds = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world_size, timeout=seconds)
    run = ranks.Run.start(SETTINGS, OPTIONS.rate, dist.group.WORLD)
    pipe.send("started")
    pipe.send(function(run, cache, folder))
    dist.destroy_process_group()


def trained(run: ranks.Run, cache: Path, folder: Path) -> int:
    glyphs = fonts.load(partial_fc.SCRIPTS, limit=OPTIONS.limit, cache=cache)
    batches = data.Batches(glyphs, data.split(glyphs, OPTIONS.classes, OPTIONS.unseen).train, OPTIONS.batch)

    def noted(step: int) -> tuple[Tensor, Tensor]:
        Path(f"{folder}.{os.getpid()}.trains").touch()
        return batches(step)

    ranks.train(run, noted, folder, every=EVERY)
    return zlib.crc32(torch.cat([value.double().flatten() for value in run.network.state_dict().values()]).numpy())


def loaded(run: ranks.Run, cache: Path, folder: Path) -> bytes:
    """The state with tensors of all classes instead of a rank's part of them, as `torch.save` writes it."""
    assert run.load(folder)
    stream = io.BytesIO()
    torch.save(tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, run.state()), stream)
    return stream.getvalue()


def read(folder: Path) -> dict[str, Any]:
    """The newest checkpoint, as one process sees it."""
    run = ranks.Run.start(SETTINGS, OPTIONS.rate, None)
    assert run.load(folder)
    return run.state()


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the bit; when it was started and how long it took excepted."""
    for name in ("step", "losses"):
        assert one["progress"][name] == other["progress"][name]
    for name in ("head", "rows", "network", "optimizer"):
        mine, theirs = tree_leaves(one[name]), tree_leaves(other[name])
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


def kill_at_random(chance: random.Random, cache: Path, folder: Path) -> str:
    """Kill one rank or both of them at some moment, which is told."""
    started = Started.start(2, trained, cache, folder)
    started.hear()
    notes = [Path(f"{folder}.{process.pid}.trains") for process in started.processes]
    if chance.random() < 0.9:  # else perhaps before training begins
        while not all(note.exists() for note in notes) and any(process.is_alive() for process in started.processes):
            time.sleep(0.005)
    time.sleep(chance.uniform(0.0, 1.0))
    trains = [note.exists() for note in notes]
    # While they make a group, torch's ranks wait for one that was killed. Under torchrun they are ended from outside.
    codes = started.kill(chance.choice([[0], [1], [0, 1]]), SECONDS if all(trains) else 2.0)
    if codes == [0, 0]:
        return "finished"
    assert set(codes) != {0}
    assert None not in codes or not all(trains), f"a rank waits for one that was killed: {codes}"
    if not any(trains):
        return "before the first step"
    return "in a save" if list(folder.glob("*.partial")) else "in a step"


def rounds(count: int, cache: Path, folder: Path, straight: dict[str, Any]) -> Counter[str]:
    """Kill and resume `count` times; every run, when it gets to its end, ends as the one that was never killed."""
    chance, told, killed = random.Random(count), Counter(), 0
    while killed < count:
        place, moment = folder / str(told["runs"]) / "run", ""
        while killed < count and moment != "finished":
            moment = kill_at_random(chance, cache, place)
            told[moment] += 1
            killed += moment != "finished"
        if moment != "finished":
            Started.start(2, trained, cache, place).results()
        found = read(place)
        assert_same(found, straight)
        told["runs"] += 1
        told["resumed"] += len(found["progress"]["starts"]) - 1
    print(dict(told))
    return told


def test_killed_ranks_resumed_are_the_same_as_never_killed(
    cache: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    assert rounds(4, cache, tmp_path, straight)["runs"] >= 1


@pytest.mark.slow
def test_a_hundred_kills(cache: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    told = rounds(100, cache, tmp_path, straight)
    assert min(told["in a save"], told["in a step"], told["resumed"]) >= 5


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_ranks(cache: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for world_size in (2, 3):
        started = Started.start(world_size, trained, cache, folder)
        started.hear()
        await_checkpoint(folder)
        started.kill([0])
        found = read(folder)
        for state in Started.start(5 - world_size, loaded, cache, folder).results():
            assert_same(torch.load(io.BytesIO(state)), found)
    Started.start(1, trained, cache, folder).results()
    starts = read(folder)["progress"]["starts"]
    assert [size for _, size in starts] == [2, 3, 1]
    assert 0 == starts[0][0] < starts[1][0] < starts[2][0] < STEPS


@pytest.mark.slow
def test_three_ranks_add_gradients_up_in_the_same_order_after_a_restart(cache: Path, tmp_path: Path) -> None:
    Started.start(3, trained, cache, tmp_path / "straight" / "run").results()
    started = Started.start(3, trained, cache, tmp_path / "killed" / "run")
    started.hear()
    await_checkpoint(tmp_path / "killed" / "run")
    started.kill([1])
    Started.start(3, trained, cache, tmp_path / "killed" / "run").results()
    found = read(tmp_path / "killed" / "run")
    assert len(found["progress"]["starts"]) == 2
    assert_same(found, read(tmp_path / "straight" / "run"))


def await_checkpoint(folder: Path) -> None:
    """Until there is one more step than there is now."""
    before, end = steps_of(folder), time.monotonic() + SECONDS
    while steps_of(folder) <= before:
        assert time.monotonic() < end
        time.sleep(0.005)


def steps_of(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted(folder.glob("step_*")) if path.name[5:].isdigit()][-1:]


# -- the command ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def torchrun(cache: Path, out: Path) -> Iterator[subprocess.Popen]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "examples.glyphs.sharded"]
    line = [sys.executable, *command, *LINE.split(), f"--cache={cache}", f"--out={out}"]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_torchrun_ends_with_a_rank_that_is_killed_and_run_again_writes_the_report(
    cache: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    options = sharded.arguments([*LINE.split(), f"--cache={cache}"])
    folder = partial_fc.folder_of(options)
    with torchrun(cache, tmp_path) as process:
        await_checkpoint(folder)
        workers = psutil.Process(process.pid).children()
        os.kill(workers[-1].pid, signal.SIGKILL)
        process.communicate(timeout=SECONDS)
        assert process.returncode != 0
        assert psutil.wait_procs(workers, timeout=SECONDS)[1] == []
    assert not (tmp_path / partial_fc.REPORT).exists()
    with torchrun(cache, tmp_path) as process:
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, err
    assert_same(read(folder), straight)
    found = json.loads((tmp_path / partial_fc.REPORT).read_text())
    assert (found["world_size"], found["steps"], found["classes_of_rank_0"]) == (2, STEPS, 150)
    assert [start["world_size"] for start in found["starts"]] == [2, 2]
    assert 0 < found["starts"][1]["step"] < STEPS
    assert 0.0 <= found["tar_at_far_0.001"] <= 1.0
    assert "2 ranks, sample rate 0.1" in out
    assert str(tmp_path) not in json.dumps(found)


def test_the_comparison_keeps_the_kinds_that_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.glyphs import compare, sharded

    begun: list[str] = []

    def one(options: Any, kind: str, seed: int) -> dict[str, float]:
        begun.append(kind)
        return dict.fromkeys(compare.NUMBERS, list(compare.KINDS).index(kind) + 0.1 * seed)

    monkeypatch.setattr(compare, "one", one)
    line = ["--compare", "--steps", "3", "--out", str(tmp_path)]
    assert sharded.main(line) == 0
    first = json.loads((tmp_path / "sharded_seeds.json").read_text())
    assert begun == list(compare.KINDS) * 3
    found = first["two_ranks_less_one_process"]["rank1"]
    assert found["mean"] == pytest.approx(-1.0)
    assert found["spread_of_the_other"] == pytest.approx(0.2)
    assert not found["within_spread"]
    begun.clear()
    assert sharded.main([*line, "--kinds", "one_process"]) == 0
    assert begun == ["one_process"] * 3
    assert json.loads((tmp_path / "sharded_seeds.json").read_text()) == first
    for wrong, said in ((["--kinds", "nobody"], "got 'nobody'"), (["--kinds", "one_process", "--steps", "4"], "steps")):
        with pytest.raises(SystemExit, match=said):
            sharded.main([*line, *wrong])
