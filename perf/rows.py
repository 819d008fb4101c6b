"""Rows that are measured one after another while there is time, and kept for the next run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

UP = "the time was up"  # why a row was not measured

Row = dict[str, Any]


def measured(
    asked: list[Row],
    found: list[Row] | None,
    measure: Callable[[Row], Row],
    left: Callable[[], float],
    keep: Callable[[list[Row]], Any],
) -> list[Row]:
    """A row for each that is asked for, with what `measure` says of it.

    found: rows of an earlier run; what they were asked for is their key.
    left: seconds that may still pass.
    keep: called with all rows after each that was measured.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in asked[0])

    known = {key(row): row for row in found or [] if row.get("failed") != UP}
    rows = [known.get(key(row), row | {"failed": UP}) for row in asked]
    for place, row in enumerate(asked):
        if key(row) not in known and left() > 0:
            rows[place] = row | measure(row)
            keep(rows)
    return rows
