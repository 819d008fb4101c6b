"""Processes that start in milliseconds."""

from __future__ import annotations

import functools
import multiprocessing
import pkgutil
from pathlib import Path
from typing import Any

PROVIDERS = Path(__file__).parent / "providers"


@functools.cache
def context() -> Any:
    """Processes forked from one that has imported everything and computed nothing."""
    found = multiprocessing.get_context("forkserver")
    names = [f"perf.providers.{module.name}" for module in pkgutil.iter_modules([str(PROVIDERS)])]
    found.set_forkserver_preload(["perf.worker", *names, "torch._dynamo"])  # one that is not installed is passed over
    return found
