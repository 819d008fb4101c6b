"""Which backend computes, and what happens where the kernels cannot be used."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import cpu_only, made

import tritonmargin as tm
from tritonmargin import kernels
from tritonmargin.kernels import tiles, torch_ops

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice made, no failure seen, no warning given."""
    monkeypatch.setattr(kernels, "_chosen", None)
    monkeypatch.setattr(kernels, "_failed", False)
    for cached in (kernels.looked_for, kernels.warn_once, kernels.load_module):
        cached.cache_clear()
    yield
    for cached in (kernels.looked_for, kernels.warn_once, kernels.load_module):
        cached.cache_clear()


def loss(**options: object) -> torch.Tensor:
    x, w = made(4, 8).float(), torch.eye(8)
    return tm.margin_cross_entropy(x.requires_grad_(), w.requires_grad_(), torch.arange(4), tm.ArcFace(), **options)


@cpu_only
def test_the_choice_on_a_cpu(fresh: None) -> None:
    assert kernels.current_backend(CPU, torch.float32) == "torch"
    with tm.use_backend("triton"):
        with pytest.raises(ValueError, match="needs tensors on a CUDA or ROCm device, got 'cpu'"):
            loss()
        with pytest.raises(ValueError, match="does not compute in float64"):
            kernels.current_backend(CUDA, torch.float64)


@cpu_only
def test_the_choice_on_a_gpu(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.current_backend(CUDA, torch.bfloat16) == "auto"
        assert kernels.current_backend(CUDA, torch.float64) == "torch"
    with tm.use_backend("triton"):
        assert kernels.current_backend(CUDA, torch.float32) == "triton"
    with tm.use_backend("torch"):
        assert kernels.current_backend(CUDA, torch.float32) == "torch"


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
        assert kernels.current_backend(CUDA, torch.float32) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.current_backend(CUDA, torch.float32) == "torch"  # said once
    with tm.use_backend("triton"), pytest.raises(ValueError, match=text):
        kernels.current_backend(CUDA, torch.float32)


class Failing:
    """The torch backend with one function that fails as Triton does."""

    FUSED = torch_ops.FUSED

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> object:
        if name != self.name:
            return getattr(torch_ops, name)

        def fail(*args: object, **options: object) -> None:
            raise kernels.KernelError("OutOfResources: out of resource: shared memory")

        return fail


@cpu_only
@pytest.mark.parametrize("function", ["reduce_chunk", "finish_rows"])
def test_a_kernel_that_fails(function: str, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to the library: one warning, and the right result. Asked for by name: an error that says what to do."""
    expected = loss()
    load = kernels.load_module
    broken = lambda name: load("torch") if name == "torch" or kernels._failed else Failing(function)  # noqa: E731
    monkeypatch.setattr("tritonmargin.walk.load_backend", broken)
    monkeypatch.setattr("tritonmargin.stream.load_backend", broken)
    monkeypatch.setattr("tritonmargin.functional.current_backend", lambda device, dtype: "auto")

    def step() -> torch.Tensor:
        value = loss()
        value.backward()
        return value

    with pytest.warns(UserWarning, match="one of them failed .*shared memory"):
        value = step()
    assert torch.equal(value, expected)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert kernels.current_backend(CUDA, torch.float32) == "torch"  # not tried again
    monkeypatch.setattr(kernels, "_failed", False)
    monkeypatch.setattr("tritonmargin.functional.current_backend", lambda device, dtype: "triton")
    with pytest.raises(kernels.KernelError, match=r"use_backend\('torch'\)"):
        step()


@cpu_only
def test_other_errors_are_not_taken_for_a_kernels(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(torch_ops, "reduce_chunk", fail)
    with pytest.raises(MemoryError):
        loss()


COMPILE = """
import torch, warnings
warnings.simplefilter("always")
from perf.kernels.compile import compiling_for
from tritonmargin.kernels import triton_ops
with compiling_for("sm_90") as found:
    triton_ops.prepare_rows(torch.ones(9, 40), None, 0, 9, True, torch.empty(9, 40), None)
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
    from tritonmargin.kernels import triton_ops

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
        with pytest.raises(kernels.KernelError):
            triton_ops.call(Kernel(), 1)
    assert len(said) == len(tried) - 1 == int(retried)
    assert len(set(tried)) == len(tried)


# -- what the kernels are compiled with ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("margin", [tm.ArcFace(), tm.Softmax()], ids=["unit", "softmax"])
@cpu_only
def test_no_width_spills(target: str, margin: tm.Margin, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library launches at a D that is a multiple of nothing: whole vectors are loaded all the same."""
    pytest.importorskip("pandas", reason="perf compiles the kernels")
    from perf.kernels.compile import compiling_for

    monkeypatch.setattr("tritonmargin.kernels.why_not_triton", lambda *_: None)  # nothing runs
    x, weight = (torch.randn(size, 501, dtype=torch.bfloat16, requires_grad=True) for size in (64, 300))
    with compiling_for(target) as found, tm.use_backend("triton"):
        tm.margin_cross_entropy(x, weight, torch.arange(64), margin).backward()
    assert {(each.kernel, each.spills) for each in found} == {
        (f"{name}_kernel", 0) for name in ("prepare", "tile", "finish")
    }
    assert {each.options["D"] for each in found if each.kernel == "tile_kernel"} == {512}


def test_every_line_of_the_table_of_tiles_has_its_evidence() -> None:
    table = json.loads(Path(tiles.__file__).with_name("tiles.json").read_text())
    assert set(table) == {f"{target} {kind}" for target in TARGETS for kind in ("bfloat16", "tf32")}
    assert all("cycles per logit" in line["evidence"] or "measured" in line["evidence"] for line in table.values())
