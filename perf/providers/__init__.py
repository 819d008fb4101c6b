"""The competitors, found by looking into this folder.

A file names its classes in `PROVIDERS`. A file whose package is not installed is skipped, with the reason. A provider
with options is also asked for as `name:option=value`, e.g. `ours:retain=0.5`.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from typing import Any, NamedTuple

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


def split(name: str) -> tuple[str, dict[str, Any]]:
    """`name:option=value:...` taken apart; ValueError for a provider or an option that does not exist."""
    base, *settings = name.split(":")
    found, skipped = discover()
    if base not in found:
        missing = "".join(f"; {file} is skipped: {why}" for file, why in skipped.items())
        raise ValueError(f"no provider {base!r}; there are {', '.join(found)}{missing}")
    options: dict[str, Any] = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        if option not in found[base].options:
            raise ValueError(f"{base} has no option {option!r}; it has {', '.join(found[base].options) or 'none'}")
        try:
            options[option] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: {value!r} is not a number") from error
    return base, options


def make(name: str) -> Provider:
    """The provider that `name` asks for."""
    base, options = split(name)
    return discover().providers[base](**options)


def class_of(name: str) -> type[Provider] | None:
    """None for one that is not installed here."""
    return discover().providers.get(name.partition(":")[0])


def title(name: str) -> str:
    found = class_of(name)
    settings = name.split(":")[1:]
    return (found.title if found else name) + "".join(f", {setting}" for setting in settings)


def skipped_words(name: str) -> str:
    """Why a provider is not there: its package is missing. "" if nothing of the kind is known."""
    return "" if class_of(name) else "; ".join(f"{file}: {why}" for file, why in discover().skipped.items())
