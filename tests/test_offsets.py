"""Every offset of the kernels executed past 2^31 elements; and the same offset in 32 bits, to see that it would show.

Tensors of one byte an element whose lines are 2^30 elements apart: the third begins past 2^31. ttsem holds them several
times: 10 GB, and 18 where rows have a state.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import DEVICE, MACHINE
from torch import Tensor

if MACHINE == "cpu":
    pytest.skip("kernels run on a GPU, under ttsem or in the interpreter", allow_module_level=True)

from test_kernels import broken, with_tiles
from tritonmargin.kernels.triton_ops import Running, Shares

from tritonmargin.backends import registry as kernels
from tritonmargin.kernels import triton_ops
from tritonmargin.kernels.updates import RowUpdate

LINE = (1 << 30) + 16
D, N = 32, 3
OPERANDS = torch.float8_e5m2


@pytest.fixture(autouse=True)
def freed() -> None:
    """A test before may have ended with an exception, which holds gigabytes until somebody looks for cycles."""
    gc.collect()


def lines(content: Tensor) -> Tensor:  # [3, D]
    """The same numbers in lines that are far apart."""
    memory = torch.empty(2 * LINE + D, dtype=content.dtype, device=DEVICE)
    far = memory.as_strided(content.shape, (LINE, 1))
    return far.copy_(content)


def small(seed: int, dtype: torch.dtype = torch.int8) -> Tensor:  # [3, D]
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (N, D), generator=random, device="cpu").to(dtype=dtype, device=DEVICE)


def empty(dtype: torch.dtype = torch.float32, rows: int = N) -> Tensor:
    return torch.full((rows, D), 77, dtype=dtype, device=DEVICE)


def prepared(ops: ModuleType, w: Tensor | None = None, ids: Tensor | None = None, out: Tensor | None = None) -> Any:
    """Rows of W, not normalised: small whole numbers, so that every result is exact."""
    return ops.prepare_rows(small(1) if w is None else w, ids, 0, N, False, empty() if out is None else out, None)


def rows_of_w(ops: ModuleType) -> None:
    w = small(1)
    assert prepared(ops, lines(w)).rows.equal(w.float())


def rows_of_w_by_number(ops: ModuleType) -> None:
    w, ids = small(1), torch.tensor([2, 0, 1], device=DEVICE)
    assert prepared(ops, lines(w), ids).rows.equal(w[ids].float())


def columns_of_w(ops: ModuleType) -> None:
    """W stored column by column: rows of three numbers that are far apart."""
    w = small(1)[:, :3].contiguous()
    far = lines(w.t()).t()  # lines of the transpose
    out = torch.full((N, 3), 77.0, device=DEVICE)
    assert prepared(ops, far, out=out).rows.equal(w.float())


def rows_that_are_stored(ops: ModuleType) -> None:
    w = small(1)
    assert prepared(ops, w.float(), out=lines(empty(torch.int8))).rows.equal(w)


def far_tile() -> Tensor:  # [K, N]
    return lines(empty(torch.int8)).t()


def product(ops: ModuleType, x: Tensor, rows: Tensor) -> Tensor:  # [K, N]
    """Where z = x rows^T is above 0, of `weigh_chunk`."""
    own = torch.full((N,), -1, device=DEVICE)
    tile = empty(torch.int8).t()
    ops.weigh_chunk(rows, x, None, own, 0, "hinge", torch.zeros(N, device=DEVICE), tile, tile, None, None)
    return tile[:N]


def above(x: Tensor, rows: Tensor) -> Tensor:  # [K, N]
    return (rows.float() @ x.float().t() > 0).to(torch.int8)


def samples(ops: ModuleType) -> None:
    x, rows = small(2, OPERANDS), small(3, OPERANDS)
    assert product(ops, lines(x), rows).equal(above(x, rows))


def rows_of_a_chunk(ops: ModuleType) -> None:
    x, rows = small(2, OPERANDS), small(3, OPERANDS)
    assert product(ops, x, lines(rows)).equal(above(x, rows))


def tile_that_is_kept(ops: ModuleType) -> None:
    """Stored by one kernel, and what another one starts from."""
    x, rows = small(2, torch.float16), small(3, torch.float16)
    own = torch.full((N,), -1, device=DEVICE)
    tile, kept = empty(torch.int8).t(), far_tile()
    slots = triton_ops.slots(x, N)
    total, maximum = (torch.full((slots, N), value, device=DEVICE) for value in (0.0, -float("inf")))
    run = Running(total, maximum, None, None, None, None, None)
    ops.reduce_chunk(rows, x, None, own, 0, False, kept, tile, True, run)
    assert kept[:N].equal((rows.float() @ x.float().t()).to(torch.int8))
    ops.weigh_chunk(rows, x, None, own, 0, "hinge", torch.zeros(N, device=DEVICE), tile, tile, kept, None)
    assert tile[:N].equal(above(x, rows))


def products_of_a_chunk(ops: ModuleType) -> None:
    """Made elsewhere, and read."""
    z, tile = small(6), empty(torch.int8)
    own = torch.full((N,), -1, device=DEVICE)
    ops.call(
        ops.tile_kernel, 1, lines(z), None, None, own, torch.zeros(N, device=DEVICE), None, (tile, D, None, None),
        N, D, 0, LINE, D, 1, EPILOGUE=ops.weigh_tile, OPTIONS=ops.SHARES["hinge"], READY=False, DESCRIPTORS=False,
        PRECISION="ieee", ROUND=False, SPECIALISED=False, D=1, BLOCK_N=16, BLOCK_C=16, BLOCK_D=16,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    assert tile.equal((z > 0).to(torch.int8))


def share_of_a_chunk(ops: ModuleType) -> None:
    x, rows = small(2, torch.float16), small(3, torch.float16)
    own, tile = torch.full((N,), -1, device=DEVICE), far_tile()
    ops.weigh_chunk(rows, x, None, own, 0, "hinge", torch.zeros(N, device=DEVICE), tile, tile, None, None)
    assert tile[:N].equal(above(x, rows))


def last_tile_only(numbers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples x, a row w with x w = 1, and no targets; `ONE_TILE` computes the last tile of them."""
    one = torch.ones(1, D, dtype=torch.float16, device=DEVICE)
    return one.expand(numbers, D), one / D, torch.full((numbers,), -1, dtype=torch.int8, device=DEVICE)


def numbers_of_a_slot(ops: ModuleType) -> None:
    """Slots times samples: what the last of 9 slots keeps of 2^28 samples."""
    block, n = 16, 1 << 28
    x, rows, own = last_tile_only(n)
    total = torch.zeros(9, n, dtype=torch.int8, device=DEVICE)
    run = (total, None, None, None, None, None)
    ops.launch(rows.expand(9 * block, D), x, None, own, 0, None, None, rows, run, ops.reduce_tile, True, False, False)
    assert total[-1, -block:].equal(torch.full((block,), 2 * block, dtype=torch.int8, device=DEVICE))  # 2^z = 2
    assert not total[:-1, -block:].any()
    assert not total[0, :block].any()


def class_sums_of_a_tile(ops: ModuleType) -> None:
    """Blocks of samples times classes: the bias's gradient of the last of 2^21 blocks, in 1,040 classes."""
    block, n, k = 16, 1 << 25, 1040
    x, rows, own = last_tile_only(n)
    share = torch.zeros(1, k, dtype=torch.int8, device=DEVICE).expand(n, k)
    sums = torch.zeros(n // block, k, dtype=torch.int8, device=DEVICE)
    shift, factor = (torch.full((n,), value, device=DEVICE) for value in (0.0, 1.0))
    out, options = (share, 0, factor, sums), ops.SHARES["hinge"]
    ops.launch(rows.expand(k, D), x, None, own, 0, shift, None, rows, out, ops.weigh_tile, options, False, False)
    assert sums[-1, -block:].equal(torch.full((block,), block, dtype=torch.int8, device=DEVICE))
    assert not sums[0].any()


def finish(ops: ModuleType, product: Tensor | None, out: Tensor, place: Tensor | None = None, **more: Any) -> None:
    shares = more.pop("shares", [])
    ops.finish_rows(product, empty(), prepared(ops), 0, shares, None, None, None, out, place, **more)


def gradient_of_a_chunk(ops: ModuleType) -> None:
    a, out = small(4), empty()
    finish(ops, lines(a), out)
    assert out.equal(a.float())


def gradient(ops: ModuleType) -> None:
    a, out = small(4), lines(empty(torch.int8))
    finish(ops, a, out)
    assert out.equal(a)


def gradient_by_row_number(ops: ModuleType) -> None:
    a, out, place = small(4), lines(empty(torch.int8)), torch.tensor([2, 0, 1], device=DEVICE)
    finish(ops, a, out, place)
    assert out[place].equal(a)


def updated_rows_and_their_state(ops: ModuleType) -> None:
    a, w, buffer = small(4), small(1), small(5)
    place = torch.tensor([2, 0, 1], device=DEVICE)
    far, state = lines(w), lines(buffer)
    finish(ops, a, far, place, update=RowUpdate("sgd", far, (1.0, 1.0, 0.0, 0.0), (state,)))
    assert state[place].equal(buffer[place] + a)
    assert far[place].equal(w[place] - buffer[place] - a)


def shares_of_many_samples(ops: ModuleType) -> None:
    """The last of 2^21 + 3 samples of width 1,024 point at the rows."""
    n, d = (1 << 21) + 3, 1 << 10
    own = torch.full((n,), -1, device=DEVICE)
    own[-3:] = torch.arange(3, device=DEVICE)
    along = torch.empty(n, d, dtype=torch.int8, device=DEVICE)
    along[-3:] = torch.arange(3 * d, device=DEVICE).remainder(7).to(torch.int8).view(3, d)
    shares = Shares(own, along)
    shares.__dict__["sorted"] = own, along  # sorted as they are; a copy would be of 2^31 numbers
    out = torch.full((3, d), float("nan"), device=DEVICE)
    w = torch.zeros(3, d, device=DEVICE)
    rows = ops.prepare_rows(w, None, 0, 3, False, out.clone(), None)
    ops.finish_rows(None, out, rows, 0, [shares], None, None, None, out, None)
    assert out.equal(along[-3:].float())


# The test, the offset, and the same one in 32 bits.
OFFSETS: dict[Callable[[ModuleType], None], tuple[str, str]] = {
    rows_of_w: ("source = row if ids is None", "source = row.to(tl.int32) if ids is None"),
    rows_of_w_by_number: (
        "tl.load(ids + row, mask=inside, other=0)\n", "tl.load(ids + row, mask=inside, other=0).to(tl.int32)\n",
    ),
    columns_of_w: ("d[None, :].to(tl.int64) * stride_column", "d[None, :] * stride_column"),
    rows_that_are_stored: ("out = row[:, None] * stride_rows", "out = row[:, None].to(tl.int32) * stride_rows"),
    samples: ("x + sample[:, None].to(tl.int64) *", "x + sample[:, None] *"),
    products_of_a_chunk: ("far = sample[:, None].to(tl.int64) *", "far = sample[:, None] *"),
    rows_of_a_chunk: ("rows + row[:, None].to(tl.int64) *", "rows + row[:, None] *"),
    tile_that_is_kept: ("sample[:, None].to(tl.int64) * stride_tile", "sample[:, None] * stride_tile"),
    share_of_a_chunk: ("sample[:, None].to(tl.int64) * stride_share", "sample[:, None] * stride_share"),
    numbers_of_a_slot: ("own = slot.to(tl.int64) * n", "own = slot * n"),
    class_sums_of_a_tile: ("slot_n.to(tl.int64) * k", "slot_n * k"),
    gradient_of_a_chunk: ("product + row[:, None] *", "product + row[:, None].to(tl.int32) *"),
    gradient: ("target = row if place", "target = row.to(tl.int32) if place"),
    gradient_by_row_number: (
        "tl.load(place + row, mask=inside, other=0)\n", "tl.load(place + row, mask=inside, other=0).to(tl.int32)\n",
    ),
    updated_rows_and_their_state: (
        "tl.load(place + row, mask=inside, other=0)\n", "tl.load(place + row, mask=inside, other=0).to(tl.int32)\n",
    ),
    shares_of_many_samples: ("tl.cast(i, tl.int64) * D", "i * D"),
}  # fmt: skip
# Programs of all tiles but the last are many millions.
ONE_TILE = ("tl.range(tl.program_id(0), tiles, tl.num_programs(0)", "tl.range(tiles - 1, tiles, tiles")


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.xdist_group("two gigabytes")
@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("check", OFFSETS, ids=lambda check: check.__name__)
def test_offsets_past_2_to_the_31(
    check: Callable[[ModuleType], None], bits: int, ttsem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from ttsem.sanitize import KernelFault

    old, new = OFFSETS[check]
    edits = [(old, new)] if bits == 32 else []
    if check in (numbers_of_a_slot, class_sums_of_a_tile):
        edits.append(ONE_TILE)
    module = broken(tmp_path, monkeypatch, *edits) if edits else triton_ops
    with_tiles(monkeypatch, module, block_n=16, block_c=16, block_d=32, descriptors=False, programs=1)
    if bits == 64:
        check(module)
        return
    with pytest.raises((kernels.KernelError, AssertionError)) as found:
        check(module)
    if isinstance(found.value, kernels.KernelError):
        cause = found.value.__cause__
        assert isinstance(cause, KernelFault) or isinstance(cause.__cause__, KernelFault), cause
