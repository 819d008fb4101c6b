"""Which backend computes, and what happens where the kernels cannot be used."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import cpu_only, made
from torch import Tensor

import tritonmargin as tm
from tritonmargin.backends import registry, tiles
from tritonmargin.backends.registry import KernelError, load_backend
from tritonmargin.objectives import OBJECTIVES
from tritonmargin.optim.update_rules import RowUpdate
from tritonmargin.rows import scaled_rows
from tritonmargin.spec import InputGrads, PassGrads, PassInputs, PassOutput, PassSpec

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice made, no failure seen, no warning given."""
    monkeypatch.setattr(registry, "_default", None)
    monkeypatch.setattr(registry, "_latest", None)
    monkeypatch.setattr(registry, "_failed", False)
    for cached in (registry.looked_for, registry.warn_once):
        cached.cache_clear()
    yield
    for cached in (registry.looked_for, registry.warn_once):
        cached.cache_clear()


def loss(**options: object) -> torch.Tensor:
    x, w = made(4, 8).float(), torch.eye(8)
    return tm.margin_cross_entropy(x.requires_grad_(), w.requires_grad_(), torch.arange(4), tm.ArcFace(), **options)


@cpu_only
def test_the_choice_on_a_cpu(fresh: None) -> None:
    assert registry.current_backend(CPU, torch.float32) == "torch"
    with tm.use_backend("triton"):
        with pytest.raises(ValueError, match="needs tensors on a CUDA or ROCm device, got 'cpu'"):
            loss()
        with pytest.raises(ValueError, match="does not compute in float64"):
            registry.current_backend(CUDA, torch.float64)


@cpu_only
def test_the_choice_on_a_gpu(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.current_backend(CUDA, torch.bfloat16) == "auto"
        assert registry.current_backend(CUDA, torch.float64) == "torch"
    with tm.use_backend("triton"):
        assert registry.current_backend(CUDA, torch.float32) == "triton"
    with tm.use_backend("torch"):
        assert registry.current_backend(CUDA, torch.float32) == "torch"


@cpu_only
@pytest.mark.parametrize("reason", ["old GPU", "old Triton", "no Triton"])
def test_what_is_missing_is_said_once_and_an_explicit_choice_raises(
    reason: str, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if reason == "old GPU" else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    if reason == "old Triton":
        import triton

        monkeypatch.setattr(triton, "__version__", "3.1.0")
    elif reason == "no Triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    text = {"old GPU": "compute capability", "old Triton": "3.6 is the oldest", "no Triton": "not installed"}[reason]
    with pytest.warns(UserWarning, match=text):
        assert registry.current_backend(CUDA, torch.float32) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.current_backend(CUDA, torch.float32) == "torch"  # said once
    with tm.use_backend("triton"), pytest.raises(ValueError, match=text):
        registry.current_backend(CUDA, torch.float32)


class Other:
    """The torch backend as another one, of which one function may fail as Triton does; see `Normalising`."""

    name, normalises = "triton", False

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.ran: list[str] = []

    def forward(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
        self.fail_in("forward")
        return load_backend("torch").forward(inputs, spec)

    def backward(
        self,
        inputs: PassInputs,
        saved: tuple[Tensor, ...],
        grads: PassGrads,
        needs: tuple[bool, bool, bool],
        spec: PassSpec,
        update: RowUpdate | None = None,
    ) -> InputGrads:
        self.fail_in("backward")
        return load_backend("torch").backward(inputs, saved, grads, needs, spec, update)

    def fail_in(self, function: str) -> None:
        self.ran.append(function)
        if self.failing == function:
            raise KernelError("OutOfResources: out of resource: shared memory")

    def fused(self, *_: object) -> None:
        self.fail_in("fused")


class Normalising(Other):
    """Takes embeddings and class numbers as they are, and gives |x|: PyTorch inside, autograd in its backward."""

    normalises = True

    def forward(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassOutput, tuple[Tensor, ...]]:
        prepared, plain, norm = self.prepared(inputs, spec)
        out, saved = super().forward(prepared, plain)
        return out._replace(embedding_norm=norm), saved

    def backward(
        self,
        inputs: PassInputs,
        saved: tuple[Tensor, ...],
        grads: PassGrads,
        needs: tuple[bool, bool, bool],
        spec: PassSpec,
        update: RowUpdate | None = None,
    ) -> InputGrads:
        x = inputs.x.detach().requires_grad_()
        with torch.enable_grad():
            prepared, plain, norm = self.prepared(inputs._replace(x=x), spec)
        plainly = prepared._replace(x=prepared.x.detach())
        found = super().backward(plainly, saved, grads, needs, plain, update)
        if found.x is None:
            return found
        pairs = [(prepared.x, found.x), (norm, grads.embedding_norm)]
        outputs, upstream = zip(*((out, g) for out, g in pairs if g is not None), strict=True)
        return found._replace(x=torch.autograd.grad(outputs, x, upstream)[0])

    def prepared(self, inputs: PassInputs, spec: PassSpec) -> tuple[PassInputs, PassSpec, Tensor]:
        valid = inputs.target != spec.ignore_index
        x = torch.where(valid[:, None], inputs.x, 0.0).to(torch.promote_types(inputs.x.dtype, torch.float32))
        margin = tm.NormFace(s=spec.scale) if spec.unit_embeddings else tm.Softmax()
        x, norm = scaled_rows(x, margin)
        row = inputs.target - spec.first_class
        row = torch.where(valid & (row >= 0) & (row < len(inputs.weight)), row, -1)
        if inputs.class_ids is not None:
            row = torch.where(row >= 0, torch.searchsorted(inputs.class_ids, row), -1)
        plain = replace(spec, unit_embeddings=False, scale=1.0, ignore_index=-1, first_class=0)
        return inputs._replace(x=x, target=row), plain, norm


@pytest.fixture
def chosen(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A backend of the test's own in Triton's place, and whether it is asked for by name."""

    def choose(backend: Other, name: str = "auto") -> None:
        monkeypatch.setitem(registry.LOADED, "triton", backend)
        monkeypatch.setattr("tritonmargin.loss.current_backend", lambda device, dtype: name)

    return choose


@cpu_only
@pytest.mark.parametrize("function", ["fused", "forward", "backward"])
@pytest.mark.parametrize("kind", [Other, Normalising])
def test_a_kernel_that_fails(
    function: str, kind: type[Other], chosen: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to the library: one warning, and the right result. Asked for by name: an error that says what to do."""
    expected = loss()
    chosen(kind(function))

    def step() -> torch.Tensor:
        value = loss()
        value.backward()
        return value

    lost = function == "backward" and kind is Normalising
    with pytest.warns(UserWarning, match="one of them failed .*shared memory"):  # noqa: PT031
        with pytest.raises(KernelError, match="next step does without") if lost else contextlib.nullcontext():
            value = step()
        value = step()
    assert torch.equal(value, expected)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        assert registry.current_backend(CUDA, torch.float32) == "torch"  # not tried again
    monkeypatch.setattr(registry, "_failed", False)
    chosen(kind(function), "triton")
    with pytest.raises(KernelError, match=r"use_backend\('torch'\)"):
        step()


@cpu_only
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("margin", [tm.ArcFace(s=16.0), tm.LSoftmax(m=3), tm.Softmax()], ids=["unit", "norms", "raw"])
def test_a_backend_that_normalises_is_given_what_it_takes(
    objective: str, margin: tm.Margin, chosen: Callable[..., None]
) -> None:
    """Ignored samples, a sample of the classes, statistics; the gradient of |x| goes through the backend."""
    x, w, y = made(6, 5).float(), made(90, 5, seed=1).float(), torch.tensor([3, -100, 60, 3, 8, 89])
    x[1] = torch.inf
    ids = torch.cat([y[y >= 0], torch.arange(0, 90, 4)]).unique()
    results, backend = [], Normalising()
    for turn in range(2):
        if turn:
            chosen(backend, "triton")
        for class_ids in (None, ids):
            leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
            value, stats = tm.margin_cross_entropy(
                *leaves, y, margin, class_ids=class_ids, objective=objective, reduction="sum", return_stats=True,
                label_smoothing=0.1 * (objective == "softmax"), chunk_bytes=1,
            )  # fmt: skip
            results.append([value, *stats, *torch.autograd.grad(value, leaves)])
    assert backend.ran == ["forward", "backward"] * 2
    for ours, expected in ((results[2], results[0]), (results[3], results[1])):
        for each, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(each, other, equal_nan=True)


@cpu_only
def test_other_errors_are_not_taken_for_a_kernels(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("no")

    monkeypatch.setattr("tritonmargin.class_pass.forward.reduce_logits", fail)
    with pytest.raises(MemoryError):
        loss()


COMPILE = """
import torch, warnings
warnings.simplefilter("always")
from perf.kernels.compile import compiling_for
from tritonmargin.backends.triton.launch import call
from tritonmargin.backends.triton.row_kernels import sum_kernel
with compiling_for("sm_90") as found:
    call(sum_kernel, 1, torch.ones(2, 9), torch.empty(()), torch.empty(()), 9, MEAN=True, BLOCK=1024)
print(len(found), found[0].spills)
"""


# What a kernel's folder that belongs to another user does; the superuser, who may run the tests, may write it.
FORBIDDEN = """
import errno, os
real = os.makedirs
def makedirs(path, *args, **options):
    if os.path.dirname(path) == FOLDER:
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return real(path, *args, **options)
os.makedirs = makedirs
"""


def compiling(folder: str, before: str = "") -> subprocess.Popen[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-c", before + COMPILE],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@cpu_only
def test_two_processes_compile_into_one_cache(tmp_path: Path) -> None:
    both = [compiling(str(tmp_path / "cache")) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.split() == ["1", "0"]
        assert "cannot be written" not in err


@cpu_only
def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    process = compiling(str(tmp_path / "file" / "cache"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.split() == ["1", "0"]
    assert "cannot be written" in err
    assert "TRITON_CACHE_DIR" in err


@cpu_only
def test_a_kernels_folder_in_the_cache_that_cannot_be_written_is_said_and_done_without(tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    process = compiling(folder, f"FOLDER = {folder!r}\n{FORBIDDEN}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.split()[-1] == "0"
    assert err.count("cannot be written (Permission denied)") == 1
    assert folder in err


@cpu_only
@pytest.mark.parametrize(("place", "reason", "retried"), [
    ("cache", errno.EROFS, True), ("elsewhere", errno.EROFS, False), ("", errno.ENOSPC, True),
])  # fmt: skip
def test_only_a_cache_that_cannot_be_written_is_tried_elsewhere(
    place: str, reason: int, retried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from tritonmargin.backends.triton.launch import call

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tried: list[str] = []

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[[], None]:
            return self.launch

        def launch(self) -> None:
            tried.append(triton.knobs.cache.dir)
            try:
                raise OSError(reason, os.strerror(reason), *([str(tmp_path / place / "key")] if place else []))
            except OSError as error:
                if len(tried) == 1:
                    raise RuntimeError("what Triton may make of it") from error
                raise

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(KernelError):
            call(Kernel(), 1)
    assert len(said) == len(tried) - 1 == int(retried)
    assert len(set(tried)) == len(tried)


# -- what the kernels are compiled with ----------------------------------------------------------------------------


# H100's limit of 128 registers is too low for a tile of dL/dW whose lines are no whole vectors.
SPILLING = {"sm_80": set(), "sm_90": {"finish_kernel"}}
STEP = ("rows", "classes", "reduce", "loss", "sum", "weigh", "finish", "back")


@pytest.mark.slow  # compiles four steps
@pytest.mark.parametrize("target", SPILLING)
@pytest.mark.parametrize("margin", [tm.ArcFace(), tm.Softmax()], ids=["unit", "softmax"])
@cpu_only
def test_what_spills_at_an_odd_width(target: str, margin: tm.Margin, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library launches at a D that is a multiple of nothing."""
    pytest.importorskip("pandas", reason="perf compiles the kernels")
    from perf.kernels.compile import compiling_for

    monkeypatch.setattr("tritonmargin.backends.registry.why_not_triton", lambda *_: None)  # nothing runs
    x, weight = (torch.randn(size, 501, dtype=torch.bfloat16, requires_grad=True) for size in (64, 300))
    with compiling_for(target) as found, tm.use_backend("triton"):
        tm.margin_cross_entropy(x, weight, torch.arange(64), margin).backward()
    assert [each.kernel for each in found] == [f"{name}_kernel" for name in STEP]
    assert {each.kernel for each in found if each.spills} == SPILLING[target]


def test_every_line_of_the_table_of_tiles_has_its_evidence() -> None:
    table = json.loads(Path(tiles.__file__).with_name("tiles.json").read_text())
    assert set(table) == {f"{target} {kind}" for target in TARGETS for kind in ("bfloat16", "tf32")}
    assert all("cycles per logit" in line["evidence"] or "measured" in line["evidence"] for line in table.values())
