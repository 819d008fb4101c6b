"""The page of a run: one HTML file with everything in it, a summary in Markdown, and the pictures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from perf.report import plots, statistics
from perf.report.statistics import SWEPT, Findings, pivot, times
from perf.report.terminal import digits, is_words, markdown, megabytes, seconds
from perf.suite import machine
from perf.suite.results import COLUMNS, Results

TEMPLATE = Path(__file__).with_name("page.html")  # jinja2
SIZE = ["loss", "dtype", "N", "D", "C"]


def write(folder: Path, results: Results) -> Path:
    """`index.html`, `summary.md` and a PNG of each picture; the page's path."""
    found = statistics.find(results)
    drawn, shown = pictures(found), content(found, results)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(seconds=seconds, megabytes=megabytes, digits=digits)
    template = environment.from_string(TEMPLATE.read_text())
    (folder / "index.html").write_text(template.render(**shown, pictures=drawn, zip=zip, is_words=is_words))
    (folder / "summary.md").write_text(summary(shown, [picture.name for picture in drawn]))
    return folder / "index.html"


def on_terminal(results: Results) -> list[tuple[str, pd.DataFrame]]:
    """The first screen for a terminal, and what is missing."""
    found = statistics.find(results)
    tables = [(statistics.sentence(found), headline(found)), ("not measured, or not all of it", missing(found))]
    return [table for table in tables if len(table[1]) or table is tables[0]]


def pictures(found: Findings) -> list[plots.Picture]:
    """Time and memory of the first screen, then time where other losses and dtypes were measured most."""
    if found.main is None:
        return []
    wanted = [("time", plots.draw_time, found.main), ("memory", plots.draw_memory, found.main)]
    for (loss, dtype), part in statistics.right(found.rows).groupby(["loss", "dtype"], sort=False):
        main = statistics.main_of(part)
        if main and main.sizes > 1 and (loss, dtype) != (found.main.loss, found.main.dtype):
            wanted.append((f"time_{loss}_{dtype}", plots.draw_time, main))
    return [each for name, draw, main in wanted if (each := plots.picture(name, draw, found, main))]


def content(found: Findings, results: Results) -> dict[str, Any]:
    """What the template shows."""
    rows = found.rows
    used = {number: facts for number, facts in results.runs.items() if number in set(rows["run"].astype(str))}
    lines = plots.curves(found, found.main) if found.main else []
    fits = [(style["label"], statistics.fits(part)) for part, style in lines if "ours-" not in part["provider"].iloc[0]]
    best = results.ceilings.sort_values("per_second").drop_duplicates(["kind", "dtype"], keep="last")
    return {
        "sentence": statistics.sentence(found), "main": found.main, "headline": headline(found),
        "fits": [(name, end) for name, end in fits if end > 0], "missing": missing(found), "schema": COLUMNS,
        "runs": {f"Run {name}, plan {facts['plan']}: {machine.one_line(facts)}": facts for name, facts in used.items()},
        "device": rows["device"].iloc[0] if len(rows) else "cpu", "band": found.compared["band"].median(),
        "settings": statistics.settings(found, swept=False), "swept": statistics.settings(found, swept=True),
        "behind": statistics.behind(found), "errors": errors(found), "ceilings": best,
        "wrong": rows[rows["wrong"] != ""].drop_duplicates(["provider", "loss", "dtype", "wrong"]),
        "all": rows[rows["samples"] > 0].groupby(SIZE, sort=False),
    }  # fmt: skip


def headline(found: Findings) -> pd.DataFrame:
    """The table of the first screen; columns without a value are left out."""
    frame = pd.DataFrame([
        {"classes": f"{row.C:,}, {row.dtype}", "ours": seconds(row.median_s), "CUDA graph": seconds(row.graph_s),
         "fastest other": seconds(row.median_s_other) + " (one step)" * (row.samples_other == 1),
         "its CUDA graph": seconds(row.graph_s_other),
         "ours is": (times(row.ratio_other) if row.others else "") + ", within noise" * (row.verdict_other == "equal"),
         "which": row.title_other if row.others else f"none: {row.why}",
         "our memory": megabytes(row.beyond_mb), "its memory": megabytes(row.beyond_mb_other)}
        for row in found.headline.itertuples()
    ])  # fmt: skip
    return frame[[name for name in frame if (frame[name] != "").any()]]


def errors(found: Findings) -> pd.DataFrame:
    """The larger error of the two gradients against float64, at the worst width; a column for each loss and dtype."""
    rows = found.rows[found.rows["error_dx"].notna() & ~found.rows["provider"].str.contains(SWEPT)]
    rows = rows.assign(worst=rows[["error_dx", "error_dw"]].max(axis=1)).sort_values("worst", ascending=False)
    rows = rows.drop_duplicates(["provider", "loss", "dtype"]).sort_index()
    return pivot(rows, rows["loss"] + ", " + rows["dtype"], rows["worst"].map("{:.1e}".format))


def missing(found: Findings) -> pd.DataFrame:
    """What was not measured, or not all of it, and why."""
    rows = found.rows[(found.rows[["note", "wrong"]] != "").any(axis=1) | (found.rows["samples"] == 0)]
    rows = rows.assign(note=rows["note"].where(rows["wrong"] == "", "WRONG, not ranked: " + rows["wrong"]))
    lines = []
    for (title, note), part in rows.groupby(["title", "note"], sort=False):
        sizes = [f"{r.loss}, {r.dtype}, N={r.N}, D={r.D}, C={r.C:,}" for r in part.drop_duplicates(SIZE).itertuples()]
        more = f" and {len(sizes) - 2} more" if len(sizes) > 2 else ""
        lines.append({"": title, "why": note, "cases": str(len(part)), "where": "; ".join(sizes[:2]) + more})
    return pd.DataFrame(lines)


def summary(shown: dict[str, Any], names: list[str]) -> str:
    """The same in Markdown, without the long tables."""
    sections = {
        "Where ours is not ahead": markdown(shown["behind"]), "Settings": markdown(shown["settings"]),
        "Errors against float64": markdown(shown["errors"]), "Not measured, or not all": markdown(shown["missing"]),
        "Measured on": "\n".join(f"- {run}" for run in shown["runs"]),
    }  # fmt: skip
    pictures = [f"![{name}]({name}.png)" for name in names]
    parts = ["# Speed and memory", shown["sentence"], markdown(shown["headline"]), *pictures]
    parts += [f"## {heading}\n\n{said}" for heading, said in sections.items() if said]
    return "\n\n".join(part for part in parts if part) + "\n"
