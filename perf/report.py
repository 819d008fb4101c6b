"""The page and its tables, from the CSVs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from perf import audit, machine
from perf.bounds import NAMES, check, derive
from perf.tables import tables

SIZE = ["dtype", "N", "D", "C"]
METHOD = """
Rows of a table are timed in one process, round after round (A B C A B C ...), after a warm-up in which their losses are
compared. A time is the median over the rounds, with its quartiles; a ratio is the median of the ratios within a round.
"GEMM" is one product N x D by D x C into a buffer that exists, in the same dtype. Gradients are dropped before each
step and outside its time, so a step pays for the memory of the gradient it makes. "(no margin)" rows compute less:
nothing is normalised. "x ours" divides them by `tm.linear_cross_entropy`, all others by `tm.margin_cross_entropy`.
"""
MEMORY = """
Peak of one forward and backward beyond W, its gradient and the inputs, in a process of its own, 1 MB = 10^6 bytes.
"MB" is torch.profiler's record of allocations, the gradient of W taken out from the moment it exists. "MB (rss)" is the
growth of the resident set (VmHWM over VmRSS before) minus the gradient's size, which understates rows whose peak comes
before their gradient. D = 128 at C = 10^6: W and its gradient are 512 MB each there.
"""
LINEAR = (
    "Time per class, and how it compares with C = 10^5 in the same run. D = 128, so that C = 10^6 fits small machines."
)
AUDIT = """
Formulas (`perf/counts.py`) give flops, elements and bytes of a step; each divided by the rate that this machine reaches
in such work at the chunk's shapes (`perf/rates.py`), and summed, is the prediction. The roofline is the larger of
products and memory traffic alone.
"""


def load(out: Path) -> dict[str, pd.DataFrame]:
    """The tables found in `out`, in the order of the page."""
    found = {}
    for name in [*tables("full"), "audit"]:
        path = out / f"{name}.csv"
        if path.exists():
            frame = pd.read_csv(path, keep_default_na=True)
            found[name] = frame if name == "audit" else check(derive(frame))
    return found


def page(frames: dict[str, pd.DataFrame], facts: dict[str, Any]) -> str:
    """The whole report in Markdown."""
    parts = ["# Speed and memory", *machines(facts), verdict(frames)]
    titles = {name: table.title for name, table in tables("full").items()}
    notes = {"memory": MEMORY, "linear": LINEAR, "audit": AUDIT}
    pictures = {"memory": "memory.png", "linear": "linear.png", "fp32": "speed.png"}
    parts.append(METHOD.strip())
    for name, frame in frames.items():
        parts.append(f"## {titles.get(name, 'What bounds the rows')}")
        if name in notes:
            parts.append(notes[name].strip())
        if name in pictures:
            parts.append(f"![{name}]({pictures[name]})")
        if name == "audit":
            parts.append(markdown(audit_table(frame)))
            continue
        show = {"memory": memory_table, "linear": linear_table}.get(name, speed_table)
        for size, rows in frame.groupby(
            [*SIZE] if name not in ("memory", "linear") else ["dtype", "N", "D"], sort=False
        ):
            parts += [f"### {heading(size)}", markdown(show(rows)), *left_out(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def short(frames: dict[str, pd.DataFrame], facts: dict[str, Any]) -> str:
    """The tables that a README needs: whole steps and the forward at N = 256, and memory."""
    parts = []
    for name in ("fp32", "bf16"):
        if name in frames:
            frame = frames[name]
            rows = frame[(frame["N"] == frame["N"].max()) & (frame["mode"] != "no-grad") | (frame["bound"] != "")]
            for size, chosen in rows.groupby(SIZE, sort=False):
                parts += [f"{heading(size)}:", markdown(speed_table(chosen, brief=True))]
    if "memory" in frames:
        for size, rows in frames["memory"].groupby(["dtype", "N", "D"], sort=False):
            parts += [
                f"Peak memory beyond W, its gradient and the inputs, {heading(size)}:",
                markdown(memory_table(rows)),
            ]
    if "linear" in frames:
        rows = frames["linear"]
        parts += [f"Time against C, {heading(tuple(rows[['dtype', 'N', 'D']].iloc[0]))}:", markdown(linear_table(rows))]
    return "\n\n".join([*parts, *machines(facts)])


def write(out: Path, frames: dict[str, pd.DataFrame]) -> Path:
    """`perf.md` and the pictures."""
    from perf import plots  # matplotlib takes a second to import

    path = out / "perf.md"
    path.write_text(page(frames, facts(out)))
    plots.draw(frames, out)
    return path


def facts(out: Path) -> dict[str, Any]:
    """`machine.json`: what each table was measured on."""
    path = out / "machine.json"
    return json.loads(path.read_text()) if path.exists() else {}


# -- tables ------------------------------------------------------------------------------------------------------


def speed_table(frame: pd.DataFrame, brief: bool = False) -> pd.DataFrame:
    rows = frame[frame["samples"] > 0]
    shown = {
        "": rows["title"],
        "mode": rows["mode"].where(rows["provider"] != "gemm", ""),
        "ms": (rows["median_s"] * 1e3).map(digits),
    }
    if not brief:
        shown["quartiles"] = [
            f"{digits(a * 1e3)} - {digits(b * 1e3)}" for a, b in zip(rows["q25"], rows["q75"], strict=True)
        ]
    shown |= {"x GEMM": rows["ratio_to_gemm"].map(digits), "x ours": others(rows, "times_ours")}
    if not brief:
        shown["samples"] = rows["samples"].astype(int).astype(str)
    return pd.DataFrame(shown | {"bound": rows["bound"], "met": rows["met"]})


def others(rows: pd.DataFrame, column: str) -> pd.Series:
    """Ours divided by itself says nothing."""
    if column not in rows:
        return pd.Series("", index=rows.index)
    return rows[column].map(digits).where(~rows["provider"].str.startswith("ours"), "")


def memory_table(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame[frame["beyond_profiler_mb"].notna()]
    return pd.DataFrame({
        "": rows["title"], "mode": rows["mode"], "C": rows["C"].map("{:,}".format),
        NAMES["beyond_profiler_mb"]: rows["beyond_profiler_mb"].map(digits),
        NAMES["beyond_rss_mb"]: rows["beyond_rss_mb"].map(digits),
        "W": rows["weight_mb"].map(digits), "one N x C": rows["logits_mb"].map(digits),
        "bound": rows["bound"], "met": rows["met"],
    })  # fmt: skip


def linear_table(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame[frame["samples"] > 0]
    return pd.DataFrame({
        "": rows["title"], "mode": rows["mode"].where(rows["provider"] != "gemm", ""),
        "C": rows["C"].map("{:,}".format), "ms": (rows["median_s"] * 1e3).map(digits),
        "ns a class": (rows["median_s"] / rows["C"] * 1e9).map(digits),
        "/ that at C=10^5": rows["per_class"].map(digits),
        "x GEMM": rows["ratio_to_gemm"].map(digits), "bound": rows["bound"], "met": rows["met"],
    })  # fmt: skip


def audit_table(frame: pd.DataFrame) -> pd.DataFrame:
    rows = audit.summary(frame)
    percent = {name: rows[name].map("{:.0%}".format) for name in rows if name.startswith("share of ")}
    ms = {name: (rows[f"{name}_s"] * 1e3).map(digits) for name in ("roofline", "predicted", "measured")}
    return pd.DataFrame({
        "row": rows["provider"] + ", " + rows["mode"],
        "size": [heading(size) for size in rows[SIZE].itertuples(index=False)],
        **{name: rows[name].map(digits) for name in ("GFLOP", "G elements", "GB")},  # counted
        **{f"{name}, ms": value for name, value in ms.items()},
        "measured / predicted": rows["measured / predicted"].map(digits),
        **{name.removeprefix("share of "): value for name, value in percent.items()},
        "bound by": rows["bound by"],
    })  # fmt: skip


def audit_parts(frame: pd.DataFrame) -> pd.DataFrame:
    """Every part of one audited row."""
    scale = {"flop": (1e9, "GFLOP"), "element": (1e6, "M elements"), "byte": (1e6, "MB")}
    amount = [f"{digits(a / scale[u][0])} {scale[u][1]}" for a, u in zip(frame["amount"], frame["unit"], strict=True)]
    rate = [
        f"{digits(a / scale[u][0])} {scale[u][1]}/s" for a, u in zip(frame["per_second"], frame["unit"], strict=True)
    ]
    share = frame["seconds"] / frame["seconds"].sum()
    return pd.DataFrame({
        "part": frame["part"], "amount": amount, "rate": rate, "ms": (frame["seconds"] * 1e3).map(digits),
        "share": share.map("{:.0%}".format),
    })  # fmt: skip


# -- words -------------------------------------------------------------------------------------------------------


def verdict(frames: dict[str, pd.DataFrame]) -> str:
    """Whether the bounds hold, in a sentence."""
    checked = [frame for name, frame in frames.items() if name != "audit"]
    answers = [answer for frame in checked for cell in frame["met"] for answer in cell.split("; ") if answer]
    if not answers:
        return "No row was measured at a size with a stated bound."
    return f"{answers.count('yes')} of {len(answers)} stated bounds are met."


def left_out(rows: pd.DataFrame) -> list[str]:
    """The rows that could not run, with the reason."""
    if "note" not in rows:
        return []
    noted = rows[rows["note"].notna() & (rows["note"] != "")].drop_duplicates(["provider", "note"])
    return (
        ["Not measured: " + "; ".join(f"{row.title}: {row.note}" for row in noted.itertuples()) + "."]
        if len(noted)
        else []
    )


def machines(facts: dict[str, Any]) -> list[str]:
    """One line for all tables, or one for each machine they were measured on."""
    lines: dict[str, list[str]] = {}
    for table, where in facts.items():
        lines.setdefault(machine.one_line(where) + f"; {where['scale']} sizes", []).append(table)
    if len(lines) == 1:
        return [f"Measured on: {next(iter(lines))}."]
    return [f"{', '.join(names)}: measured on {line}." for line, names in lines.items()]


def heading(size: tuple[Any, ...]) -> str:
    names = ("", "N=", "D=", "C=")
    return ", ".join(
        f"{name}{value:,}" if name == "C=" else f"{name}{value}" for name, value in zip(names, size, strict=False)
    )


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(frame: pd.DataFrame) -> str:
    frame = frame.loc[:, [name == "" or bool((frame[name] != "").any()) for name in frame]]
    left = {"", "mode", "row", "size", "bound", "met", "part", "bound by"}
    align = ["left" if name in left else "right" for name in frame]
    return frame.to_markdown(index=False, colalign=align, disable_numparse=True) if len(frame) else ""
