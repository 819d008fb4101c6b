"""A damaged file, a full disk, a rank or a process that dies: never half of a checkpoint, and the error says where."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpointed import assert_same, state_of
from ranks import CONTEXT, WORLD, D, matrix, names

from tritonmargin.checkpoint import CheckpointError, load, manifest, save
from tritonmargin.distributed.shard import Shard


def test_a_damaged_file_is_named_and_nothing_is_changed(tmp_path):
    for step in (1, 2):
        save(tmp_path, state_of(10, step), step)
    newest = tmp_path / "step_0000000002"
    for name in names(newest):
        content = (newest / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
        for damaged in (None, content[:-1], b"", content + b"\0", flipped):
            (newest / name).unlink(missing_ok=True)
            if damaged is not None:
                (newest / name).write_bytes(damaged)
            state = state_of(10, 7)
            with pytest.raises(CheckpointError, match=rf"step_0000000002 .*{name}.*step=: 1\)"):
                load(tmp_path, state)
            assert_same(state, state_of(10, 7))
        (newest / name).write_bytes(content)
    (newest / "__0_0.distcp").unlink()
    state = state_of(10, 7)
    assert load(tmp_path, state, step=1) == 1
    assert_same(state, state_of(10, 1))


def test_no_flipped_byte_of_the_manifest_changes_what_is_read(tmp_path):
    save(tmp_path, {"weight": matrix(3, 1)}, 1)
    path = tmp_path / "step_0000000001" / "manifest.json"
    content = path.read_bytes()
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        state = {"weight": torch.zeros(3, D)}
        try:
            load(tmp_path, state)
            assert torch.equal(state["weight"], matrix(3, 1))
        except CheckpointError:
            refused += 1
            assert not state["weight"].any()
    assert refused > len(content) / 2


def rewritten(folder, change):
    """The newest manifest, changed, with the checksums that the files have now."""
    path = sorted(folder.glob("step_*"))[-1]
    content = json.loads((path / "manifest.json").read_text())
    content["files"] = {name: manifest.fingerprint(path / name) for name in content["files"]}
    change(content["files"])
    (path / "manifest.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("missing", ["all of them", "__0_0.distcp", ".metadata"])
def test_a_manifest_that_does_not_list_a_file_is_refused(tmp_path, missing):
    save(tmp_path, state_of(10, 1), 1)
    rewritten(tmp_path, lambda files: files.clear() if missing == "all of them" else files.pop(missing))
    state = state_of(10, 7)
    with pytest.raises(CheckpointError, match=r"is not one of the files in manifest\.json"):
        load(tmp_path, state)
    assert_same(state, state_of(10, 7))


def test_a_file_beside_those_of_the_manifest_is_refused(tmp_path):
    save(tmp_path, state_of(10, 1), 1)
    (tmp_path / "step_0000000001" / "__1_0.distcp").write_bytes(b"of another run")
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is not one of the files in manifest\.json"):
        load(tmp_path, state_of(10, 7))


class Planted:
    """What runs code when it is unpickled."""

    def __init__(self, path, call=os.mkdir):
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (str(self.path),)


@pytest.mark.parametrize(
    "call", [os.mkdir, builtins.eval, torch.load, pickle.loads, Path.mkdir], ids=lambda call: call.__name__
)
def test_code_in_the_names_of_tensors_does_not_run(tmp_path, call):
    save(tmp_path, state_of(10, 1), 1)
    target = tmp_path / "planted"
    path = tmp_path / "step_0000000001"
    (path / ".metadata").write_bytes(pickle.dumps(Planted(target, call)))
    rewritten(tmp_path, lambda files: None)
    state = state_of(10, 7)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged, or not to be trusted: it asks for"):
        load(tmp_path, state)
    assert not target.exists()
    assert_same(state, state_of(10, 7))


def test_no_name_leads_out_of_what_torch_writes():
    for module, name in (
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("torch", "load"), ("torch.serialization", "load"), ("builtins", "getattr"), ("pathlib", "Path"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="asks for"):
            manifest.NamesOfTensors(io.BytesIO()).find_class(module, name)


def of_different_steps(rank, folder):
    with pytest.raises(CheckpointError, match="all ranks have to save the same step") as raised:
        save(folder, state_of(10, 4, Shard(10)), 5 + (rank == 1))
    dist.barrier()
    return str(raised.value)


def test_ranks_that_save_different_steps_are_told_so_and_leave_nothing(pool, tmp_path):
    told = pool(of_different_steps, tmp_path)
    assert all("step_0000000006 here and step_0000000005 on rank 0" in words for words in told)
    assert not list(tmp_path.iterdir())


def damaged(rank, folder):
    save(folder, state_of(10, 4, Shard(10)), 1)
    if rank == 0:
        part = Path(folder) / "step_0000000001" / "__2_0.distcp"
        content = bytearray(part.read_bytes())
        content[len(content) // 3] ^= 1
        part.write_bytes(content)
    dist.barrier()
    state = state_of(10, 2, Shard(10))
    with pytest.raises(CheckpointError, match=r"__2_0\.distcp is damaged") as raised:
        load(folder, state)
    assert_same(state, state_of(10, 2, Shard(10)))
    return str(raised.value)


def test_all_ranks_hear_of_a_damaged_file(pool, tmp_path):
    assert len(set(pool(damaged, tmp_path))) == 1


# -- failures ----------------------------------------------------------------------------------------------------------


class FullDisk:
    """After `room` bytes, writing into files of these names fails, as it does on a full disk."""

    def __init__(self, pattern, room=100):
        self.pattern, self.room = pattern, room
        self.open, self.path_open = builtins.open, Path.open

    def __enter__(self):
        builtins.open = self.opener(self.open)
        Path.open = self.opener(self.path_open)

    def __exit__(self, *error):
        builtins.open, Path.open = self.open, self.path_open

    def opener(self, plain):
        def opened(path, mode="r", *args, **kwargs):
            stream = plain(path, mode, *args, **kwargs)
            return Full(stream, self.room) if self.pattern in str(path) and "r" not in mode else stream

        return opened


class Full:
    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.stream.write(content)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()


def failures(rank, folder):
    messages = []
    shard = Shard(10)
    save(folder, state_of(10, 1, shard), 1)
    for asynchronous in (False, True):
        for failing, where in ((1, ".distcp"), (3, ".distcp"), (0, ".distcp"), (0, ".metadata"), (0, "manifest.json")):
            with FullDisk(where if rank == failing else "nothing"):
                with pytest.raises(CheckpointError) as raised:
                    save(folder, state_of(10, 2, shard), 2, asynchronous=asynchronous).result()
                messages.append((failing, str(raised.value)))
            dist.barrier()
        state = state_of(10, 2, shard) | ({"extra": (torch.ones(1),)} if rank == 2 else {})
        with pytest.raises(CheckpointError) as raised:
            save(folder, state, 2, asynchronous=asynchronous).result()
        messages.append((2, str(raised.value)))
        with pytest.raises(CheckpointError, match="rank 3: state has 'more' here or on rank 0 only"):
            save(folder, state_of(10, 2, shard) | ({"more": 1} if rank == 3 else {}), 2)
        dist.barrier()
        assert names(folder) == ["step_0000000001"]
        state = state_of(10, 7, shard)
        assert load(folder, state) == 1
        assert_same(state, state_of(10, 1, shard))
    save(folder, state_of(10, 3, shard), 3)  # and then all is well
    assert load(folder, state) == 3
    assert_same(state, state_of(10, 3, shard))
    return messages


def test_a_full_disk_of_one_rank_stops_the_save_of_all_and_leaves_the_last_one(pool, tmp_path):
    messages = pool(failures, tmp_path)
    assert all(own == messages[0] for own in messages)
    for failing, message in messages[0]:
        assert "step_0000000002 was not written" in message
        assert f"rank {failing}: " in message
        assert sum(f"rank {rank}: " in message for rank in range(WORLD)) == 1
        assert "tuple of tensors" in message if failing == 2 else "OSError: [Errno 28] No space left" in message


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(CheckpointError, match=r"inner/step|file/step.*rank 0: (FileExists|NotADirectory)Error"):
            save(folder, {"seed": 1}, 1)
    with pytest.raises(CheckpointError, match="NotADirectoryError"):
        load(tmp_path / "file", {"seed": 1})


def test_ranks_on_different_file_systems_are_told_so(tmp_path):
    (tmp_path / "a.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"different files in a.partial, such as __1_0.distcp"):
        manifest.publish(tmp_path / "a.partial", tmp_path / "a", 1, 2, {"__1_0.distcp": {}})


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def killed(folder, before, step, answers):
    """A save of `step` over those before, killed in front of each of its operations on files, one after the other."""
    for moment in range(1000):
        place = Path(folder) / str(moment)
        for seed in before:
            save(place, state_of(10, seed), seed)
        child = os.fork()
        if child == 0:
            left = [moment]

            def hook(event, args, left=left, place=place):
                if event in FILE_EVENTS and str(place) in str(args[0]):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save(place, state_of(10, 9), step)
            os._exit(0)
        died = os.waitpid(child, 0)[1]
        state = state_of(10, 7)
        found = load(place, state)
        assert_same(state, state_of(10, state["epoch"]))
        save(place, state_of(10, 8), 30)
        assert load(place, {"epoch": 0}) == 30
        assert names(place)[-1] == "step_0000000030"
        assert not any(name.endswith(".partial") for name in names(place))
        answers.append((died, found, state["epoch"]))
        if died == 0:
            return


def report_killed(pipe, folder):
    reports = []
    for before, step in (((1, 2), 3), ((1, 2), 2), ((2,), 2)):
        answers = []
        killed(f"{folder}/{len(before)}_{step}", before, step, answers)
        reports.append(answers)
    pipe.send(reports)


def test_a_save_that_is_killed_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    pipe, end = CONTEXT.Pipe()
    process = CONTEXT.Process(target=report_killed, args=(end, tmp_path))  # without threads, to be forked
    process.start()
    end.close()
    new, *replaced = pipe.recv()
    process.join()
    # Step 2 until the new one has its name, then step 3.
    assert [found for _, found, _ in new] == sorted(found for _, found, _ in new)
    assert {(found, epoch) for _, found, epoch in new} == {(2, 2), (3, 9)}
    assert new[-1] == (0, 3, 9)
    assert len(new) > 10
    # The old step 2, also between the two renames, when it has another name; then the new one.
    for answers in replaced:  # with an older one beside it, and alone
        assert {(found, epoch) for _, found, epoch in answers} == {(2, 2), (2, 9)}
        assert answers[-1] == (0, 2, 9)


def test_a_save_that_fails_in_the_background_says_so_when_asked(tmp_path):
    with FullDisk(".distcp"):
        future = save(tmp_path, {"weight": matrix(10, 1)}, 1, asynchronous=True)
        with pytest.raises(CheckpointError, match="No space left"):
            future.result()
    save(tmp_path, {"weight": matrix(10, 1)}, 2)
    assert names(tmp_path) == ["step_0000000002"]
    with pytest.raises(CheckpointError, match="No space left"):
        future.result()


def test_a_save_that_fails_in_the_background_is_a_warning_where_nobody_asks(tmp_path):
    def fail() -> None:
        save(tmp_path, {"weight": matrix(10, 1)}, 1, asynchronous=True)
        assert load(tmp_path, {"weight": matrix(10, 1)}) is None  # waits for it

    with FullDisk(".distcp"), pytest.warns(UserWarning, match=r"step_0000000001 was not written: .*No space left"):
        fail()


def dies(rank, folder):
    shard = Shard(10)
    save(folder, state_of(10, 1, shard), 1)
    if rank == 1:
        sys.addaudithook(lambda event, args: event == "open" and "__1_" in str(args[0]) and os.kill(os.getpid(), 9))
    with pytest.raises(CheckpointError, match="step_0000000002 was not written"):
        save(folder, state_of(10, 2, shard), 2)
    os._exit(1)


def test_a_rank_that_dies_leaves_the_last_checkpoint(pool, tmp_path):
    pool(dies, tmp_path, may_die=tuple(range(WORLD)))
    state = state_of(10, 7)
    assert load(tmp_path, state) == 1
    assert_same(state, state_of(10, 1))
