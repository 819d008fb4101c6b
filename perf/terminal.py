"""Tables and progress on a terminal, and options that several commands have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table as Box

from perf import timing

console = Console(width=None if sys.stdout.isatty() else 140)
Out = Annotated[Path, typer.Option(help="folder of CSVs, machine.json, perf.md and plots")]


def boxed(frame: pd.DataFrame, heading: str) -> None:
    box = Box(title=heading, title_justify="left")
    for name in frame:
        box.add_column(
            str(name),
            justify="left"
            if name in ("", "mode", "row", "size", "bound", "met", "part", "setting", "exchange", "what")
            else "right",
        )
    for row in frame.itertuples(index=False):
        box.add_row(*map(str, row))
    console.print(box)


@contextmanager
def saying() -> Iterator[timing.Say]:
    """A line of progress on a terminal, nothing elsewhere."""
    with console.status("") as status:
        yield status.update
