"""Folders of checkpoints: their names, and the manifest that tells whether one is as it was written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from tritonmargin.distributed.agreement import CheckpointError, describe

MANIFEST = "manifest.json"
PARTIAL = ".partial"
REPLACED = ".replaced.partial"
METADATA = ".metadata"  # of torch.distributed.checkpoint: a pickle
READ_BYTES = 1 << 20
OTHER_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (filesystem.__name__, "_StorageInfo"),
}


def name_of(step: int) -> str:
    return f"step_{step:010d}"


def complete_steps(folder: Path) -> dict[int, str]:
    """The names of the complete checkpoints by their steps, in order.

    One that was about to be replaced when its job was killed counts, by the name that it was set aside with.
    """
    found: dict[int, str] = {}
    for name in sorted(os.listdir(folder)) if folder.exists() else ():
        match = re.fullmatch(rf"step_(\d{{10,}})({re.escape(REPLACED)})?", name)
        if match:
            found.setdefault(int(match[1]), name)  # its own name comes first
    return dict(sorted(found.items()))


def clear(folder: Path) -> None:
    """Remove what killed saves have left, and give a checkpoint that they had set aside its name back."""
    for step, name in complete_steps(folder).items():
        if name.endswith(REPLACED):
            os.rename(folder / name, folder / name_of(step))
    for leftover in folder.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)


def publish(partial: Path, path: Path, step: int, world_size: int, files: dict[str, dict[str, int]]) -> None:
    """Write the manifest and give the folder its name; a checkpoint that has the name already makes room."""
    unseen = set(files) ^ set(os.listdir(partial))
    if unseen:
        raise CheckpointError(
            f"the ranks see different files in {partial.name}, such as {min(unseen)}: they need the same file system"
        )
    content = json.dumps({"step": step, "world_size": world_size, "files": files}, indent=1)
    with open(partial / MANIFEST, "w") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(partial)
    replaced = path.with_name(path.name + REPLACED)
    if path.exists():
        os.rename(path, replaced)
    os.rename(partial, path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(folder: Path, step: int, keep: int) -> None:
    """Leave `step`, just written, and the newest others. It need not be the newest: runs go on from older ones."""
    others = [other for other in complete_steps(folder) if other != step]
    for other in others[: max(0, len(others) - keep + 1)]:
        path = folder / name_of(other)
        doomed = path.with_name(path.name + PARTIAL)  # half removed, it must not look complete
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            os.rename(path, doomed)
        except OSError as error:
            warnings.warn(f"tritonmargin: {path} could not be removed: {error}", stacklevel=2)
        shutil.rmtree(doomed, ignore_errors=True)


def read_manifest(path: Path, step: int) -> dict[str, dict[str, int]]:
    """Size and checksum of every file."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = {name: {key: int(entry[key]) for key in ("size", "crc32")} for name, entry in manifest["files"].items()}
        if manifest["step"] != step:
            raise ValueError(f"it is of step {manifest['step']}")
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {describe(error)}") from error
    return files


def check_names(path: Path, files: Mapping[str, object]) -> None:
    """CheckpointError unless the folder has the manifest's files and no others."""
    there = {name for name in os.listdir(path) if not name.startswith(".nfs")}  # removed, and still open somewhere
    different = sorted({*there, METADATA} ^ {*files, MANIFEST})
    if different:
        name = different[0]
        where = f"is in {MANIFEST} and not in the folder" if name in files else f"is not one of the files in {MANIFEST}"
        raise CheckpointError(f"{name} {where}")


class NamesOfTensors(pickle.Unpickler):
    """Unpickles what torch.distributed.checkpoint says about tensors, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name.isidentifier():
            found = getattr(sys.modules.get(module), name, None)
            own = module == metadata.__name__ and isinstance(found, type) and found.__module__ == module
            known = module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath")
            known |= (module, name) in OTHER_NAMES or (module == "torch" and isinstance(found, torch.dtype))
            if own or known:
                return found
        raise CheckpointError(f"{METADATA} is damaged, or not to be trusted: it asks for {module}.{name}")


def check_metadata(path: Path) -> None:
    """CheckpointError if `.metadata` holds what torch would not have written: torch runs whatever it says."""
    try:
        with open(path / METADATA, "rb") as stream:
            NamesOfTensors(stream).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{METADATA} is damaged: {describe(error)}") from error


def problem(file: Path, expected: dict[str, int]) -> str | None:
    """What is wrong with a file."""
    if not file.exists():
        return f"{file.name} is missing"
    size = file.stat().st_size
    if size != expected["size"]:
        return f"{file.name} has {size} bytes, {expected['size']} were written"
    if fingerprint(file) != expected:
        return f"{file.name} is damaged: its checksum is not the one that was written"
    return None


def fingerprint(file: Path) -> dict[str, int]:
    size = crc = 0
    with open(file, "rb") as stream:
        while block := stream.read(READ_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"size": size, "crc32": crc}


def sync_folder(folder: Path) -> None:
    """Names are part of a folder, and a folder is written to the disk like a file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
