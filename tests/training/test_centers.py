"""Class centers: exported as unit rows, read from insightface's files, on any number of ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD, D, first_ranks, matrix, names
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tritonmargin as tm
from tritonmargin.checkpoint import CheckpointError, centers
from tritonmargin.distributed.shard import Shard

# -- export -----------------------------------------------------------------------------------------------------------


def head_of(c, seed, shard=None):
    head = tm.MarginSoftmaxLoss(D, c, process_group=None if shard is None else shard.group)
    weight = matrix(c, seed)
    weight[c // 2] = 0.0
    head.load_state_dict({"weight": weight})
    return head


def failing_second(function):
    """The function, whose second call raises ZeroDivisionError."""
    calls = itertools.count(1)
    return lambda *args: 1 / 0 if next(calls) == 2 else function(*args)


def exported(rank, folder):
    for count in range(1, WORLD + 1):
        group = first_ranks(count)
        if rank < count:
            for c in (11, 3):
                head = head_of(c, 1, Shard(c, group))
                tm.checkpoint.export_centers(head, f"{folder}/{count}_{c}", chunk_classes=2)
    dist.barrier()
    messages = []
    for failing, broken in ((0, "raw_bytes"), (2, "unit_rows")):
        whole = getattr(centers, broken)
        if rank == failing:
            setattr(centers, broken, failing_second(whole))
        with pytest.raises(CheckpointError) as raised:
            tm.checkpoint.export_centers(head_of(16, 1, Shard(16)), f"{folder}/broken", chunk_classes=2)
        setattr(centers, broken, whole)
        messages.append(str(raised.value))
    return messages


def test_centers_of_any_number_of_ranks_are_the_unit_rows(pool, tmp_path):
    messages = pool(exported, tmp_path)
    assert all(own == messages[0] for own in messages)
    for rank, message in zip((0, 2), messages[0], strict=True):
        assert f"broken were not written: rank {rank}: ZeroDivisionError" in message
    assert names(tmp_path) == sorted(f"{count}_{c}" for count in range(1, WORLD + 1) for c in (11, 3))
    for path in tmp_path.iterdir():
        c = int(path.name.split("_")[1])
        ((name, found),) = load_file(path).items()
        assert name == "centers"
        weight = head_of(c, 1).weight.detach()
        assert not found[c // 2].any()
        torch.testing.assert_close(found, torch.nn.functional.normalize(weight), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float64])
def test_centers_have_the_dtype_that_was_asked_for(tmp_path, dtype, kept):
    head = tm.MarginSoftmaxLoss(7, 33, dtype=kept)
    tm.checkpoint.export_centers(head, tmp_path / "centers.safetensors", dtype=dtype, chunk_classes=10)
    found = load_file(tmp_path / "centers.safetensors")["centers"]
    assert found.dtype == dtype
    expected = torch.nn.functional.normalize(head.weight.detach().double()).to(dtype)
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert names(tmp_path) == ["centers.safetensors"]


class Largest(TorchDispatchMode):
    """The most bytes that one operation made, beside views of the weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.most = weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.weight:
                self.most = max(self.most, tensor.untyped_storage().nbytes())
        return out


def test_the_export_never_copies_more_than_a_chunk(tmp_path):
    head = tm.MarginSoftmaxLoss(16, 4000)
    with Largest(head.weight) as largest:
        tm.checkpoint.export_centers(head, tmp_path / "centers", chunk_classes=100)
    assert 0 < largest.most <= 100 * 16 * 4


def test_bad_arguments_of_the_export_are_named(tmp_path):
    head = head_of(4, 1)
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got torch.int8"):
        tm.checkpoint.export_centers(head, tmp_path / "x", dtype=torch.int8)
    with pytest.raises(ValueError, match="chunk_classes must be an integer >= 1, got 0"):
        tm.checkpoint.export_centers(head, tmp_path / "x", chunk_classes=0)
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        tm.checkpoint.export_centers(head, tmp_path / "no" / "x")


# -- insightface -------------------------------------------------------------------------------------------------------


def write_insightface(folder, kind, c, ranks=3, legacy=False):
    """The files of insightface's ranks: their classes are split as theirs, and momenta lie beside."""
    folder.mkdir(exist_ok=True)
    first = 0
    for rank in range(ranks):
        count = c // ranks + (rank < c % ranks)
        rows = matrix(c, 6)[first : first + count].clone()
        first += count
        kwargs = {"_use_new_zipfile_serialization": not legacy}
        if kind == "rank":
            torch.save(rows, folder / f"rank_{rank}_softmax_weight.pt", **kwargs)
            torch.save(rows * 0, folder / f"rank_{rank}_softmax_weight_mom.pt", **kwargs)
        else:
            content = {"epoch": 3, "state_dict_softmax_fc": {"weight": torch.nn.Parameter(rows)}, "state_optimizer": {}}
            torch.save(content, folder / f"checkpoint_gpu_{rank}.pt", **kwargs)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["rank", "checkpoint"])
def test_a_head_is_filled_from_the_files_of_insightface(tmp_path, kind, legacy):
    write_insightface(tmp_path, kind, 10, legacy=legacy)
    head = tm.MarginSoftmaxLoss(D, 10)
    tm.checkpoint.import_insightface(tmp_path, head)
    assert torch.equal(head.weight.detach().cpu(), matrix(10, 6))


def imported(rank, folder):
    group = first_ranks(2)
    for kind in ("rank", "checkpoint"):
        for shard in [Shard(10)] + ([Shard(10, group)] if rank < 2 else []):
            head = head_of(10, 1, shard)
            tm.checkpoint.import_insightface(folder / kind, head)
            assert torch.equal(head.weight.detach(), matrix(10, 6)[shard.start : shard.stop])
    head = head_of(11, 1, Shard(11))
    with pytest.raises(CheckpointError, match="3 files have 10 classes, head has 11"):
        tm.checkpoint.import_insightface(folder / "rank", head)


def test_a_sharded_head_takes_its_rows_from_the_files_of_insightface(pool, tmp_path):
    for kind in ("rank", "checkpoint"):
        write_insightface(tmp_path / kind, kind, 10)
    pool(imported, tmp_path)


def test_files_of_insightface_that_do_not_fit_are_named(tmp_path):
    def fails(message, head=None):
        head = head_of(10, 1) if head is None else head
        before = head.weight.detach().clone()
        with pytest.raises(CheckpointError, match=message):
            tm.checkpoint.import_insightface(tmp_path, head)
        assert torch.equal(head.weight, before)

    fails(r"has neither rank_\{r\}_softmax_weight.pt and checkpoint_gpu_\{r\}.pt")
    write_insightface(tmp_path, "rank", 10)
    fails("3 files have 10 classes, head has 12", head_of(12, 1))
    wide = tm.MarginSoftmaxLoss(D + 1, 10)
    fails(r"rank_0_softmax_weight.pt has rows of shape \(4, 5\), head has \[..., 6\]", wide)
    (tmp_path / "rank_1_softmax_weight.pt").rename(tmp_path / "kept")
    fails("has no rank_1_softmax_weight.pt, but later ones")
    torch.save(matrix(3, 1), tmp_path / "rank_2_softmax_weight.pt")
    torch.save(matrix(3, 1), tmp_path / "rank_1_softmax_weight.pt")
    torch.save(matrix(4, 1), tmp_path / "rank_2_softmax_weight.pt")
    torch.save(matrix(3, 1), tmp_path / "rank_0_softmax_weight.pt")
    fails("rank_0_softmax_weight.pt has 3 classes, rank 0 of 3 has 4")
    write_insightface(tmp_path, "checkpoint", 10)
    fails(r"has both rank_\{r\}")
    for path in tmp_path.glob("rank*"):
        path.unlink()
    torch.save({"epoch": 1}, tmp_path / "checkpoint_gpu_1.pt")
    fails("checkpoint_gpu_1.pt has no 'state_dict_softmax_fc'")
