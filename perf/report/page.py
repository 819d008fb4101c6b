"""The page of a run: one HTML file with everything in it, a summary in Markdown, and the pictures as files."""

import math
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from perf.report import plots, statistics
from perf.report.statistics import SWEPT, Findings, cost, pivot, times
from perf.report.terminal import digits, is_words, markdown, megabytes, seconds
from perf.suite import machine
from perf.suite.results import COLUMNS, Results

SIZE = ["loss", "dtype", "N", "D", "C"]
NO_RUNS = "runs.json is missing: on which machine this was measured is not known"


def write(folder: Path, results: Results) -> Path:
    """`index.html`, `summary.md` and a PNG of each picture; the page's path."""
    found = statistics.find(results)
    drawn, shown = pictures(found), content(found, results)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    templates, escape = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.select_autoescape()  # in HTML
    how = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=templates, autoescape=escape, **how)
    environment.filters.update(seconds=seconds, megabytes=megabytes, digits=digits, markdown=markdown)
    for name, template in (("index.html", "page.html"), ("summary.md", "summary.jinja")):
        made = environment.get_template(template).render(**shown, pictures=drawn, zip=zip, is_words=is_words)
        (folder / name).write_text(made)
    return folder / "index.html"


def on_terminal(results: Results) -> list[tuple[str, pd.DataFrame]]:
    """The first screen for a terminal, or all that was measured if nothing stands there; and what is missing."""
    found = statistics.find(results)
    first = headline(found, statistics.first(found).sort_index()) if len(found.headline) else measured(found)
    tables = [(statistics.sentence(found), first), ("not measured, or not all of it", missing(found))]
    return [table for table in tables if len(table[1]) or table is tables[0]]


def pictures(found: Findings) -> list[plots.Picture]:
    """Time and memory of the first screen, then time where other losses and dtypes were measured most.

    None for a single number of classes: it would be a picture of dots, and the table says it.
    """
    if found.main is None or found.main.sizes < 2:
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
    runs = {f"Run {name}, plan {facts['plan']}: {machine.one_line(facts)}": facts for name, facts in used.items()}
    lines = plots.curves(found, found.main) if found.main else []
    fits = [(style["label"], statistics.fits(part)) for part, style in lines if "ours-" not in part["provider"].iloc[0]]
    best = results.ceilings.sort_values("per_second").drop_duplicates(["kind", "dtype"], keep="last")
    return {
        "sentence": statistics.sentence(found), "main": found.main,
        "headline": headline(found, statistics.first(found).sort_index()), "sizes": headline(found, found.headline),
        "fits": [(name, end) for name, end in fits if end > 0], "missing": missing(found), "schema": COLUMNS,
        "runs": runs,
        "device": rows["device"].iloc[0] if len(rows) else "cpu", "band": found.compared["band"].median(),
        "samples": len(results.samples), "machine": [*runs] if results.runs else [NO_RUNS],
        "out": plots.OUT,
        "settings": statistics.settings(found, swept=False), "swept": statistics.settings(found, swept=True),
        "behind": statistics.behind(found), "errors": errors(found), "ceilings": best,
        "wrong": rows[rows["wrong"] != ""].drop_duplicates(["provider", "loss", "dtype", "wrong"]),
        "all": rows[rows["samples"] > 0].groupby(SIZE, sort=False),
    }  # fmt: skip


def headline(found: Findings, lines: pd.DataFrame) -> pd.DataFrame:
    """The table of the first screen; columns without a value are left out, other missing values are dashes."""
    heads = {(r.title, r.dtype, r.C, r.mode): cost(r.median_s, r.beyond_mb, r.samples)
             for r in statistics.heads(found).itertuples()}  # fmt: skip
    frame = pd.DataFrame([
        {"classes": f"{row.C:,}, {row.dtype}", "mode": statistics.launch(row.mode, found.rows["device"].iloc[0]),
         "ours": cost(row.median_s, math.nan, row.samples),
         "fastest other": cost(row.median_s_other, math.nan, row.samples_other),
         "ours is": "" if pd.isna(row.ratio_other) else
                    times(row.ratio_other) + ", within noise" * (row.verdict_other == "equal"),
         "which": row.title_other if row.others else f"none: {row.why}",
         "our memory": megabytes(row.beyond_mb), "its memory": megabytes(row.beyond_mb_other),
         **{title: heads.get((title, row.dtype, row.C, row.mode), "") for title, *_ in heads}}
        for row in lines.itertuples()
    ])  # fmt: skip
    return frame[[name for name in frame if (frame[name] != "").any()]].replace("", "-")


def measured(found: Findings) -> pd.DataFrame:
    """All that was measured, a line each: where neither ours nor another code to hold it to was."""
    rows = found.rows[(found.rows["samples"] > 0) & (found.rows["wrong"] == "")]
    return pd.DataFrame([
        {"": r.title, "mode": r.mode, "where": where(r), "takes": cost(r.median_s, r.beyond_mb, r.samples)}
        for r in rows.itertuples()
    ])  # fmt: skip


def where(row: Any) -> str:
    return f"{row.loss}, {row.dtype}, N={row.N}, D={row.D}, C={row.C:,}"


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
        sizes = [where(r) for r in part.drop_duplicates(SIZE).itertuples()]
        more = f" and {len(sizes) - 2} more" if len(sizes) > 2 else ""
        lines.append({"": title, "why": note, "cases": str(len(part)), "where": "; ".join(sizes[:2]) + more})
    return pd.DataFrame(lines)
