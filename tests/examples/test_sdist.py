"""The source distribution has every file of the repository, and its tests can be collected there."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cases import cpu_only

pytestmark = cpu_only

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


def files() -> set[str]:
    """Those of the repository; of an unpacked distribution, all but what tools have left."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
        return {name for name in names if not name.startswith(".ci/")}  # it checks a repository
    found = {path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    left = {".venv", ".cache", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "build", "dist"}
    made = {"PKG-INFO", "setup.cfg"}
    return {
        str(each) for each in found if each.parts[0] not in left | made and ".egg-info" not in each.parts[0]
    }  # fmt: skip


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, from a copy: building leaves files in the source."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in files():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=folder / "source", check=True, capture_output=True, text=True, timeout=120)
    with tarfile.open(folder / done.stdout.splitlines()[-1]) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (inside,) = (folder / "unpacked").iterdir()
    return inside


def test_every_file_is_in_it(unpacked: Path) -> None:
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert files() <= there
    made = {name for name in there if name in ("PKG-INFO", "setup.cfg") or name.startswith("tritonmargin.egg-info/")}
    assert there - made == files()


def test_what_it_says_of_itself(unpacked: Path) -> None:
    said = email.message_from_string((unpacked / "PKG-INFO").read_text())
    assert (said["Name"], said["License-Expression"], said["License-File"]) == ("tritonmargin", "MIT", "LICENSE")
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    assert said["Requires-Python"] == ">=3.11"


@pytest.mark.slow
def test_its_tests_are_collected(unpacked: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=unpacked, env=environment | {"PYTHONPATH": str(unpacked)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    collected = {line.partition(": ")[0] for line in done.stdout.splitlines() if ": " in line}
    # Some files are about machines with kernels, and skip themselves elsewhere.
    everywhere = {name for name in files() if name.startswith(("tests/losses/test_", "tests/distributed/test_"))}
    assert everywhere - collected <= {"tests/losses/test_formulas.py"}
    assert collected <= files()
