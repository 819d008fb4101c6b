"""Kernels compiled for a GPU that is not there, and what their machine code says.

Inside `compiling_for(target)` a launch compiles its kernel for that target, with exactly the specialisation that its
arguments ask for, and does not run; the list it yields holds what came out.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tritonmargin.kernels import triton_ops
from tritonmargin.kernels.tiles import Device

# "tf32" is float32 whose products torch was told to round to it.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}


def itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize


@contextlib.contextmanager
def multiplying(dtype: str) -> Iterator[None]:
    """With torch's setting for products of float32 that the name asks for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Instructions(NamedTuple):
    """Instructions of one program, of each kind: those of its innermost loop with a matrix product, and all others.

    That loop is the one over D, or the one over tiles where the compiler unrolled the one over D. Where warps share
    the work by its kind, those of the epilogue have `rest` alone; `products` and `loads` are the innermost loops of the
    warps that multiply and that load.
    """

    loop: Counter[str]
    rest: Counter[str]
    products: Counter[str]
    loads: Counter[str]
    products_unrolled: bool

    @property
    def unrolled(self) -> bool:
        return self.loop["exp2"] > 0

    def per_tile(self, rounds: int) -> Counter[str]:
        """How many are executed for a tile whose sum over D takes so many rounds."""
        times = 1 if self.unrolled else rounds
        return self.rest + Counter({kind: count * times for kind, count in self.loop.items()})

    def beside(self, rounds: int) -> Counter[str]:
        """The same of the warps that multiply and load for others; a round loads twice, of x and of the rows."""
        found = Counter[str]()
        times = 1 if self.products_unrolled else rounds
        for part, often in ((self.products, times), (self.loads, rounds * 2 / max(self.loads["UTMALDG"], 1))):
            found.update({kind: round(count * often) for kind, count in part.items()})
        return found

    @property
    def looped(self) -> Counter[str]:
        """How many there are in the loops."""
        return self.loop + self.products + self.loads

    @property
    def written(self) -> Counter[str]:
        return self.rest + self.looped


class Compiled(NamedTuple):
    kernel: str
    target: str
    grid: tuple[int, ...]
    options: dict[str, Any]  # the constants and options of the launch
    registers: int
    spills: int  # bytes of local memory, or registers on AMD
    shared: int  # bytes
    instructions: Instructions
    warps: int  # with those that the compiler added to multiply and load for others

    @property
    def threads(self) -> int:
        """Of the warps that were asked for."""
        return self.options["num_warps"] * self.lanes

    @property
    def all_threads(self) -> int:
        return self.warps * self.lanes

    @property
    def lanes(self) -> int:
        return 64 if self.target.startswith("gfx") else 32


_RUN = JITFunction.run  # what compiles; others may have put their own in its place since


class _Elsewhere:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: str) -> None:
        self.target = target

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        if self.target.startswith("gfx"):
            return GPUTarget("hip", self.target, 64)
        return GPUTarget("cuda", int(self.target.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self.target  # what compiled kernels are kept by

    def get_current_stream(self, device: object) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: str, processors: int = 132, memory: int = 80_000_000_000) -> Iterator[list[Compiled]]:
    """Launches of Triton kernels compile for `target` and do not run."""
    found: list[Compiled] = []
    before, device_of, driver = JITFunction.run, triton_ops.device_of, triton.runtime.driver
    active = getattr(driver, "_active", None)  # asking the public property would look for a GPU

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = _RUN(self, *args, grid=grid, warmup=True, **options)
        found.append(read(compiled, self.fn.__name__, target, grid, options))
        return compiled

    JITFunction.run = compile_only
    triton_ops.device_of = lambda tensor: Device(target, processors, memory)
    driver.set_active(_Elsewhere(target))
    try:
        yield found
    finally:
        JITFunction.run, triton_ops.device_of = before, device_of
        driver._active = active


def read(compiled: Any, kernel: str, target: str, grid: tuple[int, ...], options: dict[str, Any]) -> Compiled:
    """Registers, spills, shared memory and instructions of one compiled kernel."""
    kept = {"num_warps": 4, "num_stages": 3} | options
    if target.startswith("gfx"):
        registers, spills, code = read_amd(compiled.asm["amdgcn"])
    else:
        registers, spills, code = read_nvidia(compiled.asm["cubin"], options.get("SPECIALISED", False))
    warps = compiled.metadata.num_warps
    return Compiled(kernel, target, grid, kept, registers, spills, compiled.metadata.shared, code, warps)


@functools.lru_cache(maxsize=4096)
def read_nvidia(cubin: bytes, specialised: bool) -> tuple[int, int, Instructions]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True)
    registers = int(re.search(r"REG:(\d+)", usage.stdout)[1])
    spills = int(re.search(r"LOCAL:(\d+)", usage.stdout)[1]) + int(re.search(r"STACK:(\d+)", usage.stdout)[1])
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", listing.stdout)
    places = [int(place, 16) for place, _, _ in lines]
    jumps = [
        (int(found[1], 16), place)
        for place, (_, name, operands) in zip(places, lines, strict=True)
        if name.startswith("BRA") and (found := re.search(r"0x([0-9a-f]+)", operands))
    ]
    kinds = [nvidia_kind(name) for _, name, _ in lines]
    if not specialised:
        return registers, spills, split(places, kinds, jumps)
    # The epilogue's warps come first; behind their end is the code of the others.
    exits = [place for place, (_, name, _) in zip(places, lines, strict=True) if name == "EXIT"]
    end = next(place for place in exits if place > places[kinds.index("exp2") if "exp2" in kinds else 0])
    if not any(place > end for place, kind in zip(places, kinds, strict=True) if kind in MATRIX):
        return registers, spills, split(places, kinds, jumps)  # the compiler found nothing to share
    return registers, spills, split_specialised(places, kinds, jumps, end)


def nvidia_kind(name: str) -> str:
    """What an instruction counts as."""
    if name.startswith("UTC") and "MMA" not in name:
        return "other"  # barriers and the allocation of tensor memory
    return next((kind for prefix, kind in NVIDIA if name.startswith(prefix)), "other")


NVIDIA = [
    ("HGMMA", "HGMMA"), ("HMMA", "HMMA"), ("UTC", "UTCMMA"), ("UTMALDG", "UTMALDG"), ("LDGSTS", "cp.async"),
    ("MUFU.EX2", "exp2"), ("MUFU", "special"), ("LDL", "spill"), ("STL", "spill"), ("LDS", "shared"), ("STS", "shared"),
    ("LDTM", "tensor memory"), ("STTM", "tensor memory"), ("LDG", "global"), ("STG", "global"), ("NOP", "nop"),
]  # fmt: skip
AMD = [
    ("v_mfma", "mfma"), ("v_exp_f32", "exp2"), ("v_log", "special"), ("v_rcp", "special"), ("v_sqrt", "special"),
    ("scratch_", "spill"), ("ds_", "shared"), ("buffer_load", "global"), ("buffer_store", "global"),
    ("global_", "global"), ("s_", "scalar"),
]  # fmt: skip
MATRIX = ("HGMMA", "HMMA", "UTCMMA", "mfma")


def read_amd(text: str) -> tuple[int, int, Instructions]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    places, kinds, labels, jumps = [], [], {}, []
    for place, line in enumerate(text.splitlines()):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = place
        elif instruction := re.match(r"\s+([a-z]\w+)(.*)", line):
            places.append(place)
            kinds.append(next((kind for prefix, kind in AMD if instruction[1].startswith(prefix)), "other"))
            if instruction[1].startswith(("s_cbranch", "s_branch")):
                jumps.append((instruction[2].split(";")[0].strip(), place))
    return registers, spills, split(places, kinds, [(labels[to], at) for to, at in jumps if to in labels])


def split_specialised(places: list[int], kinds: list[str], jumps: list[tuple[int, int]], end: int) -> Instructions:
    """The code up to `end` is the epilogue's; behind it are the loops of the warps that multiply and that load."""
    code = list(zip(places, kinds, strict=True))

    def innermost(own: tuple[str, ...]) -> Counter[str]:
        here = [place for place, kind in code if kind in own and place > end]
        loops = [(at - to, to, at) for to, at in jumps if to < at and any(to <= place <= at for place in here)]
        _, first, last = min(loops)
        return Counter(kind for place, kind in code if first <= place <= last)

    first = split(*map(list, zip(*(each for each in code if each[0] <= end), strict=True)), jumps)
    products = innermost(MATRIX)
    # The first round of a loop over D begins a sum and is written out before the loop.
    unrolled = sum(products[kind] for kind in MATRIX) == sum(kind in MATRIX for _, kind in code)
    return Instructions(first.loop, first.rest, products, innermost(("UTMALDG",)), unrolled)


def split(places: list[int], kinds: list[str], jumps: list[tuple[int, int]]) -> Instructions:
    """The loop is the shortest one that holds a matrix instruction, if any does.

    Left out: what a forward jump passes over, if it holds neither products nor exps. That is the masking at targets and
    at edges, which few tiles have.
    """
    work = [place for place, kind in zip(places, kinds, strict=True) if kind in (*MATRIX, "exp2")]
    around = [(at, to) for to, at in jumps if to > at and not any(at < place < to for place in work)]
    matrix = [place for place, kind in zip(places, kinds, strict=True) if kind in MATRIX]
    loops = [(at - to, to, at) for to, at in jumps if to < at and any(to <= place <= at for place in matrix)]
    _, first, last = min(loops, default=(0, -1, -1))
    loop, rest = Counter[str](), Counter[str]()
    for place, kind in zip(places, kinds, strict=True):
        if any(at < place < to for at, to in around):
            continue
        (loop if first <= place <= last else rest)[kind] += 1
    return Instructions(loop, rest, Counter(), Counter(), False)
