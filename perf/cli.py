"""The commands."""

from __future__ import annotations

import json
import signal
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from perf import compare as compares
from perf import grid, machine, plan_cli, profiling, results
from perf import run as runs
from perf.problem import LOSSES, Problem
from perf.providers import discover, split
from perf.providers.base import MODES
from perf.terminal import OUT, Out, Reports, bar, boxed, console, saying

app = typer.Typer(
    help="Speed and memory of tritonmargin beside other code.", no_args_is_help=True, add_completion=False
)

Threads = Annotated[int | None, typer.Option(min=1, help="threads of torch; default: its own choice")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
N = Annotated[int, typer.Option("--n", min=1, help="samples")]
D = Annotated[int, typer.Option("--d", min=1, help="width of embeddings")]
C = Annotated[int, typer.Option("--c", min=1, help="classes")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, ...")]


def numbers(text: str | None) -> tuple[int, ...]:
    """`1e4,1e6` as whole numbers."""
    return tuple(plan_cli.number(part) for part in words(text))


def words(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def known(option: str, values: Iterable[str], allowed: Iterable[str]) -> None:
    """BadParameter for a value that is none of those allowed."""
    for value in values:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is not among {', '.join(allowed)}", param_hint=f"--{option}")


def known_device(device: str) -> None:
    known("device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here", param_hint="--device")


def loaded(folder: Path) -> results.Results:
    """What a folder holds; BadParameter if a file of it cannot be read."""
    try:
        return results.load(folder)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise typer.BadParameter(f"a file in {folder} is damaged: {error}") from error


@app.command()
def run(
    quick: Annotated[bool, typer.Option("--quick", help="fewer sizes: under 3 minutes")] = False,
    full: Annotated[bool, typer.Option("--full", help="every size and provider: hours on two cores")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="seconds; the numbers say nothing")] = False,
    classes: Annotated[str | None, typer.Option(help="instead of the sizes above, e.g. 1e4,1e6")] = None,
    dim: Annotated[str | None, typer.Option(help="widths of the embeddings, e.g. 128,512; 512")] = None,
    batch: Annotated[str | None, typer.Option(help="samples, e.g. 32,256; 256")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"among {', '.join(grid.DTYPES)}; fp32")] = None,
    losses: Annotated[str | None, typer.Option(help=f"among {', '.join(LOSSES)}; arcface")] = None,
    providers: Annotated[str | None, typer.Option(help="see `python -m perf providers`; all")] = None,
    modes: Annotated[str | None, typer.Option(help=f"among {', '.join(MODES)}; {', '.join(grid.COMMON)}")] = None,
    longest: Annotated[float | None, typer.Option(min=0, help="seconds of a step")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="of the run; no size begins after that")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help=f"folder; default {OUT}, or beside it if that is of another machine"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what the folder holds already")] = False,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Measure, write CSVs and the page: under 30 minutes, if not --full.

    Stopped at any moment, or by the time that it has, it goes on where it was when it is called again.
    """
    name = "tiny" if tiny else "quick" if quick else "full" if full else "default"
    plan = grid.PLANS[name]
    known_device(device)
    if not classes and any((dim, batch, dtype, losses, providers, modes)):
        raise typer.BadParameter("a grid of your own starts with --classes, e.g. --classes 1e4,1e6")
    try:
        if classes:
            chosen = grid.Grid(
                numbers(classes), numbers(dim or "512"), numbers(batch or "256"),
                tuple(grid.DTYPES.get(each, each) for each in words(dtype or "fp32")), words(losses or "arcface"),
                words(providers) or grid.EVERYONE, words(modes) or grid.COMMON,
            )  # fmt: skip
            for each in chosen.providers:
                split(each)
            plan = plan._replace(grids=(chosen,))
        if longest is not None:
            plan = plan._replace(budget=plan.budget._replace(longest=longest))
        if minutes is not None:
            plan = plan._replace(budget=plan.budget._replace(minutes=minutes))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if device != "cpu":
        plan = plan.on(device, others=not providers)
    if threads:
        torch.set_num_threads(threads)
    facts = machine.describe(device) | {"plan": name}
    console.print(machine.one_line(facts), highlight=False)
    if facts["load_before"] and facts["load_before"] > 0.5:
        console.print(f"[yellow]the machine is not idle (load {facts['load_before']}): times will be off")
    for file, why in discover().skipped.items():
        console.print(f"[yellow]skipped {file}: {why}")
    loaded(OUT if out is None else out)
    place = results.beside(OUT, facts) if out is None else out
    if held := results.another_machine(place, facts):
        raise typer.BadParameter(f"{place} holds results of another machine: {held}", param_hint="--out")
    if place not in (OUT, out):
        console.print(f"{OUT} holds results of another machine: {results.another_machine(OUT, facts)}", highlight=False)
        console.print(f"this one's go to {place}", highlight=False)
    with bar() as progress, interruptible():
        stopped = False
        try:
            runs.go(plan, place, facts, fresh, progress)
        except KeyboardInterrupt:
            stopped = True
    written(place, "stopped; the same command goes on from here. " if stopped else "")
    raise typer.Exit(130 if stopped else 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt: a shell's background jobs ignore the first by default."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def written(out: Path, before: str = "") -> None:
    """Write the page of a folder and print its headline."""
    from perf import report  # matplotlib takes a second to import

    found = loaded(out)
    if found.rows.empty and before:
        console.print(f"{before}Nothing was measured yet", highlight=False)
        return
    if found.rows.empty:
        raise typer.BadParameter(f"no results in {out}; `python -m perf run` makes them", param_hint="--out")
    path = report.write(out, found)
    for heading, frame in report.on_terminal(found):
        boxed(frame, heading)
    console.print(f"{before}wrote {path}", highlight=False)


@app.command("report")
def report_command(out: Out = OUT) -> None:
    """Write the page and its pictures again from the CSVs."""
    written(out)


@app.command("readme")
def readme_command(
    out: Out = OUT,
    readme: Annotated[Path, typer.Option(help="the file with the two marks")] = Path("README.md"),
    gate: Annotated[Path | None, typer.Option(help="also those of a GPU, from a gate's folder")] = None,
) -> None:
    """Write the numbers of README.md again from the results, and those of other machines in the folders beside."""
    from perf import readme as numbers

    found = loaded(out)
    if found.rows.empty:
        raise typer.BadParameter(f"no results in {out}; `python -m perf run` makes them", param_hint="--out")
    try:
        asked = json.loads((gate / "gate.json").read_text()) if gate else None
        changed = numbers.write(readme, found, asked, numbers.elsewhere(out, readme.parent))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"{readme}: {'written' if changed else 'as it was'}", highlight=False)


@app.command("providers")
def providers_command() -> None:
    """Who is compared."""
    found, skipped = discover()
    lines = [
        {"": kind.name, "what": kind.title, "losses": ", ".join(kind.losses) or "none", "work": kind.work,
         "options": ", ".join(f"{name}={value}" for name, value in kind.options.items())}
        for kind in found.values()
    ]  # fmt: skip
    boxed(pd.DataFrame(lines), "providers")
    for file, why in skipped.items():
        console.print(f"[yellow]skipped {file}: {why}")


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(help="folder of a run")],
    after: Annotated[Path, typer.Argument(help="folder of another run of the same cases")],
    threshold: Annotated[float, typer.Option(min=0, help="what counts as slower, if it is more than the noise")] = 0.1,
) -> None:
    """Is the second run slower, larger or less exact? Exits with 1 if a row of ours is, or ours as a whole."""
    for folder in (before, after):
        if not (folder / "results.csv").exists():
            raise typer.BadParameter(f"no results.csv in {folder}")
    sides = loaded(before), loaded(after)
    found = compares.compare(*sides, threshold)
    if found.empty:
        raise typer.BadParameter("the two have no measured case in common")
    for facts in sides[1].runs.values():
        if held := results.another_machine(before, facts):
            console.print(f"[yellow]two machines, and times are comparable on one alone: {before} is of {held}")
            break
    said = found[found["verdict"] != ""]
    if len(said):
        shown = said[[*results.KEY[:5], "provider", "mode", "ratio", "band", "verdict"]]
        boxed(shown.round({"ratio": 3, "band": 3}), "what changed by more than the noise")
    if lost := compares.absent(*sides):
        console.print(f"[yellow]of what {before} measured {lost} cases are not in {after}", highlight=False)
    bad = compares.regressions(found, threshold)
    console.print(
        f"{len(found)} cases compared, {len(said)} changed. {compares.words(found, threshold)}", highlight=False
    )
    for line in bad:
        console.print(f"[red]{line}", highlight=False)
    raise typer.Exit(1 if bad else 0)


@app.command("check")
def check_command(
    update: Annotated[bool, typer.Option("--update", help="write the counts as the new ones")] = False,
) -> None:
    """Count flops, passes over elements and allocations of our steps, and compare them with the committed ones."""
    from perf import check

    found = check.counts()
    if update:
        check.write(found)
        console.print(f"wrote {check.PATH.name}", highlight=False)
        return
    said = check.grown(check.committed(), found)
    for line in said:
        console.print(f"[red]{line}", highlight=False)
    console.print(f"{len(found)} steps counted: {'no more work than before' if not said else 'more work than before'}")
    raise typer.Exit(1 if said else 0)


@app.command("audit")
def audit_command(
    out: Reports = Path("reports"),
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942; default: all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32; default: all")] = None,
    width: Annotated[list[int] | None, typer.Option("--d", help="64, 128, 256, 512, 1024; default: all")] = None,
) -> None:
    """Compile the Triton kernels for GPUs that need not be here, read the code, predict a step, check budgets."""
    from perf import epilogues, executed, kernels
    from perf.gpus import GPUS

    targets, dtypes = tuple(target or kernels.TARGETS), tuple(dtype or kernels.DTYPES)
    known("target", targets, GPUS)
    known("dtype", dtypes, kernels.DTYPES)
    with saying() as say:
        frame = kernels.audit(say, targets, dtypes, tuple(width or kernels.WIDTHS))
        others = epilogues.table(targets, tuple(each for each in dtypes if each != "float32"), say)
        predicted = pd.concat([kernels.predict(GPUS[name]) for name in targets], ignore_index=True)
        ran = executed.table()
    rules = kernels.budgets(frame, others, ran)
    boxed(rules, "budgets")
    shown = predicted[["target", "schedule", "predicted_ms", "predicted_fraction_of_peak", "times_the_floor"]]
    boxed(shown.round(3), "a step, predicted: N=1024, D=512, C=1,000,000, bfloat16")
    console.print(f"wrote {kernels.write(frame, others, predicted, ran, out)}", highlight=False)
    raise typer.Exit(1 if "NO" in set(rules["met"]) else 0)


@app.command("tune")
def tune_command(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, ...; default: all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or tf32; default: both")] = None,
    device: Annotated[str, typer.Option(help="cuda: measure on this machine's GPU instead")] = "none",
    measured: Annotated[
        Path | None, typer.Option(help="a CSV of candidates measured on another machine, as the gate's search.csv")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write every candidate to this CSV")] = None,
) -> None:
    """Search the tiles of the Triton kernels, and write the best to tritonmargin/kernels/tiles.json."""
    from perf import tune
    from perf.gpus import GPUS

    dtypes = dtype or list(tune.KINDS)
    known("target", target or (), GPUS)
    known("dtype", dtypes, tune.KINDS)
    if device != "none":
        known_device(device)
    with saying() as say:
        if measured:
            if target or dtype or device != "none":
                raise typer.BadParameter("it says for which target and dtype it is", param_hint="--measured")
            frame = tune.tune_from(measured)
        elif device == "none":
            frame = tune.tune(target or list(GPUS), dtypes, say)
        else:
            frame = tune.tune_here(dtypes, say)
    if out:
        frame.to_csv(out, index=False)
    typer.echo(f"wrote {tune.TABLE}")


@app.command("counted")
def counted_command(out: Reports = Path("reports")) -> None:
    """Execute our kernels and Liger-Kernel's on the CPU and count what they load, store and multiply."""
    from perf import counted

    frame = counted.table()
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "counted.csv", index=False)
    boxed(frame.T.reset_index().map(lambda value: f"{value:.3g}" if isinstance(value, float) else value), "counted")
    console.print(f"wrote {out / 'counted.csv'}", highlight=False)


@app.command("sampled")
def sampled_command(
    out: Reports = Path("reports"),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    tiny: Annotated[bool, typer.Option("--tiny", help="seconds; the numbers say nothing")] = False,
    losses: Annotated[bool, typer.Option("--losses", help="the losses of samples instead of times")] = False,
) -> None:
    """A step of a tenth of the classes beside the full step, and the cost of drawing them (needs 6 GB)."""
    from perf import sampled

    facts = machine.describe("cpu")
    console.print(machine.one_line(facts), highlight=False)
    with saying() as say:
        frame = sampled.losses(say, tiny=tiny) if losses else sampled.table(say, rounds, tiny)
    path = out / ("sampled_losses.csv" if losses else "sampled.csv")
    out.mkdir(parents=True, exist_ok=True)
    frame.assign(machine=machine.one_line(facts)).to_csv(path, index=False)
    shown = frame if losses else frame.T.reset_index()
    boxed(shown.map(lambda value: f"{value:.3g}" if isinstance(value, float) else value), "sampled")
    console.print(f"wrote {path}", highlight=False)


@app.command("gate")
def gate_command(
    out: Annotated[Path, typer.Option(help="folder of the results; a second run goes on in it")],
    minutes: Annotated[float, typer.Option(min=0.1, help="no step begins after that")] = 10.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="without a GPU, tiny sizes, kernels executed by ttsem")
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="only the verdict on what the folder holds, on any machine")
    ] = False,
) -> None:
    """Everything worth knowing of a GPU in ten minutes: tests, errors, speed beside others, predictions judged."""
    from perf import gate

    try:
        with saying() as say:
            passed = gate.judge(out) if judge else gate.run(out, dry_run, minutes, say)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    done = "judged" if judge and passed else "every step done" if passed else "not every step done"
    console.print(f"wrote {out / 'gate.html'}: {done}", highlight=False)
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
    out: Annotated[
        Path | None, typer.Option(help="also write the parts and the profiler's tables of our steps")
    ] = None,
) -> None:
    """Count flops, elements and bytes of a step, and say what bounds it on this machine."""
    from perf import roofline

    known_device(device)
    known("dtype", [dtype], grid.DTYPES.values())
    if threads:
        torch.set_num_threads(threads)
    problem = Problem(n, d, c, dtype, device)
    with saying() as say:
        taken = roofline.measure(problem, rounds, torch.get_num_threads(), say) if rounds else {}
        say("rates of this machine")
        frame = roofline.audit(problem, taken)
    for (provider, mode), parts in frame.groupby(["provider", "mode"], sort=False):
        boxed(roofline.parts_table(parts), f"{provider}, {mode}")
    boxed(roofline.table(frame), f"what bounds the rows: {problem.title}")
    if out:
        for path in profiling.write_profiles(problem, out):
            console.print(f"wrote {path}", highlight=False)
        frame.to_csv(out / f"roofline_{dtype}_N{n}_D{d}_C{c}.csv", index=False, float_format="%.6g")


app.command("plan")(plan_cli.plan_command)
app.command("plan-table")(plan_cli.plan_table_command)
app.command("scale-check")(plan_cli.scale_check_command)
