"""The page of a run: one HTML file with everything in it, a summary in Markdown, and the pictures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from perf import correct, machine, plots
from perf.findings import Findings, find, megabytes, percent, seconds, sentence, size_words
from perf.results import COLUMNS, Results
from perf.terminal import digits

# Columns that hold words.
WORDS = ("mode", "promised", "fastest, exact", "least memory, exact", "fastest other", "why", "where", "said")
TEMPLATE = Path(__file__).with_name("page.html")  # jinja2


def write(out: Path, results: Results) -> Path:
    """`index.html`, `summary.md` and a PNG per picture; the page's path."""
    found = find(results)
    drawn = []
    for picture in plots.PICTURES:
        images = plots.images(picture, found)
        if images is None:
            continue
        (out / f"{picture.name}.png").write_bytes(images.png)
        drawn.append({
            "name": picture.name, "title": picture.title, "alt": picture.alt,
            "light": images.light, "dark": images.dark,
        })  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals.update(zip=zip, words=WORDS)
    environment.filters.update(seconds=seconds, megabytes=megabytes, digits=digits)
    page = environment.from_string(TEMPLATE.read_text()).render(**content(found, results), pictures=drawn)
    path = out / "index.html"
    path.write_text(page)
    (out / "summary.md").write_text(summary(found, results, [picture["name"] for picture in drawn]))
    return path


def content(found: Findings, results: Results) -> dict[str, Any]:
    """What the template shows."""
    return {
        "sentence": sentence(found),
        "noise": noise_words(found),
        "headline": found.headline.to_dict("records"),
        "behind": [behind_words(line) for line in behind(found)],
        "tables": [
            ("What was promised", promised_table(found)),
            ("Which setting should I use?", settings_table(found)),
            ("How the cost grows: time = a + b N C D", growth_table(found)),
        ],
        "wrong": [f"{row.title} ({row.loss}, {row.dtype}): {row.wrong}" for row in found.wrong.itertuples()],
        "all": full_table(found),
        "failed": failed_table(found),
        "machines": machines(results),
        "ceilings": ceilings_table(results),
        "low": low_precision(results),
        "schema": COLUMNS,
        "checked": checked_words(found),
    }


def noise_words(found: Findings) -> str:
    if found.noise != found.noise:
        return "The noise was not measured."
    return (
        f"Noise: the ratio of two yardsticks of a round is known to {100 * found.noise:.1f} % at the typical size "
        "(standard error of its median). A row is ahead or behind from three standard errors of its own ratio on."
    )


def checked_words(found: Findings) -> str:
    rows = found.rows
    checked = rows[rows["error_dx"].notna()].drop_duplicates(["provider", "loss", "dtype", "D"])
    wrong = checked[checked["wrong"] != ""]
    limits = ", ".join(
        f"{value:.2g} in {dtype}" for dtype, value in correct.BIAS.items() if dtype in set(rows["dtype"])
    )
    right = (
        f"{len(checked) - len(wrong)} of {len(checked)} combinations of code, loss, dtype and width agree with float64"
    )
    said = f"{right}." if wrong.empty else f"{right}; the others are not ranked."
    return f"{said} A gradient that is too large or too small as a whole is wrong from these parts of it on: {limits}."


def behind(found: Findings) -> list[dict[str, Any]]:
    """Who is faster than ours, a line per code, loss and dtype: in how many cases, and by how much at most."""
    lines = []
    size = ["loss", "dtype", "N", "D", "C", "mode"]
    for (title, loss, dtype), part in found.behind.groupby(["title", "loss", "dtype"], sort=False):
        most = part.loc[part["times_ours"].idxmin()]
        ours = found.rows[
            (found.rows["provider"] == ("ours" if most["work"] == "all classes" else "ours-sampled"))
            & (found.rows[size] == most[size]).all(axis=1)
        ]
        memory = ""
        if len(ours) and pd.notna(most["beyond_mb"]) and pd.notna(ours["beyond_mb"].iloc[0]):
            memory = f", with {megabytes(most['beyond_mb'])} of memory to our {megabytes(ours['beyond_mb'].iloc[0])}"
        classes = part["C"].max()
        lines.append({
            "title": title, "loss": loss, "dtype": dtype, "cases": len(part), "times": 1.0 / most["times_ours"],
            "where": f"{most['mode']}, N={most['N']}, D={most['D']}, C={most['C']:,}", "memory": memory,
            "classes": int(classes),
        })  # fmt: skip
    return sorted(lines, key=lambda line: -line["times"])


def behind_words(line: dict[str, Any]) -> str:
    cases = f"{line['cases']} case{'' if line['cases'] == 1 else 's'}, C up to {line['classes']:,}"
    return (
        f"{line['title']}, {line['loss']}, {line['dtype']}: up to {digits(line['times'])} times as fast as ours "
        f"({line['where']}){line['memory']}; {cases}"
    )


def low_precision(results: Results) -> str:
    """What a product in bfloat16 costs on this machine, beside the passes that cost the same in any dtype."""
    rate = results.ceilings[results.ceilings["kind"] == "GEMM"].groupby("dtype")["per_second"].max()
    if not {"float32", "bfloat16"} <= set(rate.index):
        return ""
    times = rate["float32"] / rate["bfloat16"]
    if times > 1.0:
        return f"In bfloat16 a product takes {digits(times)} times as long on this machine. "
    return (
        f"In bfloat16 a product takes {times:.0%} of its time in float32 on this machine, and the passes over class "
        "rows cost the same, so they weigh more. "
    )


# -- tables of words ---------------------------------------------------------------------------------------------


def promised_table(found: Findings) -> pd.DataFrame:
    if found.promised.empty:
        return pd.DataFrame()
    return pd.DataFrame([
        {"": row.title, "mode": row.mode, "size": size_words(row._asdict()), "promised": row.promised,
         "found": digits(row.found), "met": "yes" if row.met else "NO"}
        for row in found.promised.itertuples()
    ])  # fmt: skip


def settings_table(found: Findings) -> pd.DataFrame:
    if found.settings.empty:
        return pd.DataFrame()
    return pd.DataFrame([
        {
            "size": size_words(row), "fastest, exact": row["fastest"], "time": seconds(row["fastest_s"]),
            "memory": megabytes(row["fastest_mb"]), "least memory, exact": row["smallest"],
            "its time": seconds(row["smallest_s"]), "its memory": megabytes(row["smallest_mb"]),
            "a tenth of the classes": seconds(row["sampled_s"]),
        }
        for row in found.settings.to_dict("records")
    ])  # fmt: skip


def growth_table(found: Findings) -> pd.DataFrame:
    if found.growth.empty:
        return pd.DataFrame()
    return pd.DataFrame([
        {"": row.title, "dtype": row.dtype, "a, ms": digits(row.a_ms), "b, ps": digits(row.b_ps),
         "sizes": str(row.sizes), "typical error": f"{row.typical_error:.0%}"}
        for row in found.growth.itertuples()
    ])  # fmt: skip


def full_table(found: Findings) -> list[tuple[str, pd.DataFrame]]:
    """All measured rows, a table per size."""
    tables = []
    rows = found.rows[found.rows["samples"] > 0]
    for size, part in rows.groupby(["loss", "dtype", "N", "D", "C"], sort=False):
        loss, dtype, n, d, c = size
        tables.append((f"{loss}, {dtype}, N={n}, D={d}, C={c:,}", pd.DataFrame({
            "": part["title"], "mode": part["mode"], "median": part["median_s"].map(seconds),
            "quartiles": [f"{seconds(a)} to {seconds(b)}" for a, b in zip(part["q25_s"], part["q75_s"], strict=True)],
            "samples": part["samples"].astype(int).astype(str), "GEMMs": part["x_gemm"].map(digits),
            "times ours": part["times_ours"].map(digits), "noise": part["band"].map(percent),
            "of the limit": part["fraction"].map(percent),
            "peak": part["peak_mb"].map(megabytes), "without dW": part["beyond_mb"].map(megabytes),
            "said": part["wrong"].where(part["wrong"] != "", part["note"]),
        })))  # fmt: skip
    return tables


def failed_table(found: Findings) -> pd.DataFrame:
    rows = found.failed
    if rows.empty:
        return pd.DataFrame()
    lines = []
    for (title, note), part in rows.groupby(["title", "note"], sort=False):
        sizes = list(dict.fromkeys(size_words(row) for row in part.to_dict("records")))
        more = f" and {len(sizes) - 2} more" if len(sizes) > 2 else ""
        lines.append({"": title, "why": note, "cases": str(len(part)), "where": "; ".join(sizes[:2]) + more})
    return pd.DataFrame(lines)


def ceilings_table(results: Results) -> pd.DataFrame:
    scale = {"flop": (1e9, "GFLOP/s"), "element": (1e9, "G elements/s"), "byte": (1e9, "GB/s")}
    return pd.DataFrame([
        {"": f"{row.kind} {row.dtype}".strip() if isinstance(row.dtype, str) else row.kind,
         "at best": f"{digits(row.per_second / scale[row.unit][0])} {scale[row.unit][1]}", "run": str(row.run)}
        for row in results.ceilings.itertuples()
    ])  # fmt: skip


def machines(results: Results) -> list[str]:
    """A line per run that rows are from."""
    used = set(results.rows["run"].astype(str))
    lines = []
    for number, facts in results.runs.items():
        if number in used:
            versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
            took = f", {facts['seconds'] / 60:.0f} minutes" if "seconds" in facts else ""
            plan = f"plan {facts['plan']} ({facts['budget']}){took}"
            lines.append(f"Run {number}: {machine.one_line(facts)}; {plan}; {versions}.")
    return lines


# -- elsewhere ---------------------------------------------------------------------------------------------------


def on_terminal(results: Results) -> list[tuple[str, pd.DataFrame]]:
    """The first screen, for a terminal."""
    found = find(results)
    tables = []
    if len(found.headline):
        tables.append((sentence(found), headline_table(found)))
    promised = promised_table(found)
    if len(promised):
        tables.append(("what was promised", promised))
    return tables


def headline_table(found: Findings) -> pd.DataFrame:
    return pd.DataFrame([
        {"size": size_words(row), "ours": seconds(row["ours_s"]), "GEMMs": digits(row["x_gemm"]),
         "of the limit": percent(row["fraction"]),
         "fastest other": row["other"], "its time": row["other_time"],
         "times ours": digits(row["times"]) + (" (noise)" if row["level"] else ""),
         "ours, memory": megabytes(row["ours_mb"]), "its memory": megabytes(row["other_mb"])}
        for row in found.headline.to_dict("records")
    ])  # fmt: skip


def summary(found: Findings, results: Results, pictures: list[str]) -> str:
    """The same in Markdown, without the long tables."""
    parts = ["# Speed and memory", sentence(found), noise_words(found), checked_words(found)]
    if len(found.headline):
        parts += ["ArcFace, forward and backward; memory is beyond W, its gradient and the inputs.",
                  markdown(headline_table(found))]  # fmt: skip
    slower = behind(found)
    if slower:
        parts.append("## Where ours is not ahead")
        parts.append("\n".join(f"- {behind_words(line)}" for line in slower))
    for heading, table in content(found, results)["tables"]:
        if len(table):
            parts += [f"## {heading}", markdown(table)]
    parts += [f"![{name}]({name}.png)" for name in pictures]
    parts += ["## Measured on", *machines(results), markdown(ceilings_table(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(frame: pd.DataFrame) -> str:
    align = ["left" if name in ("", "size", "met", *WORDS) else "right" for name in frame]
    return frame.to_markdown(index=False, colalign=align, disable_numparse=True) if len(frame) else ""
