"""Checkpoints: back bit for bit on any number of ranks, written at once or in the background."""

from __future__ import annotations

import pickle
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpointed import assert_same, local, state_of
from ranks import WORLD, D, first_ranks, matrix, names
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import tritonmargin as tm
from tritonmargin.checkpoint import CheckpointError, load, manifest, save
from tritonmargin.distributed import agreement
from tritonmargin.distributed.shard import Shard
from tritonmargin.optim import RowAdamW

# -- round trips -------------------------------------------------------------------------------------------------------


def round_trips(rank, folder):
    groups = {count: first_ranks(count) for count in range(1, WORLD + 1)}
    for c in (10, 3):
        for writers in range(1, WORLD + 1):
            place = f"{folder}/{c}_{writers}"
            if rank < writers:
                save(place, state_of(c, 4, Shard(c, groups[writers])), 17, group=groups[writers])
            dist.barrier()
            for readers in range(1, WORLD + 1):
                if rank < readers:
                    shard = Shard(c, groups[readers])
                    state = state_of(c, 1, shard)
                    assert load(place, state, group=groups[readers]) == 17
                    assert_same(state, state_of(c, 4, shard))
            plain = state_of(c, 1)
            assert load(place, plain) == 17  # every rank the whole matrix
            assert_same(plain, state_of(c, 4))


def test_any_number_of_ranks_reads_what_any_number_wrote_bit_for_bit(pool, tmp_path):
    pool(round_trips, tmp_path)
    for place in tmp_path.iterdir():
        state = state_of(int(place.name.split("_")[0]), 1)
        assert load(place, state) == 17
        assert_same(state, state_of(len(state["head"]["weight"]), 4))


def test_one_process_alone_needs_no_group_and_hears_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert save(tmp_path / "new" / "folder", state_of(10, 4), 3).result() == tmp_path / "new/folder/step_0000000003"
        state = state_of(10, 1)
        assert load(str(tmp_path / "new" / "folder"), state) == 3
    assert_same(state, state_of(10, 4))


def test_values_come_back_in_the_dicts_and_lists_that_the_caller_holds(tmp_path):
    save(tmp_path, state_of(10, 4), 0)
    state = state_of(10, 1)
    schedule, last, weight = state["schedule"], state["optimizer"]["param_groups"], state["head"]["weight"]
    load(tmp_path, state)
    assert_same(schedule, state_of(10, 4)["schedule"])
    assert last[0]["params"] == [0, 1, 2, 3]
    assert torch.equal(weight, matrix(10, 4))


def test_parts_of_a_checkpoint_can_be_read(tmp_path):
    save(tmp_path, state_of(10, 4), 0)
    head = {"head": state_of(10, 1)["head"]}
    load(tmp_path, head)
    assert_same(head["head"], state_of(10, 4)["head"])


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    def training():
        torch.manual_seed(0)
        head = tm.MarginSoftmaxLoss(D, 20)
        return head, RowAdamW(head.parameters(), lr=0.1)

    def train(head, optimizer, steps):
        for step in steps:
            head(matrix(6, step), torch.arange(6) + step).backward()
            optimizer.step()
            optimizer.zero_grad()

    head, optimizer = training()
    train(head, optimizer, range(3))
    save(tmp_path, {"head": head.state_dict(), "optimizer": optimizer.state_dict()}, 3)
    train(head, optimizer, range(3, 6))
    other, others_optimizer = training()
    train(other, others_optimizer, range(7, 8))  # an optimizer has no state before its first step
    state = {"head": other.state_dict(), "optimizer": others_optimizer.state_dict()}
    assert load(tmp_path, state) == 3
    other.load_state_dict(state["head"])
    others_optimizer.load_state_dict(state["optimizer"])
    train(other, others_optimizer, range(3, 6))
    assert torch.equal(other.weight, head.weight)


def trained(group, steps):
    """A head of 5 classes, none on the last of 4 ranks, and its optimizer; sharded if there is a group."""
    torch.manual_seed(0)
    head = tm.MarginSoftmaxLoss(
        D, 5, bias=True, process_group=group, class_weight=torch.arange(1.0, 6.0), sample_rate=0.5
    )
    optimizer = RowAdamW(head.parameters(), lr=0.1)
    for step in range(steps):
        head(matrix(6, step), (torch.arange(6) + step) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head, optimizer, {"head": head.state_dict(), "optimizer": optimizer.state_dict()}


def heads_of_any_ranks(rank, folder):
    groups = {count: first_ranks(count) for count in range(1, WORLD + 1)}
    for writers in (0, *groups):  # 0: a head of one process, without a group
        group = groups.get(writers)
        if rank < max(writers, 1):
            state = trained(group, 3)[2]
            place = f"{folder}/{writers}"
            save(place, state, 3, group=group or groups[1], asynchronous=writers % 2 == 0).result()
        dist.barrier()
        head, optimizer, whole = trained(None, 1)
        load(f"{folder}/{writers}", whole)
        for readers in groups:
            if rank < readers:
                head, optimizer, state = trained(groups[readers], 1)
                for tensors in (state["head"], *state["optimizer"]["state"].values()):
                    assert all(isinstance(tensor, DTensor) for tensor in tensors.values())
                load(f"{folder}/{writers}", state, group=groups[readers])
                head.load_state_dict(state["head"])
                optimizer.load_state_dict(state["optimizer"])
                own = slice(head.shard.start, head.shard.stop)
                for name, tensor in (*head.named_parameters(), ("class_weight", head.class_weight)):
                    assert torch.equal(tensor, whole["head"][name][own])
                assert torch.equal(head.sampler, whole["head"]["sampler"])
                for place, parameter in enumerate(head.parameters()):
                    for name, tensor in optimizer.state[parameter].items():
                        expected = whole["optimizer"]["state"][place][name]
                        assert torch.equal(tensor, expected if name == "step" else expected[own])


def test_trained_heads_and_optimizers_come_back_on_any_number_of_ranks(pool, tmp_path):
    pool(heads_of_any_ranks, tmp_path)


def test_tensors_are_cast_to_the_dtype_of_the_state(tmp_path):
    save(tmp_path, {"weight": matrix(10, 4)}, 0)
    state = {"weight": torch.zeros(10, D, dtype=torch.float64)}
    load(tmp_path, state)
    assert torch.equal(state["weight"], matrix(10, 4).double())


def test_the_newest_complete_checkpoint_is_read_unless_another_is_asked_for(tmp_path):
    assert load(tmp_path / "missing", {"seed": 0}) is None
    (tmp_path / "step_0000000009.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert load(tmp_path, {"seed": 0}) is None
    for step in (3, 1, 12_345_678_901):
        save(tmp_path, {"seed": step}, step, keep=3)
    for step, expected in ((None, 12_345_678_901), (1, 1), (3, 3)):
        state = {"seed": 0}
        assert load(tmp_path, state, step=step) == expected
        assert state["seed"] == expected
    with pytest.raises(CheckpointError, match=r"step_0000000009 .*no such checkpoint.*step=: 1, 3, 12345678901\)"):
        load(tmp_path, {"seed": 0}, step=9)


def test_old_checkpoints_are_removed_and_never_the_one_just_written(tmp_path):
    for step in (5, 6, 7):
        save(tmp_path, {"seed": step}, step)
    assert names(tmp_path) == ["step_0000000006", "step_0000000007"]
    save(tmp_path, {"seed": 2}, 2)  # gone on from an older one
    assert names(tmp_path) == ["step_0000000002", "step_0000000007"]
    save(tmp_path, {"seed": 8}, 8, keep=1)
    assert names(tmp_path) == ["step_0000000008"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for seed in (1, 2):
        save(tmp_path, {"seed": seed}, 5)
    state = {"seed": 0}
    assert load(tmp_path, state) == 5
    assert state["seed"] == 2
    assert names(tmp_path) == ["step_0000000005"]


# -- shapes and names --------------------------------------------------------------------------------------------------


def grown(rank, folder):
    for writers in (1, 3, 4):
        place, group = f"{folder}/{writers}", first_ranks(writers)
        if rank < writers:
            save(place, state_of(7, 4, Shard(7, group)), 1, group=group)
        dist.barrier()
        for readers in range(1, WORLD + 1):
            group = first_ranks(readers)
            if rank >= readers:
                continue
            for c in (8, 13, 29):
                shard = Shard(c, group)
                state = state_of(c, 1, shard)
                with pytest.raises(
                    CheckpointError, match=rf"'head.weight' has shape \(7, 5\) .*\({c}, 5\) in state, pass"
                ):
                    load(place, state, group=group)
                assert_same(state, state_of(c, 1, shard))
                load(place, state, group=group, resize="grow")
                expected = matrix(c, 1)
                expected[:7] = matrix(7, 4)
                assert torch.equal(local(state["head"]["weight"]), expected[shard.start : shard.stop])
                counts = torch.arange(c, dtype=torch.int32) + torch.where(torch.arange(c) < 7, 4, 1).int()
                ours = local(state["optimizer"]["state"][0]["row_steps"])
                assert torch.equal(ours, counts[shard.start : shard.stop])
                assert state["epoch"] == 4
            shard = Shard(6, group)
            state = state_of(6, 1, shard)
            with pytest.raises(CheckpointError, match=r"'head.weight' has shape \(7, 5\) in .* \(6, 5\) in state,"):
                load(place, state, group=group, resize="grow")
            assert_same(state, state_of(6, 1, shard))


def test_more_classes_keep_their_new_rows_and_only_if_asked_for(pool, tmp_path):
    pool(grown, tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(7, D), "n": {"x": torch.zeros(2)}}, "'n.x' is in state and not in the checkpoint"),
        ({"more": {}, "weight": torch.zeros(7, D)}, "'more' is in state and not in the checkpoint"),
        ({"weight": None}, "'weight' is a Python value in state and a tensor in the checkpoint"),
        ({"optimizer": {"lr": 0.1}}, "0: 'optimizer' has no tensors in state but in the checkpoint, such as"),
        ({"optimizer": {"lr": 0.1, "x": torch.zeros(1)}}, "'optimizer.exp_avg' is in the checkpoint and not in state"),
        ({"optimizer": {"exp_avg": torch.zeros(8, D), "lr": 0.1}}, r"'optimizer.exp_avg' has shape \(7, 5\)"),
        ({"optimizer": {"exp_avg": torch.zeros(7, D), "lr": torch.zeros(1)}}, "'optimizer.lr' is a tensor in"),
        ({"weight": torch.zeros(8, D + 1)}, r"'weight' has shape \(7, 5\) in the checkpoint and \(8, 6\) in state \("),
        ({"weight": torch.zeros(())}, r"'weight' has shape \(7, 5\) in the checkpoint and \(\) in state \("),
        ({"weight": torch.nn.Linear(2, 2)}, r"'weight' is a Linear: put its state_dict\(\) into state"),
        ({"weight": (torch.zeros(7, D),)}, "'weight' is a tuple of tensors"),
        ({"weight": torch.zeros(7, D), "a": {"b": torch.zeros(1)}, "a.b": 1}, "two entries of the name 'a.b'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path, state, message):
    save(tmp_path, {"weight": matrix(7, 4), "optimizer": {"exp_avg": matrix(7, 5), "lr": 0.1}}, 1)
    before = pickle.dumps(state)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, state)
    assert pickle.dumps(state) == before


def test_bad_arguments_are_named(tmp_path):
    for arguments, message in (
        (dict(step=-1), "step must be an integer >= 0, got -1"),
        (dict(step=1, keep=0), "keep must be an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            save(tmp_path, {}, **arguments)
    with pytest.raises(TypeError, match="state must be a dict, got list"):
        save(tmp_path, [], 1)
    with pytest.raises(ValueError, match="resize must be one of 'grow', got 'shrink'"):
        load(tmp_path, {}, resize="shrink")
    with pytest.raises(TypeError, match="state must be a dict, got NoneType"):
        load(tmp_path, None)


def of_the_first_rank(rank, folder):
    """A BatchNorm's buffers differ between ranks; what is kept is all of one rank."""
    state = {f"buffer {number}": torch.full((1 + number,), float(rank)) for number in range(8)}
    save(folder, {"net": state}, 1)
    loaded = {"net": {name: torch.full_like(buffer, -1.0) for name, buffer in state.items()}}
    load(folder, loaded)
    return [float(buffer.unique()) for buffer in loaded["net"].values()]


def test_what_ranks_have_alike_is_that_of_the_first(pool, tmp_path):
    assert pool(of_the_first_rank, tmp_path) == [[0.0] * 8] * WORLD


def of_other_shapes(rank, folder):
    """As a torch optimizer's state of a sharded head is: it could not be loaded again."""
    save(folder, {"fine": torch.ones(3)}, 1)
    with pytest.raises(CheckpointError, match=r"rank 1: 'momentum' is \(4, 2\) torch.float32 here and \(3, 2\)"):
        save(folder, {"momentum": torch.ones(3 + rank, 2)}, 2)
    return load(folder, {"fine": torch.zeros(3)})


def test_ranks_that_hold_other_shapes_are_refused_when_they_save(pool, tmp_path):
    assert pool(of_other_shapes, tmp_path) == [1] * WORLD


# -- in the background -------------------------------------------------------------------------------------------------


def asynchronous(rank, folder):
    shard = Shard(10)
    for step in (1, 2, 3):
        state = state_of(10, step, shard)
        future = save(folder, state, step, asynchronous=True)
        for _ in range(5):  # a training step meanwhile
            for tensor in tree_leaves(state):
                if isinstance(tensor, torch.Tensor):
                    local(tensor).fill_(77)
            state["schedule"]["last"].clear()
            total = torch.ones(3)
            dist.all_reduce(total)
            assert total.tolist() == [WORLD] * 3
    loaded = state_of(10, 7, shard)
    assert load(folder, loaded) == 3
    assert_same(loaded, state_of(10, 3, shard))
    assert future.result() == Path(folder) / "step_0000000003"


def test_a_state_that_changes_meanwhile_is_saved_as_it_was(pool, tmp_path):
    pool(asynchronous, tmp_path)
    assert names(tmp_path) == ["step_0000000002", "step_0000000003"]


def test_a_save_in_the_background_comes_back_at_once(tmp_path, monkeypatch):
    go, publish = threading.Event(), manifest.publish
    monkeypatch.setattr("tritonmargin.checkpoint.save_load.publish", lambda *args: (go.wait(), publish(*args)))
    state = {"weight": matrix(10, 1), "names": ["a"]}
    future = save(tmp_path, state, 1, asynchronous=True)
    state["weight"].zero_()
    state["names"].append("b")
    assert not future.done()
    go.set()
    assert future.result(30) == tmp_path / "step_0000000001"
    load(tmp_path, state)
    assert_same(state, {"weight": matrix(10, 1), "names": ["a"]})


# -- groups ------------------------------------------------------------------------------------------------------------


def outside(rank):
    group = first_ranks(2)
    if rank >= 2:
        with pytest.raises(ValueError, match="group: this rank is not part of it"):
            agreement.Ranks(group)


def test_ranks_that_are_not_part_of_a_group_are_told_so(pool):
    pool(outside)
