"""The commands that plan: memory and time of a step before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from perf import plan as plans
from perf.problem import Problem
from perf.scale import ITEMS, STATES, Head
from perf.terminal import Reports, boxed, console, digits, saying


def number(text: str | int) -> int:
    """A whole number, also as 100e6."""
    value = float(text)
    if value < 1 or value != int(value):
        raise typer.BadParameter(f"{text!r} is no whole number of at least 1")
    return int(value)


def plan_command(
    n: Annotated[int, typer.Option("--n", "--batch", min=1, help="samples; with --gpus, on each GPU")] = 256,
    d: Annotated[int, typer.Option("--d", "--dim", min=1, help="width of embeddings")] = 512,
    c: Annotated[int, typer.Option("--c", "--classes", parser=number, help="classes, e.g. 1000000 or 1e6")] = 1_000_000,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: bfloat16 on GPUs")] = None,
    memory_mb: Annotated[
        float | None, typer.Option("--memory", min=0, help="MB for everything; with --gpus, of each GPU for the head")
    ] = None,
    chunk_mb: Annotated[float, typer.Option("--chunk", min=0, help="MB a chunk; 0: from the cache's size")] = 0.0,
    gpus: Annotated[int | None, typer.Option(min=1, help="ranks that share the classes; default: the CPU here")] = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100, b200 or mi300x; default: h100")] = None,
    sample_rate: Annotated[float, typer.Option(min=0, max=1, help="of the classes that a step walks")] = 1.0,
    optimizer: Annotated[str, typer.Option(help="sgd, momentum or adamw")] = "momentum",
    state_dtype: Annotated[str, typer.Option(help="of the optimiser's state: float32 or bfloat16")] = "float32",
    weight_dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    backward: Annotated[bool, typer.Option("--update-in-backward", help="no gradient of W at all")] = False,
    sparse: Annotated[bool, typer.Option("--sparse-grad", help="a gradient of the walked rows")] = False,
    dense: Annotated[bool, typer.Option("--dense-grad", help="a gradient of all rows; the default")] = False,
    retain_mb: Annotated[float, typer.Option("--retain", min=0, help="MB of logits kept for backward")] = 0.0,
) -> None:
    """Predicted memory: of one process on the CPU, or, with --gpus, of every rank, with the time and what fits."""
    if gpus is None and gpu is None:
        problem = Problem(n, d, c, dtype or "float32")
        made = plans.plan(problem, None if memory_mb is None else int(memory_mb * 1e6), int(chunk_mb * 1e6))
        boxed(plan_table(made, memory_mb), problem.title)
        typer.echo(f"chunks: {made.chunks} of {made.chunk} classes")
        if memory_mb is not None:
            typer.echo(f"retain_bytes={made.retain_bytes}: keeps the tiles of {made.retained} of {c} classes")
        return
    from perf.gpus import NODES

    items = {name: item for item, name in ITEMS.items()}
    dtypes = {"--dtype": dtype or "bfloat16", "--state-dtype": state_dtype, "--weight-dtype": weight_dtype}
    wanted = [*((option, name, items) for option, name in dtypes.items()), ("--gpu", gpu or "h100", NODES),
              ("--optimizer", optimizer, STATES)]  # fmt: skip
    for option, name, known in wanted:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)
    if dense + sparse + backward > 1:
        raise typer.BadParameter("one of --dense-grad, --sparse-grad and --update-in-backward")
    if chunk_mb:
        raise typer.BadParameter("the kernels choose their chunks on a GPU", param_hint="--chunk")
    head = Head(
        c, d, n, gpus or 1, sample_rate, "backward" if backward else "sparse" if sparse else "dense", optimizer,
        items[weight_dtype], items[state_dtype], items[dtype or "bfloat16"], int(retain_mb * 1e6), fused=True,
    )  # fmt: skip
    show_plan(head, gpu or "h100", memory_mb)


def scale_check_command(out: Reports = Path("reports")) -> None:
    """Hold the memory formula of `plan --gpus` to peaks measured here, in fresh processes with gloo; minutes."""
    from perf import plan_check

    with saying() as say:
        frame = plan_check.table(plan_check.grid(), say)
    path = plan_check.write(frame, out)
    worst = (frame["predicted_over_measured"] - 1.0).abs().max()
    typer.echo(f"wrote {path}: {len(frame)} heads, at worst {worst:.1%} beside the measured peak")
    raise typer.Exit(0 if plan_check.holds(frame) else 1)


def plan_table_command(out: Reports = Path("reports")) -> None:
    """Plan 1, 10, 29 and 100 million classes on 8 GPUs, beside insightface's published numbers."""
    from perf import published

    with saying() as say:
        say("plan-table: compiling")
        frame = published.table()
    typer.echo(f"wrote {published.write(frame, out)}; every number of ours in it is predicted")


# -- what they print -----------------------------------------------------------------------------------------------


def show_plan(head: Head, gpu: str, memory_mb: float | None) -> None:
    """Memory, exchanges, time and settings of a head on GPUs."""
    from perf import planned
    from perf.gpus import NODES

    with saying() as say:
        say("plan: compiling")
        made = planned.plan(head, NODES[gpu], None if memory_mb is None else memory_mb * 1e6)
    boxed(planned.memory_table(made), f"GB of a rank, predicted: {head.title}")
    if head.ranks > 1:
        boxed(planned.traffic_table(head), "exchanges of a step")
    boxed(planned.time_table(made), f"a step, predicted: {(made.recommended or made.options[0]).setting}")
    boxed(
        planned.options_table(made),
        f"settings, from the one asked for on, each with those before: {made.node.gpu.name}",
    )
    console.print(planned.verdict(made), highlight=False, soft_wrap=True)
    raise typer.Exit(1 if made.recommended is None else 0)


def plan_table(made: plans.Plan, memory_mb: float | None) -> pd.DataFrame:
    rows = {"tritonmargin": made.ours, "full logits": made.full_logits}
    fits = {
        name: "" if memory_mb is None else "yes" if made.fixed + extra <= memory_mb * 1e6 else "NO"
        for name, extra in rows.items()
    }
    return pd.DataFrame([
        {"": name, "W, MB": digits(made.weight / 1e6), "gradient of W": digits(made.gradient / 1e6),
         "inputs": digits(made.inputs / 1e6), "beyond": digits(extra / 1e6),
         "in all": digits((made.fixed + extra) / 1e6), "fits": fits[name]}
        for name, extra in rows.items()
    ])  # fmt: skip
