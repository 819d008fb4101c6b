"""What ttsem executes: the module of a launch, made by Triton and parsed by ttsem once for all processes.

ttsem alone compiles a kernel down to the GPU's machine code, prints the module after Triton's first stage, and parses
that in every process. Here Triton stops after that stage unless asked, and the parsed module is kept in Triton's cache.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.runtime.cache import get_cache_manager
from ttsem import harness, mlir

KEPT = "module.ttsem"


class Made(NamedTuple):
    text: str
    module: Any


class Modules:
    """Of all launches of this process. to_the_end: whether kernels are compiled down to machine code too."""

    def __init__(self, to_the_end: bool) -> None:
        self.to_the_end = to_the_end
        self.made: dict[str, Made] = {}
        self.by_text: dict[str, Any] = {}
        self.compiled: set[str] = set()

    def text(self, record: Any, stage: str, target: Any, *rest: Any) -> str:
        """In the place of `harness.ir_for_launch`."""
        assert stage == "ttir", stage
        assert not any(rest), rest
        options, signature, constexprs, attrs = harness._specialize(record.fn, record.args, record.kwargs, target)
        source = harness._source_class(record.fn)(fn=record.fn, signature=signature, constexprs=constexprs, attrs=attrs)
        key = "-".join((triton.__version__, source.hash(), options.hash(), str(target)))
        if self.to_the_end and key not in self.compiled:
            triton.compile(source, target=target, options=options.__dict__)
            self.compiled.add(key)
        if key not in self.made:
            made = kept(key, lambda: self.make(record, stage, target))
            self.made[key] = made
            self.by_text[made.text] = made.module
        return self.made[key].text

    def make(self, record: Any, stage: str, target: Any) -> Made:
        mlir.enable_generic_printing()
        text = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return Made(text, self.parse_anew(text))

    parse_anew = staticmethod(mlir.parse)

    def parse(self, text: str) -> Any:
        """In the place of `mlir.parse`."""
        return self.by_text[text] if text in self.by_text else self.parse_anew(text)


def kept(key: str, make: Callable[[], Made]) -> Made:
    """From Triton's cache, or made and put there."""
    folder = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    path = folder.get_file(KEPT)
    if path is not None:
        with open(path, "rb") as file:
            return Made(*pickle.loads(zlib.decompress(file.read())))
    made = make()
    folder.put(zlib.compress(pickle.dumps(tuple(made)), 1), KEPT)
    return made


@contextmanager
def made_once(to_the_end: bool) -> Iterator[Modules]:
    """While open, ttsem takes modules from here, and a kernel's arguments are bound by a function made once."""
    modules, make = Modules(to_the_end), harness.create_function_from_signature
    binders: dict[tuple[int, Any], tuple[Any, Any]] = {}

    @functools.wraps(make)
    def binder(signature: Any, parameters: Any, backend: Any) -> Any:
        key = id(signature), backend.target
        if key not in binders:
            binders[key] = signature, make(signature, parameters, backend)  # kept, so that no other one has its id
        return binders[key][1]

    with (
        mock.patch.object(harness, "ir_for_launch", modules.text),
        mock.patch.object(mlir, "parse", modules.parse),
        mock.patch.object(harness, "create_function_from_signature", binder),
    ):
        yield modules
