"""Class centers in the formats of others: out as safetensors, in from the files of insightface."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tritonmargin.arguments import check_dtype, check_integer, check_path
from tritonmargin.backends.precision import accumulate
from tritonmargin.backends.torch_ops import inverse_norm
from tritonmargin.distributed.agreement import CheckpointError, Ranks
from tritonmargin.distributed.shard import Shard, shard_range
from tritonmargin.modules import MarginSoftmaxLoss

FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
INSIGHTFACE = ("rank_{}_softmax_weight.pt", "checkpoint_gpu_{}.pt")


# -- safetensors -------------------------------------------------------------------------------------------------------


def export_centers(
    head: MarginSoftmaxLoss,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    chunk_classes: int = 65536,
) -> None:
    """Write the unit rows w/|w| of all classes as the tensor "centers" [C, D] of a safetensors file.

    A row of zeros stays one. The matrix is never copied as a whole: rows are scaled, sent and written in chunks. With
    sharded classes all ranks have to call it, and the first one writes; without, whoever calls it writes, so call it
    in one process. The file gets its name when it is complete.

    Args:
        head: its rows are written.
        path: of the file.
        dtype: float32 (default), bfloat16 or float16.
        chunk_classes: rows at a time.

    Raises:
        CheckpointError: on all ranks, with the rank that failed and the cause.
        TypeError, ValueError: an argument that does not fit; on the other ranks of a sharded head CheckpointError.
    """
    dtype = torch.float32 if dtype is None else dtype
    check_head(head)
    ranks = ranks_of(head)
    with ranks.heard():
        check_path("path", path)
        check_dtype("dtype", dtype, tuple(FORMATS))
        check_integer("chunk_classes", chunk_classes, 1)
    shard, path = shard_of(head), Path(path)
    writes = shard is None or shard.rank == 0
    unfinished = path.with_name(path.name + ".partial")

    def begin() -> None:
        head.check_rows()
        if writes:
            unfinished.write_bytes(header(head.num_classes, head.embedding_dim, dtype))

    def append(chunk: Tensor) -> None:
        if writes:
            with open(unfinished, "ab") as file:
                file.write(raw_bytes(chunk))

    def finish() -> None:
        if writes:
            with open(unfinished, "ab") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)

    try:
        ranks.together(begin)
        for chunk in unit_chunks(head, ranks, dtype, chunk_classes):
            ranks.together(partial(append, chunk))
        ranks.together(finish)
    except CheckpointError as error:
        if writes:
            unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"centers {path} were not written: {error}") from error


def unit_chunks(head: MarginSoftmaxLoss, ranks: Ranks, dtype: torch.dtype, size: int) -> Iterator[Tensor]:
    """Unit rows of all classes in order, on the first rank; on the others, as many tensors of the same shapes."""
    shard, weight = shard_of(head), head.weight.detach()
    rank, world_size = (0, 1) if shard is None else (shard.rank, shard.world_size)

    def chunk_of(owner: int, rows: slice) -> Tensor:
        return unit_rows(weight[rows], dtype) if owner == rank else torch.empty_like(weight[:0], dtype=dtype)

    for owner in range(world_size):
        first, last = shard_range(head.num_classes, owner, world_size)
        for start in range(0, last - first, size):
            rows = slice(start, min(start + size, last - first))
            chunk = ranks.together(partial(chunk_of, owner, rows))  # before the transfer: nobody waits in vain
            if shard is not None and owner != 0:
                chunk = transfer(chunk, rows, owner, shard)
            yield chunk


def header(num_classes: int, width: int, dtype: torch.dtype) -> bytes:
    """What stands before the numbers: its length, and names, shapes and places of the tensors, in JSON."""
    end = num_classes * width * dtype.itemsize
    entry = {"dtype": FORMATS[dtype], "shape": [num_classes, width], "data_offsets": [0, end]}
    text = json.dumps({"centers": entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def unit_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    rows = rows.to(accumulate(rows.dtype))
    return (rows * inverse_norm(torch.linalg.vector_norm(rows, dim=1))[:, None]).to(dtype)


def raw_bytes(chunk: Tensor) -> bytearray:
    buffer = bytearray(chunk.nbytes)
    torch.frombuffer(buffer, dtype=chunk.dtype).copy_(chunk.flatten())
    return buffer


# -- insightface -------------------------------------------------------------------------------------------------------


def import_insightface(folder: str | os.PathLike[str], head: MarginSoftmaxLoss) -> None:
    """Fill `head.weight` from the files that insightface's ranks wrote, `rank_{r}_softmax_weight.pt` or
    `checkpoint_gpu_{r}.pt`; for any number of ranks now. With sharded classes all ranks have to call it.

    Args:
        folder: with the files of all k ranks, of which r has C // k + (r < C % k) classes.
        head: of C classes.

    Raises:
        CheckpointError: on all ranks: files are missing, of both kinds, of another number of classes or another width;
            nothing is changed then.
    """
    check_head(head)
    ranks = ranks_of(head)
    with ranks.heard():
        check_path("folder", folder)
    ranks.together(partial(fill, Path(folder), head))


def fill(folder: Path, head: MarginSoftmaxLoss) -> None:
    """The rows of this rank, from all files."""
    head.check_rows()
    files = insightface_files(folder)
    counts = []
    for file in files:
        shape = tuple(insightface_rows(file).shape)
        if len(shape) != 2 or shape[1] != head.embedding_dim:
            raise CheckpointError(f"{file.name} has rows of shape {shape}, head has [..., {head.embedding_dim}]")
        counts.append(shape[0])
    if sum(counts) != head.num_classes:
        raise CheckpointError(f"{len(files)} files have {sum(counts)} classes, head has {head.num_classes}")
    for rank, (file, count) in enumerate(zip(files, counts, strict=True)):
        expected = head.num_classes // len(files) + (rank < head.num_classes % len(files))
        if count != expected:
            raise CheckpointError(f"{file.name} has {count} classes, rank {rank} of {len(files)} has {expected}")
    shard = shard_of(head)
    first, last = (0, head.num_classes) if shard is None else (shard.start, shard.stop)
    offset = 0
    for file, count in zip(files, counts, strict=True):
        start, stop = max(first, offset), min(last, offset + count)
        if start < stop:
            rows = insightface_rows(file)[start - offset : stop - offset]
            head.weight.detach()[start - first : stop - first].copy_(rows)
        offset += count


def insightface_files(folder: Path) -> list[Path]:
    """The files of all ranks, in order."""
    found = {}
    for kind in INSIGHTFACE:
        pattern = re.escape(kind).replace(r"\{\}", r"(\d+)")
        matches = [re.fullmatch(pattern, name) for name in os.listdir(folder)]
        found[kind] = {int(match[1]) for match in matches if match}
    kinds = [kind for kind in INSIGHTFACE if found[kind]]
    if len(kinds) != 1:
        names = " and ".join(kind.format("{r}") for kind in INSIGHTFACE)
        raise CheckpointError(f"{folder} has {'both' if kinds else 'neither'} {names}: one kind is needed")
    ranks = found[kinds[0]]
    missing = sorted(set(range(max(ranks) + 1)) - ranks)
    if missing:
        raise CheckpointError(f"{folder} has no {kinds[0].format(missing[0])}, but later ones")
    return [folder / kinds[0].format(rank) for rank in sorted(ranks)]


def insightface_rows(file: Path) -> Tensor:
    """The class rows of one rank; mapped, so that only those that are used are read."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written in the format before torch 1.6, which cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        try:
            content = content["state_dict_softmax_fc"]["weight"]
        except KeyError as error:
            raise CheckpointError(f"{file.name} has no {error.args[0]!r}") from None
    return content


# -- ranks -------------------------------------------------------------------------------------------------------------


def check_head(head: MarginSoftmaxLoss) -> None:
    if not isinstance(head, MarginSoftmaxLoss):
        raise TypeError(f"head must be a MarginSoftmaxLoss, got {type(head).__name__}")


def shard_of(head: MarginSoftmaxLoss) -> Shard | None:
    return head.shard


def ranks_of(head: MarginSoftmaxLoss) -> Ranks:
    """Those among which the classes are sharded; an unsharded head is a matter of one process."""
    shard = shard_of(head)
    return Ranks(alone=True) if shard is None else Ranks(shard.group)


def transfer(chunk: Tensor, rows: slice, owner: int, shard: Shard) -> Tensor:
    """The owner's chunk, on the first rank."""
    if shard.rank == owner:
        dist.send(chunk, group=shard.group, group_dst=0)
    elif shard.rank == 0:
        chunk = chunk.new_empty(rows.stop - rows.start, chunk.shape[1])
        dist.recv(chunk, group=shard.group, group_src=owner)
    return chunk
