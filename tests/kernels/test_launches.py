"""What is launched, how, and what it costs: grids, loads, compilations, waits, memory on the chip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DEVICE, MACHINE
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

from counted import counting
from kernel_cases import NUMBERS, TTSEM, Case, given, random, upstream

import tritonmargin as tm
from tritonmargin.backends.registry import KernelError
from tritonmargin.backends.triton import BACKEND, class_pass, numbers, plan
from tritonmargin.backends.triton.finish_kernel import finish_kernel
from tritonmargin.backends.triton.logits_kernels import reduce_kernel, weigh_kernel
from tritonmargin.backends.triton.row_kernels import rows_kernel
from tritonmargin.spec import LossInputs, LossOptions, PassGrads

TILES = "tf32" if "tf32" in NUMBERS else "float16"  # where our kernels multiply themselves


@pytest.fixture
def with_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Other tiles than the table's."""
    real = plan.pick_tiles

    def change(**changed: Any) -> None:
        monkeypatch.setattr(plan, "pick_tiles", lambda *given: real(*given)._replace(**changed))
        plan.make_plan.cache_clear()

    yield change
    plan.make_plan.cache_clear()


def both_passes(case: Case) -> list[Tensor]:
    inputs, _, _, spec = given(case)
    out, saved = numbers.forward(inputs, spec)
    back = numbers.backward(inputs, saved, PassGrads(**upstream(case)), (True, True, inputs.bias is not None), spec)
    return [each for each in (*out, *back) if each is not None]


@pytest.mark.usefixtures("to_the_end")
@pytest.mark.parametrize("kind", [TILES, "bfloat16"] if "bfloat16" in NUMBERS else [TILES])
@pytest.mark.parametrize("programs", [1, 3])
def test_grids_and_loads_change_nothing(with_tiles: Any, programs: int, kind: str) -> None:
    """One program after the other, several at a time; by pointers, by the tensor memory accelerator."""
    case, found = Case(kind, size=(40, 32, 70)), []
    for changed in ({"programs": 0, "descriptors": False}, {"programs": programs, "descriptors": True}):
        if MACHINE == "interpreter":
            changed["descriptors"] = False
        with_tiles(block_n=16, block_c=32, warps=4, **changed)
        found.append(both_passes(case))
    for ours, other in zip(*found, strict=True):
        assert torch.equal(ours, other)


def test_float32_is_multiplied_as_one_pass_says_whatever_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's products too, which are told by its setting; afterwards that is what it was, after an error as well."""
    if "tf32" not in NUMBERS:
        pytest.skip("the interpreter has no TF32")
    seen, broken, addmm, mm = [], [], torch.addmm, torch.mm
    setting = torch.backends.cuda.matmul

    def multiplied(real: Any) -> Any:
        def run(*args: Any, **options: Any) -> Tensor:
            if broken:
                raise RuntimeError("broken")
            seen.append(setting.fp32_precision)
            return real(*args, **options)

        return run

    monkeypatch.setattr(torch, "addmm", multiplied(addmm))
    monkeypatch.setattr(torch, "mm", multiplied(mm))
    before = setting.fp32_precision
    try:
        for asked, other in (("tf32", "ieee"), ("float32", "tf32")):
            setting.fp32_precision = other
            seen.clear()
            both_passes(Case(asked))
            assert set(seen) == {"tf32" if asked == "tf32" else "ieee"}
            assert setting.fp32_precision == other
            broken.append(True)
            with pytest.raises(RuntimeError, match="broken"):
                both_passes(Case(asked))
            broken.clear()
            assert setting.fp32_precision == other
    finally:
        setting.fp32_precision = before


def test_few_launches() -> None:
    """A step of ArcFace in bfloat16 is eight kernels of ours and one product of torch's, and nothing else."""
    if not TTSEM:
        pytest.skip("counts what ttsem executes")
    from unittest import mock

    launched = []
    real = class_pass.call

    def counted(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        real(kernel, programs, *args, **options)

    x, w = (random(size, 32, seed=size, dtype=torch.bfloat16).requires_grad_() for size in (17, 129))
    with (
        mock.patch("tritonmargin.backends.triton.class_pass.call", counted),
        mock.patch("tritonmargin.backends.triton.backward.call", counted),
        mock.patch("tritonmargin.backends.triton.fused.call", counted),
    ):
        loss = BACKEND.fused(
            LossInputs(x, w, torch.arange(17, device=DEVICE)), tm.ArcFace().to(DEVICE), LossOptions(), x.dtype
        )
        loss.backward()
    assert launched == [
        "rows_kernel", "classes_kernel", "reduce_kernel", "loss_kernel", "sum_kernel",
        "weigh_kernel", "finish_kernel", "back_kernel",
    ]  # fmt: skip


def test_what_changes_from_step_to_step_compiles_nothing(pytestconfig: pytest.Config) -> None:
    """Scale, margin, number of samples and of classes, sampled rows, learning rate: the same compiled kernels."""
    if MACHINE == "interpreter":
        pytest.skip("nothing is compiled")

    def compiled() -> int:
        if TTSEM:
            return pytestconfig.ttsem_modules()
        kernels = (rows_kernel, reduce_kernel, weigh_kernel, finish_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def step(n: int, c: int, s: float, m: float, ids: Tensor | None) -> None:
        target = torch.arange(n, device=DEVICE) % (c if ids is None else len(ids))
        x = random(n, 32, seed=1).requires_grad_()
        with tm.use_backend("triton"):
            for margin in (tm.ArcFace(s=s, m=m), tm.Softmax()):
                w = random(c, 32, seed=2).requires_grad_()
                tm.margin_cross_entropy(x, w, target, margin.to(DEVICE), class_ids=ids, chunk_bytes=1).backward()
            head = tm.MarginSoftmaxLoss(32, c, tm.ArcFace(s=s, m=m), device=DEVICE).to(DEVICE)
            optimizer = tm.optim.RowAdamW(head.parameters(), lr=0.01 * m, weight_decay=m, stochastic_rounding=False)
            head.update_in_backward(optimizer)
            head(x, target, class_ids=ids).backward()

    everything = torch.arange(0, 70, device=DEVICE)
    step(5, 70, 16.0, 0.3, None)
    step(5, 70, 16.0, 0.3, everything)
    before = compiled()
    step(3, 131, 30.0, 0.1, None)
    step(16, 70, 8.0, 0.5, everything)
    step(6, 96, 64.0, 0.0, None)
    assert compiled() == before


@pytest.mark.parametrize("asks", ["rest", "hinge", "rest and hardest"])
def test_nothing_waits_for_the_device(asks: str) -> None:
    """The pass reads no number back and no size depends on data, so a step can be captured in a CUDA graph."""
    case = Case(classes="sampled", asks=asks, chunks="chunk_bytes")
    given(case)
    upstream(case)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        inputs, _, _, spec = given(case)
        grads = PassGrads(rest=torch.ones(17, device=DEVICE), target_product=torch.ones(17, device=DEVICE))
        out, saved = BACKEND.forward(inputs, spec)
        BACKEND.backward(inputs, saved, grads, (True, True, False), spec)
    assert out.target_product.isfinite().all()
    names = {event.name() for event in profiler.profiler.kineto_results.events()}
    assert "aten::empty" in names
    waits = {"aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::_unique2", "aten::masked_select"}
    if TTSEM:  # whose launches look at tensors
        waits -= {"aten::item", "aten::_local_scalar_dense"}
    assert not names & waits


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float16"])
def test_shared_memory_fits(kind: str, ttsem: Any, monkeypatch: pytest.MonkeyPatch, with_tiles: Any) -> None:
    """At a real width, against the card's limit; and a tile that needs more is stopped."""
    target = int(MACHINE.removeprefix("ttsem-"))
    monkeypatch.setattr(ttsem, "shared_limit", (target, 166_912 if target == 80 else 232_448))
    case = Case(kind, size=(65, 512, 130))
    both_passes(case)
    assert not ttsem.shared_unknown
    with_tiles(block_d=128, stages=10)  # ten stages of either are more than 300,000 bytes
    with pytest.raises(KernelError, match="shared memory"):
        both_passes(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_agrees_and_moves_what_was_counted(dtype: torch.dtype, ttsem: Any) -> None:
    """Plain softmax on the same tensors, and what our kernels store and multiply is what the formula says."""
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    n, d, c, single = 32, 32, 300, dtype == torch.float32
    x, w = (random(size, d, seed=size).div(d**0.25).to(dtype).requires_grad_() for size in (n, c))
    target = torch.arange(n) * 7 % c

    def step(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    exact = [each.detach().double().requires_grad_() for each in (x, w)]
    expected = step(torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target), *exact)
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    with profiler, counting() as count, tm.use_backend("triton"):
        ours = step(tm.margin_cross_entropy(x, w, target, tm.Softmax()), x, w)
    other = liger.LigerFusedLinearCrossEntropyFunction.apply(x, w, target)
    other = step(other[0] if isinstance(other, tuple) else other, x, w)
    for got, theirs, want in zip(ours, other, expected, strict=True):
        error, of_liger = (float((each.double() - want).norm() / want.norm()) for each in (got, theirs))
        assert error <= 2.0 * of_liger + (1e-6 if single else 2e-3)
        assert error < (1e-6 if single else 1e-2)
    by_torch = 0
    for event in profiler.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            # What is added to comes before the factors.
            (rows, inner), (_, width) = event.input_shapes[event.name != "aten::mm" :][:2]
            by_torch += 2 * rows * inner * width
    # float32's products are all the library's; of bfloat16's the one that makes dL/dx.
    assert by_torch == (4 if single else 1) * 2 * n * d * c
    how = plan.plan_for(x, w, None, plan_spec(dtype))
    whole = [whole_tiles(how.reduce, n, c, d), whole_tiles(how.weigh, c, n, d), whole_tiles(how.finish, c, d, n)]
    assert count.flops == (0 if single else sum(2 * each for each in whole))
    # Per class P and dL/dW, per slot and sample two sums, and a few lines of numbers per sample.
    slots = -(-c // how.reduce.shape[1])
    of_tiles = slots * n * 4 * 2 + c * how.line_n * dtype.itemsize + c * d * dtype.itemsize
    of_samples = n * d * dtype.itemsize * 2 + how.line_n * how.line_d * dtype.itemsize
    assert of_tiles + of_samples <= count.stored <= of_tiles + of_samples + 4 * 16 * how.line


def whole_tiles(tile: plan.Tile, m: int, n: int, length: int) -> int:
    """Multiplications of a product in whole tiles."""
    return math.prod(-(-size // block) * block for size, block in zip((m, n, length), tile.shape, strict=True))


def plan_spec(dtype: torch.dtype) -> Any:
    return given(Case("float32", unit=(False, False))).spec.__class__(
        unit_weight=False, bounded=False, want_rest=True, want_hardest=False, sparse=False, dtype=dtype, chunk_bytes=0,
        retain_bytes=0, backend="triton",
    )  # fmt: skip
