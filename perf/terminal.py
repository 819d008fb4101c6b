"""Tables and progress on a terminal, and options that several commands have."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Box

console = Console(width=None if sys.stdout.isatty() else 140)
OUT = Path("reports/perf")
Out = Annotated[Path, typer.Option(help="folder of the CSVs, the page and its pictures")]
Reports = Annotated[Path, typer.Option(help="folder of the CSVs and tables")]
Say = Callable[[str], None]


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
def saying() -> Iterator[Say]:
    """A line of progress on a terminal, nothing elsewhere."""
    with console.status("") as status:
        yield status.update


@contextmanager
def bar() -> Iterator[Callable[[float, str], None]]:
    """A bar with the time that is left on a terminal; a line a size elsewhere."""
    if not console.is_terminal:
        last = [""]

        def line(part: float, words: str) -> None:
            size = words.partition(": ")[0]
            if size != last[0]:
                last[0] = size
                console.print(f"{part:4.0%}  {size}", highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda part, words: progress.update(task, completed=part, description=words[:100])


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
