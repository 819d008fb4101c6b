"""Offsets of the kernels past 2^31 elements, executed; and each of them in 32 bits, to see that it would show.

Tensors of one byte an element whose lines are 2^30 elements apart: the third begins past 2^31. ttsem holds them several
times: 10 GB, and 18 where rows have a state.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICE, MACHINE
from torch import Tensor

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

from kernel_cases import broken

from tritonmargin.backends.registry import KernelError
from tritonmargin.backends.triton.update_rules import TRITON_RULES

LINE = (1 << 30) + 16
N, BLOCK = 3, 16  # samples and classes; of a tile, and how long lines of numbers are
TILE = {"TILE": (BLOCK, BLOCK, 32), "SPLIT": 1, "num_warps": 4}
DOT = (False, "ieee")
Place = Callable[[str, Tensor], Tensor]


@pytest.fixture(autouse=True)
def freed() -> None:
    """A test before may have ended with an exception, which holds gigabytes until somebody looks for cycles."""
    gc.collect()


def lines(content: Tensor) -> Tensor:  # [3, D]
    """The same numbers in lines that are far apart."""
    memory = torch.empty(2 * LINE + content.shape[1] + BLOCK, dtype=content.dtype, device=DEVICE)
    far = memory.as_strided(content.shape, (LINE, 1))
    return far.copy_(content)


def placed(far: str) -> Place:
    """Lays a tensor out far apart if it is one of those; "columns of w": one that is stored column by column."""

    def place(name: str, content: Tensor) -> Tensor:
        if f"columns of {name}" == far:
            return lines(content.t()).t()
        return lines(content) if name in far.split(", ") else content

    return place


def small(seed: int, d: int, dtype: torch.dtype = torch.int8) -> Tensor:  # [3, d]
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (N, d), generator=random, device="cpu").to(dtype=dtype, device=DEVICE)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


ORDER = torch.tensor([2, 0, 1], device=DEVICE)  # numbers of rows
NOBODY = torch.full((N * BLOCK,), -1, dtype=torch.int32, device=DEVICE)  # labels of samples whose class is elsewhere


def rows(ops: Any, place: Place, d: int) -> None:
    x, w, y = place("x", small(1, d)), place("w", small(2, d)), ORDER.int()
    xs, targets, label = small(0, d), small(0, d), zeros(BLOCK, dtype=torch.int32)
    ops.launch.call(
        ops.row_kernels.rows_kernel, N, x, w, y, None, (None, None, None), xs, targets, zeros(8, BLOCK), label, N,
        BLOCK, N, N, 0, -100, 2, 1.0, x.stride(), w.stride(), xs.stride(0), UNIT=(False, False), ROUND=False, D=d,
        BLOCK_D=32,
    )  # fmt: skip
    assert xs.equal(small(1, d))
    assert targets.equal(small(2, d)[ORDER])


def classes(ops: Any, place: Place, d: int, ids: Tensor | None) -> None:
    w, copies = place("w", small(1, d)), small(0, d)
    ops.launch.call(
        ops.row_kernels.classes_kernel, 1, w, ids, None, None, None, copies, None, N, BLOCK, 0, w.stride(),
        copies.stride(0), 0, UNIT=False, ROUND=False, D=d, BLOCK_K=BLOCK, BLOCK_D=32,
    )  # fmt: skip
    assert copies.equal(small(1, d) if ids is None else small(1, d)[ids])


def operands(place: Place, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class rows, samples, and where their products are above 0, [classes, samples]."""
    w, x = (small(seed, d, torch.float8_e5m2) for seed in (3, 4))
    return place("w", w), place("xs", x), w.float() @ x.float().t() > 0


def reduce(ops: Any, place: Place, d: int, made: bool) -> None:
    w, xs, above = operands(place, d)
    a, hinge, violations = place("z", above.to(torch.int8)) if made else xs, zeros(1, N), zeros(1, N)
    ops.launch.call(
        ops.logits_kernels.reduce_kernel, 1, a, w, NOBODY, None, zeros(N),
        (None, None, None, None, hinge, violations, None), N, N, d, 0, BLOCK, xs.stride(0), w.stride(0), a.stride(0),
        KIND=(False, False, False, made), HOW=DOT, **TILE,
    )  # fmt: skip
    assert violations[0].equal(above.sum(dim=0).float())


def reduce_slots(ops: Any, place: Place, d: int) -> None:
    """Slots times samples: the ninth slot of 2^28 samples; `ONE_TILE` computes it alone."""
    n, x = 1 << 28, zeros(BLOCK, d, dtype=torch.float16)
    total = zeros(8 * n + BLOCK, dtype=torch.int8)
    ops.launch.call(
        ops.logits_kernels.reduce_kernel, 1, x, x, NOBODY, None, None, (total, *[None] * 6), n, 9 * BLOCK, d, 0,
        BLOCK, d, 0, 0, KIND=(False, False, False, False), HOW=DOT, **TILE,
    )  # fmt: skip
    assert (total[8 * n :] == BLOCK).all()  # of 2^0
    assert not total[:BLOCK].any()


def weigh(ops: Any, place: Place, d: int, made: bool) -> None:
    w, xs, above = operands(place, d)
    a, p = place("z", above.to(torch.int8)) if made else w, place("p", zeros(N, BLOCK).to(torch.int8))
    ops.launch.call(
        ops.logits_kernels.weigh_kernel, 1, a, xs, NOBODY, zeros(8, BLOCK), zeros(6, BLOCK) + 1, None, None, p,
        (None, None), N, N, d, 0, BLOCK, BLOCK, w.stride(0), xs.stride(0), a.stride(0), p.stride(0),
        KIND=(False, False, True, False, made), HOW=DOT, **TILE,
    )  # fmt: skip
    assert p[:, :N].equal(above.to(torch.int8))


def weigh_sums(ops: Any, place: Place, d: int) -> None:
    """Blocks of samples times classes: the third block of 2^30 classes; `ONE_TILE` computes it alone."""
    k, x = 1 << 30, zeros(BLOCK, d, dtype=torch.float16)
    sums = zeros(2 * k + BLOCK, dtype=torch.int8)
    ops.launch.call(
        ops.logits_kernels.weigh_kernel, 1, x, x, NOBODY, zeros(8, 48), zeros(6, 48) + 1, None, None, x,
        (None, sums), 48, k, d, 0, 48, BLOCK, d, 0, 0, 0, KIND=(False, False, False, False, False), HOW=DOT, **TILE,
    )  # fmt: skip
    assert (sums[2 * k :] == BLOCK).all()
    assert not sums[:BLOCK].any()


def finish(ops: Any, place: Place, d: int, ids: Tensor | None, made: int, update: bool) -> None:
    """dL/dW is a product that is given, or one of P and x', and what the one sample of class 1 adds."""
    kind = torch.int8 if made else torch.float8_e5m2
    p, xs = place("p", small(5, d if made else N, kind)), place("xs", small(6, d, torch.float8_e5m2))
    x, w = place("x", small(7, d)), place("w", small(8, d))
    label, numbers, grads = NOBODY.clone(), zeros(8, BLOCK), zeros(6, BLOCK)
    label[2], grads[1, 2] = 1, 1.0
    one = torch.tensor([2.0**14, 2.0**13], device=DEVICE)  # float16's factor, here 1; it makes float32 of bytes
    state = place("state", small(9, d)) if update else None
    out = w if update else small(0, d)
    ops.launch.call(
        ops.finish_kernel.finish_kernel, 1, p, xs, label, numbers, grads, None,
        (None, None, None, 0), (x, None), ((), one), w, ids, out, ((1.0, 1.0, 0.0, 0.0), (state,), None), N, 0,
        (N, BLOCK), BLOCK, (p.stride(0), xs.stride(0), w.stride(), out.stride(0), x.stride()), 1.0, 0,
        KIND=(d, False, False, made, False, ids is not None, False, False, DOT),
        RULE=TRITON_RULES["sgd"] if update else None, **TILE,
    )  # fmt: skip
    a = small(5, d) if made else (small(5, N).float() @ small(6, d).float()).to(torch.int8)
    a[1] += small(7, d)[2]
    at = torch.arange(N, device=DEVICE) if ids is None else ids
    if state is None:
        assert out[at].equal(a)
    else:
        assert state[at].equal(small(9, d)[at] + a)
        assert out[at].equal(small(8, d)[at] - small(9, d)[at] - a)


def finish_sums(ops: Any, place: Place, d: int, bias: bool) -> None:
    """What `weigh_kernel` has summed: the third block of 2^30 classes; `ONE_TILE` stops after the first classes."""
    k, one = 1 << 30, torch.ones(BLOCK, d, device=DEVICE)
    sums, out, grad_bias = zeros(2 * k + BLOCK, dtype=torch.int8), 0 * one, zeros(BLOCK)
    sums[2 * k :] = 1
    given = (None, sums, (grad_bias, None), 3) if bias else (sums, None, None, 3)
    ops.launch.call(
        ops.finish_kernel.finish_kernel, 1, 0 * one, None, NOBODY, zeros(8, BLOCK), zeros(6, BLOCK),
        zeros(3, BLOCK) + 1, given, (one, None), ((), None), one, None, None if bias else out, None, k, 0,
        (BLOCK, BLOCK), BLOCK, (d, d, (d, 1), d, (d, 1)), 1.0, 0,
        KIND=(d, not bias, False, 1, False, False, False, False, DOT), RULE=None, **TILE,
    )  # fmt: skip
    assert (grad_bias == 1).all() if bias else (out == -1).all()


def back(ops: Any, place: Place, d: int) -> None:
    product, x, out = place("product", small(1, d)), small(2, d), small(0, d)
    numbers, grads = zeros(8, BLOCK) + 1, zeros(6, BLOCK) + 1
    ops.launch.call(
        ops.back_kernel.back_kernel, N, product, x, numbers, grads, (), None, None, 0 * out, None, out,
        BLOCK, 1.0, x.stride(), product.stride(0), UNIT=(False, False), NORM=True, D=d, BLOCK_D=32,
    )  # fmt: skip
    assert out.equal(small(1, d) + small(2, d))


PROGRAM = "i = tl.program_id(0).to(tl.int64)\n    d = tl.arange(0, BLOCK_D)\n    "
ROW, CLASS = PROGRAM + "valid", "row = tl.program_id(0).to(tl.int64) * BLOCK_K"
LEFT, RIGHT = "row[:, None].to(tl.int64) * stride_a", "column[:, None].to(tl.int64) * stride_b"
# Which kernel, how, what is far apart, and the 64 bits in its source; or what is there in their place.
CASES: list[tuple[Callable[..., None], tuple[Any, ...], str, str, str]] = [
    (rows, (), "x", ROW, ""),
    (rows, (), "w", "other=0).to(tl.int64)\n    valid", ""),
    (rows, (), "columns of x", "strides_x[0] + d.to(tl.int64) * strides_x[1], mask=(d < D) & valid", ""),
    (rows, (), "columns of w", "d.to(tl.int64) * strides_w[1]", ""),
    (classes, (None,), "w", CLASS, ""),
    (classes, (ORDER,), "w", "other=0)\n    if UNIT", "other=0).to(tl.int32)\n    if UNIT"),
    (classes, (None,), "columns of w", "d[None, :].to(tl.int64) * strides_w[1]", ""),
    (reduce, (False,), "xs", LEFT, ""),
    (reduce, (False,), "w", RIGHT, ""),
    (reduce, (True,), "z", "column[None, :].to(tl.int64) * stride_z", ""),
    (reduce_slots, (), "", "own = slot.to(tl.int64) * n", ""),
    (weigh, (False,), "w", LEFT, ""),
    (weigh, (False,), "xs", RIGHT, ""),
    (weigh, (True,), "z", "row[:, None].to(tl.int64) * stride_z", ""),
    (weigh, (False,), "p", "row[:, None].to(tl.int64) * stride_out", ""),
    (weigh_sums, (), "", "slot.to(tl.int64) * k", ""),
    (finish, (None, 1, False), "p", "row[:, None].to(tl.int64) * stride_p", ""),
    (finish, (None, 0, False), "p", LEFT, ""),
    (finish, (None, 0, False), "xs", "at[:, None].to(tl.int64) * stride_b", ""),
    (finish, (None, 1, False), "w", "position = (row + start).to(tl.int64)", ""),
    (finish, (None, 1, False), "columns of w", "column[None, :].to(tl.int64) * strides_w[1]", ""),
    (finish, (None, 1, False), "columns of x", "column.to(tl.int64) * strides_x[1]", ""),
    (finish, (None, 1, False), "x", "i.to(tl.int64) * strides_x[0]", ""),
    (finish, (ORDER, 1, True), "w, state", "other=0)\n        if KIND[3]", "other=0).to(tl.int32)\n        if KIND[3]"),
    (finish_sums, (False,), "", "along + tl.cast(block, tl.int64) * k", "along + block * k"),
    (finish_sums, (True,), "", "by_class + tl.cast(block, tl.int64) * k", "by_class + block * k"),
    (back, (), "product", PROGRAM + "mask = d < D\n    g", ""),
]
TILES = "tl.range(tl.program_id(0), tiles_{} * tl.cdiv(k, BLOCK_C), tl.num_programs(0)):\n        {}"
ONE_TILE = {  # all of them are many millions
    reduce_slots: (TILES.format("n", "# Tiles"), "tl.range(8 * tiles_n, 8 * tiles_n + 1):\n        # Tiles"),
    weigh_sums: (TILES.format("n", "slot, first_c"), "tl.range(2, 3):\n        slot, first_c"),
    finish_sums: (TILES.format("d", "first_d"), "tl.range(tiles_d):\n        first_d"),
}


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.xdist_group("two gigabytes")
@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__} {case[2]}".strip())
def test_offsets_past_2_to_the_31(
    case: Any, bits: int, ttsem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ttsem.sanitize import KernelFault

    check, how, far, old, new = case
    edits = [(old, new or old.replace(".to(tl.int64)", ""))] if bits == 32 else []
    ops = broken(tmp_path, monkeypatch, *edits, *([ONE_TILE[check]] if check in ONE_TILE else []))
    d = 3 if far.startswith("columns") else 32
    if bits == 64:
        check(ops, placed(far), d, *how)
        return
    with pytest.raises((KernelError, AssertionError)) as found:
        check(ops, placed(far), d, *how)
    if isinstance(found.value, KernelError):
        cause = found.value.__cause__
        assert isinstance(cause, KernelFault) or isinstance(cause.__cause__, KernelFault), cause
