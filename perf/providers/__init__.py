"""The competitors, found by looking into this folder.

A file names its classes in `PROVIDERS`. A file whose package is not installed is skipped, with the reason.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import NamedTuple

from perf.providers.base import Provider


class Found(NamedTuple):
    providers: dict[str, type[Provider]]
    skipped: dict[str, str]  # file -> reason


@functools.cache
def discover() -> Found:
    providers: dict[str, type[Provider]] = {}
    skipped: dict[str, str] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        try:
            found = importlib.import_module(f"{__name__}.{module.name}").PROVIDERS
        except ImportError as error:
            skipped[module.name] = str(error)
            continue
        for provider in found:
            if provider.name in providers:
                raise ValueError(f"two providers are called {provider.name!r}")
            providers[provider.name] = provider
    return Found(providers, skipped)
