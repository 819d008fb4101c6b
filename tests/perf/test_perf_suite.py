"""The perf suite's parts: who is measured, whether each is right, processes, memory, a GPU's clock; no time counts."""

from __future__ import annotations

import math
import os
import resource
import signal
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from perf_cases import SMALL, ready

from perf import providers
from perf.providers.base import GRAPH, GRAPHS, MODES, STEP, WHOLE
from perf.suite import accuracy, memory, plans
from perf.suite.problem import Problem
from perf.suite.worker import Desk, Failed, Worker, backlog_length

FOUND = providers.discover()
# Of torch.compile the formula is `plain`'s; the check at N = 64 is one chunk of torch's 64 rows.
NOT_HERE = {plans.BASELINE, "plain-compiled", "torch-lce-rows64", *plans.ON_GPU}
ON_CPU = [name for name in FOUND if name not in NOT_HERE]


def test_names_options_and_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perf.providers.base.find_spec", lambda name: None)
    assert providers.make("pml").supports(SMALL) == "pytorch_metric_learning is not installed"
    assert providers.make("ours:retain=0.5:chunk_bytes=1000").chosen == {"retain": 0.5, "chunk_bytes": 1000}
    assert providers.title("ours:retain=0.5") == "tritonmargin, retain=0.5"
    for name, said in {"nobody": "no provider", "ours:what=1": "no option 'what'", "ours:retain=x": "'x'"}.items():
        with pytest.raises(ValueError, match=said):
            providers.make(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ON_CPU)
def test_every_provider_is_right(name: str, dtype: str) -> None:
    """The same check that decides whether its speed counts, in every loss; in float32 far within the bounds."""
    for loss in FOUND[name].losses:
        problem = accuracy.small(Problem(1, 128, 1, dtype, loss=loss))
        provider = ready(name, problem)
        found = accuracy.errors(provider, problem)
        assert accuracy.wrong(found, dtype) == ""
        assert dtype != "float32" or max(found.values()) < 0.2 * accuracy.ERROR[dtype]
        assert provider.work != "sampled" or len(provider.class_ids()) == problem.classes // 10


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.001), ("bfloat16", 1.005)])
@pytest.mark.parametrize("name", ["ours", "plain", "plain-sampled"])
def test_a_gradient_that_is_a_little_too_large_is_wrong(name: str, dtype: str, factor: float) -> None:
    """One part in 1000 in float32; in bfloat16 plain code is itself off by that."""
    problem = accuracy.small(Problem(1, 32, 1, dtype))
    provider = ready(name, problem)
    right = provider.weight_gradient
    provider.weight_gradient = lambda: factor * right()
    said = accuracy.wrong(accuracy.errors(provider, problem), dtype)
    assert "bias of dw" in said
    assert "dx" not in said


@pytest.mark.parametrize("name", [name for name in ON_CPU if set(FOUND[name].modes) == set(MODES)])
def test_modes_do_what_they_say(name: str) -> None:
    provider = ready(name, replace(SMALL, loss=FOUND[name].losses[-1]))
    before, values = provider.weight.detach().clone(), set()
    for mode in set(MODES) - set(GRAPHS):
        provider.reset(mode)
        assert provider.x.grad is provider.weight.grad is None
        loss = provider.run(mode)
        values.add(float(loss.detach()))
        assert loss.requires_grad == (mode == "forward")
        assert (provider.x.grad is not None) == (mode in (STEP, "frozen W", WHOLE))
        assert (provider.weight.grad is not None) == (mode in (STEP, WHOLE))
    assert len(values) == 1
    assert torch.equal(provider.weight.detach(), before), "every round meets the same W"
    assert provider.optimizer.state[provider.weight]["momentum_buffer"].abs().sum() > 0


HEAD = """
class Head:
    name, losses = "{name}", {losses}
    def make(self, problem, x, weight, target): self.x, self.weight, self.target = x, weight, target
    def step(self): return {step}
class Bare:
    name = "bare"
{more}
"""


@pytest.mark.parametrize(("given", "said"), [
    ({"of": "Other"}, "has no class Other; it has Head, Bare"), ({"of": "Bare"}, "Bare lacks losses, make, step"),
    ({"name": "a:b"}, "without ':'"), ({"name": "plain"}, "must be a new name"),
    ({"losses": "('triplet',)"}, "losses must be a tuple of arcface"), ({"losses": "'softmax'"}, "must be a tuple"),
    ({"more": "import no_such"}, "cannot be imported: ModuleNotFoundError"), ({"of": ""}, "file.py:Class"),
    ({"file": "none.py"}, "there is no file .*none.py"), ({}, "scalar tensor, and returned float"),
    ({"step": "self.x"}, r"returned shape \(6, 8\)"), ({"step": "self.x.detach().sum()"}, "its loss has no gradient"),
    ({"step": "self.x.sum()"}, "x or weight got no gradient"),
])  # fmt: skip
def test_a_mistake_in_your_own_head_is_a_line(given: Any, said: str, tmp_path: Path, monkeypatch: Any) -> None:
    found = dict(FOUND)
    monkeypatch.setattr(providers, "discover", lambda: found)
    words = {"name": "mine", "losses": "('softmax',)", "step": "1.0", "more": "", "of": "Head", "file": "heads.py"}
    words |= given
    (tmp_path / "heads.py").write_text(HEAD.format(**words))
    source, problem = f"{tmp_path / words['file']}:{words['of']}", replace(SMALL, loss="softmax")
    with pytest.raises(ValueError, match=said):
        accuracy.errors(ready(providers.load_file(source), problem), problem)
    if given.keys() <= {"step"}:
        assert providers.load_file(source) == providers.title("mine") == "mine", "a second time it is the same"


def test_what_does_not_fit_is_not_the_end_and_a_worker_that_takes_too_long_or_dies_says_so() -> None:
    worker, n = Worker("plain", 1), 1 << 20
    huge = Problem(n=n, d=1, classes=memory.available_bytes() // n)  # logits of four times what is free
    with memory.file_of(huge.weight_bytes) as weight:
        worker.ask("prepare", huge, (weight,))
        with pytest.raises(Failed, match="out of memory"):
            worker.ask("step", "no-grad")
    held = memory.field(Path(f"/proc/{worker.process.pid}/status"), "VmData")
    limit = resource.prlimit(worker.process.pid, resource.RLIMIT_DATA)[0]
    assert limit < held + memory.memory_bytes(), "beyond it the kernel refuses"
    with memory.file_of(SMALL.weight_bytes) as weight:  # zeros, which the process shares
        worker.ask("prepare", replace(SMALL, loss="softmax"), (weight,))
        assert worker.ask("step", STEP)[1] == pytest.approx(math.log(200))
    with pytest.raises(Failed, match="stopped after 0 s"):
        worker.ask("check", replace(SMALL, n=4000, classes=20_000), (), timeout=0.01)
    with pytest.raises(Failed, match="gone"):
        worker.ask("step", STEP)
    other = Worker("plain", 1)
    os.kill(other.process.pid, signal.SIGKILL)
    other.process.join()
    with pytest.raises(Failed, match="died"):
        other.ask("step", STEP)


class FakeGpu:
    """Its clock goes on by 20 ms for each step that is run and by 1 ms for each graph that is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.reserved, self.clock, gpu = 0, 0.0, self

        class Event(types.SimpleNamespace):
            def record(self) -> None:
                self.at = gpu.done("event")

            def elapsed_time(self, other: Event) -> float:
                assert gpu.log[-1] == "wait", "events are read after the device was waited for"
                return 1e3 * (other.at - self.at)

        graph = types.SimpleNamespace(replay=lambda: gpu.done("replay", 0.001))
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event, "CUDAGraph": lambda: graph, "Stream": lambda: stream, "current_stream": lambda: stream,
            "stream": lambda s: nullcontext(gpu.done("beside")), "graph": lambda g: nullcontext(gpu.done("capture")),
            "synchronize": lambda device: gpu.done("wait"), "empty_cache": lambda: gpu.done("empty cache"),
            "memory_reserved": lambda device: gpu.reserved, "memory_allocated": lambda device: 100,
            "max_memory_allocated": lambda device: 1_100_100, "reset_peak_memory_stats": lambda device: None,
            "mem_get_info": lambda device: (0, 1600),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        # Tensors of the CPU, and a problem that says that they are on the GPU.
        self.desk = Desk("plain")
        self.desk.provider = provider = ready("plain")
        provider.problem = replace(SMALL, device="cuda")
        forward = provider.forward
        monkeypatch.setattr(provider, "forward", lambda: (gpu.done("step", 0.02), forward())[1])

    def done(self, what: str, took: float = 0.0) -> float:
        self.log.append(what)
        self.clock += took
        return self.clock

    def step(self, mode: str) -> tuple[float, float, list[str]]:
        self.log.clear()
        return *self.desk.step(mode), self.log


def test_on_a_gpu_steps_are_enqueued_before_one_is_waited_for_and_a_graph_is_warmed_up(monkeypatch: Any) -> None:
    fake, right = FakeGpu(monkeypatch), float(ready("plain").run("no-grad"))
    took, loss, log = fake.step(STEP)
    assert (took, loss) == (pytest.approx(0.02), right)
    backlog = ["wait", "event", *["step", "event"] * 5, "wait"]  # 0.1 s of steps
    # Before it one step that compiles, and a second that says how long one takes.
    assert log == ["step", "wait", "event", "step", "event", "wait", *backlog]
    assert fake.step(STEP)[2] == backlog
    assert [backlog_length(took) for took in (1e-4, 0.009, 0.2, 1.7)] == [20, 11, 3, 1]
    took, loss, log = fake.step(GRAPH)
    assert (took, loss) == (pytest.approx(0.001), right)
    assert log[:6] == ["beside", "step", "step", "step", "capture", "step"]
    assert (log.count("step"), log.count("replay")) == (4, 2 + 20)
    assert list(fake.desk.calls) == [GRAPH]


def test_the_peak_of_a_step_counts_what_it_allocates(monkeypatch: Any) -> None:
    """With and without the gradient of W: its last allocation of that size."""
    monkeypatch.setattr("tritonmargin.class_pass.chunks.cache_bytes", lambda: 4 << 20)  # not this machine's
    desk = FakeGpu(monkeypatch).desk
    assert desk.peak(STEP) == pytest.approx({"peak_mb": 1.1, "beyond_mb": 1.1 - SMALL.weight_bytes / 1e6})
    problem = Problem(n=64, d=16, classes=400_000)
    plain, ours = (memory.peak(ready(name, problem), STEP) for name in ("plain", "ours"))
    logits, gradient = 64 * 400_000 * 4 / 1e6, problem.weight_bytes / 1e6
    assert plain["beyond_mb"] > 4 * logits
    assert ours["beyond_mb"] < 0.15 * logits
    assert ours["peak_mb"] > gradient > memory.peak(ready("ours-in-backward", problem), WHOLE)["peak_mb"] - gradient
    assert memory.peak_without([5, 10, -10, 7], 0) == 15
    assert memory.peak_without([10, 5, -10, 10, 2], 10) == 15  # the first 10 is a temporary, the last the gradient
    assert (memory.peak_without([5, 10, 2], 10), memory.peak_without([], 10)) == (7, 0)
