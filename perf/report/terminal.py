"""Numbers and tables as text, and progress on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Column, Table

console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """12 ms, 3.4 s."""
    if pd.isna(value):
        return ""
    return f"{digits(value * 1e3)} ms" if value < 1.0 else f"{digits(value)} s"


def megabytes(value: float) -> str:
    """Of 10^6 bytes."""
    if pd.isna(value):
        return ""
    return f"{digits(value / 1e3)} GB" if value >= 1e3 else f"{digits(value)} MB"


def is_words(column: pd.Series) -> bool:
    """Whether a column is aligned to the left: not all of it are numbers or dashes."""
    return not column.astype(str).str.match(r"-?\d|-?$").all()


def markdown(frame: pd.DataFrame) -> str:
    align = ["left" if not place or is_words(frame[name]) else "right" for place, name in enumerate(frame)]
    return frame.to_markdown(index=False, colalign=align, disable_numparse=True) if len(frame) else ""


def boxed(frame: pd.DataFrame, heading: str) -> None:
    columns = [Column(str(name), justify="left" if is_words(frame[name]) else "right") for name in frame]
    box = Table(*columns, title=escape(heading), title_justify="left")
    for row in frame.itertuples(index=False):
        box.add_row(*(escape(str(cell)) for cell in row))
    console.print(box)


@contextmanager
def bar() -> Iterator[Callable[[float, str], None]]:
    """A bar with the time that is left on a terminal; a line for each size elsewhere."""
    if not console.is_terminal:
        last = [""]

        def line(part: float, words: str) -> None:
            size = words.partition(": ")[0]
            if size != last[0]:
                last[0] = size
                console.print(f"{part:4.0%}  {size}")

        yield line
        return
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda part, words: progress.update(task, completed=part, description=words[:100])
