"""Folders of checkpoints: their names, and the manifest that tells whether one is as it was written."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path

from tritonmargin.distributed.agreement import CheckpointError, describe

MANIFEST = "manifest.json"
PARTIAL = ".partial"
REPLACED = ".replaced.partial"
READ_BYTES = 1 << 20


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
