"""The commands."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from perf import audit as audits
from perf import machine, memory, plan_cli, profiling, rates, report, timing
from perf.problem import Problem
from perf.providers import discover
from perf.tables import STEP, Table, tables
from perf.terminal import Out, boxed, console, saying

app = typer.Typer(
    help="Speed and memory of tritonmargin beside other code.", no_args_is_help=True, add_completion=False
)

Threads = Annotated[int | None, typer.Option(min=1, help="threads of torch; default: its own choice")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
N = Annotated[int, typer.Option("--n", min=1, help="samples")]
D = Annotated[int, typer.Option("--d", min=1, help="width of embeddings")]
C = Annotated[int, typer.Option("--c", min=1, help="classes")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, ...")]
AUDIT = "audit"


@app.command()
def run(
    quick: Annotated[bool, typer.Option("--quick", help="fewer repeats and sizes: minutes on two cores")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="seconds; the numbers say nothing")] = False,
    only: Annotated[list[str] | None, typer.Option(help="one table; may be given several times")] = None,
    out: Out = Path("reports"),
    threads: Threads = None,
    device: Device = "cpu",
    profile: Annotated[bool, typer.Option("--profile", help="also write profile_<row>.txt of our steps")] = False,
) -> None:
    """Measure every table, write CSVs, plots and perf.md, and print the tables."""
    scale = "tiny" if tiny else "quick" if quick else "full"
    chosen = tables(scale, device)
    names = only or [*chosen, AUDIT]
    for name in names:
        if name not in (*chosen, AUDIT):
            raise typer.BadParameter(f"no table {name!r}; there are {', '.join([*chosen, AUDIT])}", param_hint="--only")
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    facts = machine.describe(device) | {"scale": scale}
    console.print(machine.one_line(facts), highlight=False)
    if facts["load_before"] and facts["load_before"] > 0.5:
        console.print(f"[yellow]the machine is not idle (load {facts['load_before']}): times will be off")
    for file, why in discover().skipped.items():
        console.print(f"[yellow]skipped {file}: {why}")

    for name in names:
        begin = time.perf_counter()
        with saying() as say:
            frame = audit_all(chosen, out, say, hasty=tiny) if name == AUDIT else measured(chosen[name], say)
        frame.to_csv(out / f"{name}.csv", index=False)
        known = report.facts(out) | {name: facts | {"seconds": round(time.perf_counter() - begin, 1)}}
        (out / "machine.json").write_text(json.dumps(known, indent=1) + "\n")
        show(name, report.load(out)[name])
        if profile and name != AUDIT and not chosen[name].memory:
            for path in profiling.write_profiles(chosen[name].rows, out):
                console.print(f"wrote {path}", highlight=False)
    frames = report.load(out)
    console.print(f"\nwrote {report.write(out, frames)}: {report.verdict(frames)}", highlight=False)


@app.command("report")
def report_command(
    out: Out = Path("reports"),
    markdown: Annotated[bool, typer.Option("--markdown", help="only print the tables that a README needs")] = False,
) -> None:
    """Render perf.md and the plots again from the CSVs."""
    frames = report.load(out)
    if not frames:
        raise typer.BadParameter(f"no CSVs in {out}; `python -m perf run` writes them", param_hint="--out")
    if markdown:
        typer.echo(report.short(frames, report.facts(out)))
        return
    typer.echo(f"wrote {report.write(out, frames)}: {report.verdict(frames)}")


@app.command("audit")
def audit_command(
    out: Out = Path("reports"),
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942; default: all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32; default: all")] = None,
    width: Annotated[list[int] | None, typer.Option("--d", help="64, 128, 256, 512, 1024; default: all")] = None,
) -> None:
    """Compile the Triton kernels for GPUs that need not be here, read the code, predict a step, check budgets."""
    from perf import kernels
    from perf.gpus import GPUS

    targets, dtypes = tuple(target or kernels.TARGETS), tuple(dtype or kernels.DTYPES)
    with saying() as say:
        frame = kernels.audit(say, targets, dtypes, tuple(width or kernels.WIDTHS))
        predicted = pd.concat([kernels.predict(GPUS[name]) for name in targets], ignore_index=True)
    rules = kernels.budgets(frame)
    boxed(rules, "budgets")
    shown = predicted[["target", "schedule", "predicted_ms", "predicted_fraction_of_peak", "times_the_floor"]]
    boxed(shown.round(3), "a step, predicted: N=1024, D=512, C=1,000,000, bfloat16")
    console.print(f"wrote {kernels.write(frame, predicted, out)}", highlight=False)
    raise typer.Exit(1 if "NO" in set(rules["met"]) else 0)


@app.command("tune")
def tune_command(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, ...; default: all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or float32; default: both")] = None,
    device: Annotated[str, typer.Option(help="cuda: measure on this machine's GPU instead")] = "none",
    out: Annotated[Path | None, typer.Option(help="also write every candidate to this CSV")] = None,
) -> None:
    """Search the tiles of the Triton kernels, and write the best to tritonmargin/kernels/tiles.json."""
    from perf import tune
    from perf.gpus import GPUS

    dtypes = dtype or list(tune.DTYPES)
    with saying() as say:
        predicted = device == "none"
        frame = tune.tune(target or list(GPUS), dtypes, say) if predicted else tune.tune_here(dtypes, say)
    if out:
        frame.to_csv(out, index=False)
    typer.echo(f"wrote {tune.TABLE}")


@app.command("counted")
def counted_command(out: Out = Path("reports")) -> None:
    """Execute our kernels and Liger-Kernel's on the CPU and count what they load, store and multiply."""
    from perf import counted

    frame = counted.table()
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "counted.csv", index=False)
    boxed(frame.T.reset_index().map(lambda value: f"{value:.3g}" if isinstance(value, float) else value), "counted")
    console.print(f"wrote {out / 'counted.csv'}", highlight=False)


@app.command("sampled")
def sampled_command(
    out: Out = Path("reports"),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    tiny: Annotated[bool, typer.Option("--tiny", help="seconds; the numbers say nothing")] = False,
) -> None:
    """A step of a tenth of the classes beside the full step, and the cost of drawing them (needs 6 GB)."""
    from perf import sampled

    facts = machine.describe("cpu")
    console.print(machine.one_line(facts), highlight=False)
    with saying() as say:
        frame = sampled.table(say, rounds, tiny)
    out.mkdir(parents=True, exist_ok=True)
    frame.assign(machine=machine.one_line(facts)).to_csv(out / "sampled.csv", index=False)
    boxed(frame.T.reset_index().map(lambda value: f"{value:.3g}" if isinstance(value, float) else value), "sampled")
    console.print(f"wrote {out / 'sampled.csv'}", highlight=False)


@app.command("gate")
def gate_command(
    out: Annotated[Path, typer.Option(help="folder of the results; a second run goes on in it")],
    minutes: Annotated[float, typer.Option(min=0.1, help="no step begins after that")] = 10.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="without a GPU, tiny sizes, kernels executed by ttsem")
    ] = False,
) -> None:
    """Everything worth knowing of a GPU in ten minutes: tests, errors, speed beside others, predictions judged."""
    from perf import gate

    try:
        with saying() as say:
            passed = gate.run(out, dry_run, minutes, say)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(
        f"wrote {out / 'gate.html'}: {'every step done' if passed else 'not every step done'}", highlight=False
    )
    raise typer.Exit(0 if passed else 1)


@app.command("roofline")
def roofline_command(
    n: N = 256,
    d: D = 512,
    c: C = 131_072,
    dtype: Dtype = "float32",
    threads: Threads = None,
    device: Device = "cpu",
    rounds: Annotated[int, typer.Option(min=0, help="steps to time beside the prediction; 0: none")] = 3,
) -> None:
    """Count flops, elements and bytes of a step, and say what bounds it on this machine."""
    if threads:
        torch.set_num_threads(threads)
    problem = Problem(n, d, c, dtype, device)
    with saying() as say:
        taken = audits.measure(problem, rounds, say) if rounds else {}
        say("audit: rates of this machine")
        frame = audits.audit(problem, taken)
    for (provider, mode), parts in frame.groupby(["provider", "mode"], sort=False):
        boxed(report.audit_parts(parts), f"{provider}, {mode}")
    show(AUDIT, frame)


app.command("plan")(plan_cli.plan_command)
app.command("plan-table")(plan_cli.plan_table_command)
app.command("scale-check")(plan_cli.scale_check_command)

# -- what the commands are made of -------------------------------------------------------------------------------


def measured(table: Table, say: timing.Say) -> pd.DataFrame:
    return memory.measure(table, say) if table.memory else timing.measure(table, say)


def audit_all(chosen: dict[str, Table], out: Path, say: timing.Say, hasty: bool = False) -> pd.DataFrame:
    """The audit at every size of the fp32 and bf16 tables, with the times that these tables hold."""
    frames = []
    for name in ("fp32", "bf16"):
        path = out / f"{name}.csv"
        times = pd.read_csv(path) if path.exists() else pd.DataFrame()
        for problem in dict.fromkeys(row.problem for row in chosen[name].rows if row.mode == STEP):
            say(f"audit: {problem.title}")
            speed = rates.measure(problem, 0.01, 1 << 22) if hasty else rates.measure(problem)
            frames.append(audits.audit(problem, audits.medians(times, problem), speed))
    return pd.concat(frames)


def show(name: str, frame: pd.DataFrame) -> None:
    """One table on the terminal."""
    if name == AUDIT:
        for size, rows in frame.groupby(report.SIZE, sort=False):
            table = report.audit_table(rows)[["row", "roofline, ms", "predicted, ms", "measured, ms", "bound by"]]
            boxed(table, f"what bounds the rows: {report.heading(size)}")
        return
    wide = name in ("memory", "linear")
    render = {"memory": report.memory_table, "linear": report.linear_table}.get(name, report.speed_table)
    for size, rows in frame.groupby(["dtype", "N", "D"] if wide else report.SIZE, sort=False):
        boxed(render(rows), f"{name}: {report.heading(size)}")
        for line in report.left_out(rows):
            console.print(line, style="yellow", highlight=False)
