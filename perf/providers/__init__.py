"""The competitors, found by looking into this folder.

Every subclass of `Provider` with a name is one. One with options is also asked for as `name:option=value`, e.g.
`ours:retain=0.5`. `load_file` adds somebody's own class.
"""

import functools
import hashlib
import importlib
import json
import pkgutil
import runpy
from pathlib import Path
from typing import Any

from perf.providers.base import OwnHead, Provider
from perf.suite.problem import DTYPES, LOSSES


@functools.cache
def discover() -> dict[str, type[Provider]]:
    """All by name, whether or not what they need is installed."""
    found: dict[str, type[Provider]] = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Provider)]
        found |= {kind.name: kind for kind in kinds if "name" in vars(kind)}  # base classes have none
    return found


def split(name: str) -> tuple[str, dict[str, Any]]:
    """`name:option=value:...` taken apart; ValueError for a provider or an option that does not exist."""
    base, *settings = name.split(":")
    found = discover()
    if base not in found:
        raise ValueError(f"no provider {base!r}; there are {', '.join(found)}")
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
    base, options = split(name)
    return discover()[base](**options)


def class_of(name: str) -> type[Provider]:
    return discover()[name.partition(":")[0]]


def title(name: str) -> str:
    return ", ".join([class_of(name).title, *name.split(":")[1:]])


def fingerprints() -> dict[str, str]:
    """Of the files of heads of your own: another one after a file was edited."""
    files = {name: Path(kind.source.rpartition(":")[0]) for name, kind in discover().items() if kind.source}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}


def load_file(source: str) -> str:
    """Make the class of `my_head.py:MyHead`, as in base.py, a provider; its name. ValueError says what it lacks."""
    file, _, class_name = source.rpartition(":")
    path = Path(file).resolve()
    if not class_name.isidentifier() or path.suffix != ".py":
        raise ValueError(f"a head of your own is asked for as file.py:Class, e.g. my_head.py:MyHead, got {source!r}")
    if not path.is_file():
        raise ValueError(f"there is no file {file}")
    source = f"{path}:{class_name}"
    if known := [name for name, kind in discover().items() if kind.source == source]:
        return known[0]
    try:
        content = runpy.run_path(str(path), run_name=path.stem)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    kind = content.get(class_name)
    if not isinstance(kind, type):
        classes = [name for name, value in content.items() if isinstance(value, type)]
        raise ValueError(f"{file} has no class {class_name}; it has {', '.join(classes) or 'none'}")
    if lacks := [name for name in ("name", "losses", "make", "step") if not hasattr(kind, name)]:
        raise ValueError(f"{class_name} lacks {', '.join(lacks)}; perf/providers/base.py says what they are")
    name, dtypes = kind.name, getattr(kind, "dtypes", OwnHead.dtypes)
    if not isinstance(name, str) or not name or set(name) & set(":,") or name in discover():
        raise ValueError(f"{class_name}.name must be a new name without ':' and ',', got {name!r}")
    for what, values, among in (("losses", kind.losses, LOSSES), ("dtypes", dtypes, DTYPES.values())):
        if not isinstance(values, tuple) or not values or not set(values) <= set(among):
            raise ValueError(f"{class_name}.{what} must be a tuple of {', '.join(among)}, got {values!r}")
    own = {"name": name, "title": getattr(kind, "title", name), "losses": kind.losses, "dtypes": dtypes, "kind": kind}
    discover()[name] = type(class_name, (OwnHead,), own | {"source": source})
    return name
