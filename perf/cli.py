"""The commands. Exit codes: 0, 1 for a result that is worse than asked for, 2 for a mistake on the command line."""

import importlib.metadata
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import typer

import tritonmargin
from perf import providers as found_providers
from perf.providers.base import MODES
from perf.report import terminal
from perf.report.terminal import boxed, console
from perf.suite import machine, plans, results, runner
from perf.suite.problem import LOSSES

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
UsageError: Any = typer.BadParameter.__base__  # click's, which newer versions of typer carry themselves
LOCAL, REPORTS = Path("perf-results"), Path("reports")

Device = Literal["cpu", "cuda"]


def main() -> None:
    """Mistakes on the command line end in one line."""
    try:
        code = app(prog_name="python -m perf", standalone_mode=False)
    except UsageError as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        code = 2
    except typer.Abort:
        code = 130
    sys.exit(code or 0)


@contextmanager
def usage() -> Iterator[None]:
    """What is wrong, or missing, is a mistake of whoever called."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


def words(text: str | None) -> tuple[str, ...]:
    found = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not found:
        raise typer.BadParameter(f"{text!r} is an empty list")
    return found


def number(text: str | int) -> int:
    """A whole number, also as 1e6."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e18 or value != int(value):
        raise typer.BadParameter(f"{text!r} is no whole number of at least 1")
    return int(value)


def known(option: str, values: Iterable[str], allowed: Iterable[str]) -> None:
    """BadParameter for a value that is none of those allowed."""
    for value in values:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is not among {', '.join(allowed)}", param_hint=option)


def known_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here", param_hint="--device")


def loaded(folder: Path) -> results.Results:
    """What a folder holds; BadParameter if there is nothing or a file of it cannot be read."""
    if not (folder / "results.csv").exists():
        raise typer.BadParameter(f"no results.csv in {folder}; `python -m perf run --out {folder}` makes one")
    try:
        return results.load(folder)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(f"a file in {folder} is damaged: {error}") from error


def version(asked: bool) -> None:
    if asked:
        triton = importlib.metadata.version("triton")
        print(f"tritonmargin {tritonmargin.__version__}, torch {torch.__version__}, triton {triton}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="print it and exit")] = False,
) -> None:
    """Speed and memory of tritonmargin versus other code."""


@app.command()
def run(
    plan: Annotated[str, typer.Option(help=f"which cases: {', '.join(plans.PLANS)}")] = "default",
    quick: Annotated[bool, typer.Option("--quick", help="--plan quick: under 3 minutes")] = False,
    full: Annotated[bool, typer.Option("--full", help="--plan full: every size and provider, hours")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="--plan tiny: seconds; its numbers say nothing")] = False,
    classes: Annotated[str | None, typer.Option(help="a grid of your own: classes, e.g. 1e4,1e6")] = None,
    dim: Annotated[str | None, typer.Option(help="widths of the embeddings, e.g. 128,512")] = None,
    batch: Annotated[str | None, typer.Option(help="samples, e.g. 32,256")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"among {', '.join(plans.DTYPES)}")] = None,
    losses: Annotated[str | None, typer.Option(help=f"among {', '.join(LOSSES)}")] = None,
    providers: Annotated[str | None, typer.Option(help="see `python -m perf providers`")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="a head of your own: my_head.py:MyHead")] = None,
    modes: Annotated[str | None, typer.Option(help=f"among {', '.join([*MODES[:5], *plans.SHORT])}")] = None,
    longest: Annotated[float | None, typer.Option(min=0, help="seconds of a step; longer ones are left out")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="of the run; no size begins after that")] = None,
    out: Annotated[Path | None, typer.Option(help=f"folder of the results; {LOCAL}/PLAN")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what the folder holds already")] = False,
    device: Annotated[Device | None, typer.Option(help="cpu; for --plan gpu: cuda")] = None,
) -> None:
    """Measure, write CSVs and the page: under 30 minutes for the default plan on 2 cores.

    Any of --classes, --dim, --batch, --dtype, --losses, --providers, --modes makes a grid of your own.
    Stopped at any moment, or by its time, the same command goes on where it was.
    """
    name = "tiny" if tiny else "quick" if quick else "full" if full else plan
    known("--plan", [name], plans.PLANS)
    device = device or ("cuda" if name == "gpu" else "cpu")
    known_device(device)
    sizes = {"classes": classes, "dims": dim, "batches": batch}
    with usage():
        heads = tuple(found_providers.load_file(each) for each in provider or ())
        chosen = plans.PLANS[name]
        if any((*sizes.values(), dtype, losses, providers, modes)):
            name = "grid" if name == "default" else name
            grid = plans.custom_grid(
                device, **{name: tuple(map(number, words(given))) for name, given in sizes.items()},
                dtypes=words(dtype), losses=words(losses), providers=words(providers), modes=words(modes),
            )  # fmt: skip
            chosen = chosen._replace(grids=(grid,))
        chosen = chosen.on(device, heads, longest=longest, minutes=minutes)
        chosen.check()
    facts = machine.describe(device) | {"plan": name}
    folder = out or LOCAL / name
    with usage():
        folder.mkdir(parents=True, exist_ok=True)
        held = results.of_this_machine(folder, facts)
    if len(held.rows):
        console.print(f"{len(held.rows)} cases are in {folder} already; --fresh measures them again")
    console.print(machine.one_line(facts))
    if facts["load_before"] and facts["load_before"] > 0.5:
        console.print(f"[yellow]the machine is not idle (load {facts['load_before']}): times will be off")
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(stop, signal.default_int_handler)
    stopped = False
    with terminal.bar() as progress:
        try:
            runner.run_plan(chosen, folder, facts, fresh, progress)
        except KeyboardInterrupt:
            stopped = True
    if (folder / "results.csv").exists():
        report(folder)
    if stopped:
        console.print("stopped; the same command goes on from here")
    raise typer.Exit(130 if stopped else 0)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="of a run")]) -> None:
    """Write the page of a folder and its pictures again from the CSVs, and print its first table."""
    from perf.report import page  # matplotlib takes a second to import

    found = loaded(folder)
    path = page.write(folder, found)
    for heading, frame in page.on_terminal(found):
        boxed(frame, heading)
    console.print(f"wrote {path}")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="folder of a run")],
    after: Annotated[Path, typer.Argument(help="folder of another run of the same cases")],
    threshold: Annotated[float, typer.Option(min=0, help="what counts as slower, if it is more than the noise")] = 0.1,
) -> None:
    """Is the second run slower, larger or less exact? Exits with 1 if a row of ours is, or ours as a whole."""
    from perf.report import compare as compares

    sides = loaded(before), loaded(after)
    for folder, side in zip((before, after), sides, strict=True):
        if lacks := {*side.rows["run"]} - {*side.runs}:
            said = f"runs.json of {folder} lacks run {', '.join(sorted(lacks))}"
            raise typer.BadParameter(f"{said}: which machine measured it is not known")
    found = compares.compare(*sides, threshold)
    if found.empty:
        raise typer.BadParameter("the two have no measured case in common")
    if any(results.another_machine(sides[0].runs, facts) for facts in sides[1].runs.values()):
        console.print("[yellow]two machines: times are comparable on one alone")
    said = found[found["verdict"] != ""]
    if len(said):
        shown = [*results.KEY[:5], "provider", "mode", "ratio", "band", "verdict"]
        boxed(said[shown].round(3), "what changed by more than the noise")
    if lost := compares.absent(*sides):
        console.print(f"[yellow]of what {before} measured {lost} cases are not in {after}")
    bad = compares.regressions(found, threshold)
    console.print(f"{len(found)} cases compared, {len(said)} changed.", compares.words(found, threshold))
    for line in bad:
        console.print(line, style="red", markup=False)
    raise typer.Exit(1 if bad else 0)


@app.command()
def providers() -> None:
    """Who is compared."""
    lines = [
        {"": kind.name, "what": kind.title, "losses": ", ".join(kind.losses) or "none", "work": kind.work,
         "options": ", ".join(f"{name}={value}" for name, value in kind.options.items()), "here": kind.missing()}
        for kind in found_providers.discover().values()
    ]  # fmt: skip
    boxed(pd.DataFrame(lines), "providers")


@app.command()
def readme() -> None:
    """Write the tables of README.md and docs/performance again from reports/cpu and reports/gpu-h200."""
    from perf.report import readme as generated

    with usage():
        changed = generated.write(Path("README.md"), loaded(REPORTS / "cpu"), loaded(REPORTS / "gpu-h200"))
    console.print("written" if changed else "as it was")


@app.command()
def check(
    update: Annotated[bool, typer.Option("--update", help="write the counts as the new ones")] = False,
) -> None:
    """Count the work of our steps (products, passes, allocations, launches) versus the committed counts."""
    from perf.counts import check as counts
    from perf.counts import step_ops as ops

    found = counts.counts()
    if ops.missing():
        console.print(ops.missing(), style="yellow", markup=False)
    if update:
        counts.write(found)
        console.print(f"wrote {counts.PATH.name}")
        return
    grown = counts.grown(counts.committed(), found)
    for line in grown:
        console.print(f"[red]{line}")
    console.print(f"{len(found)} steps counted: {'more work than before' if grown else 'no more work than before'}")
    raise typer.Exit(1 if grown else 0)


@app.command("step-ops")
def step_ops() -> None:
    """Launches, device operations and host time of a training step on a GPU; none has to be there."""
    from perf.counts import step_ops as ops

    with usage():
        boxed(ops.table(), "a training step, as the CPU sees it; host_us: microseconds with launches stubbed")


@app.command()
def audit(
    out: Annotated[Path, typer.Option(help="folder of kernels.csv and kernels.md")] = REPORTS,
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942; default: all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, tf32, float32; default: all")] = None,
    width: Annotated[list[int] | None, typer.Option("--d", help="64, 128, 256, 512, 1024; default: all")] = None,
) -> None:
    """Compile the Triton kernels for GPUs that need not be here: registers, spills, shared memory, instructions."""
    from perf.kernels import audit as kernels

    known("--target", target or (), kernels.GPUS)
    known("--dtype", dtype or (), kernels.DTYPES)
    asked = target or kernels.TARGETS, dtype or kernels.DTYPES, width or kernels.WIDTHS
    with usage(), terminal.bar() as progress:
        frame = kernels.audit(progress, *map(tuple, asked))
    boxed(rules := kernels.budgets(frame), "budgets")
    console.print(f"wrote {kernels.write(frame, out)}")
    raise typer.Exit(1 if "NO" in set(rules["met"]) else 0)


@app.command()
def tune(
    target: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, ...; default: all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16 or tf32; default: both")] = None,
    device: Annotated[Device, typer.Option(help="cuda: measure on this machine's GPU, and write tiles.json")] = "cpu",
) -> None:
    """Search the tiles of the Triton kernels: list what compiles without spills; on a GPU, take the fastest."""
    from perf.kernels import tune as tuning

    dtypes = dtype or list(tuning.KINDS)
    known("--target", target or (), tuning.TARGETS)
    known("--dtype", dtypes, tuning.KINDS)
    known_device(device)
    with usage(), terminal.bar() as progress:
        targets = target or tuning.TARGETS
        frame = tuning.usable(targets, dtypes, progress) if device == "cpu" else tuning.tune(dtypes, progress)
    boxed(frame.head(20), "the first 20")
    console.print("tiles.json is as it was" if device == "cpu" else f"wrote {tuning.TABLE}")


@app.command()
def model() -> None:
    """Bytes and flops of each kernel times measured rates: a step's predicted time, and what was measured."""
    from perf.kernels import model as kernel_model

    with usage():
        boxed(kernel_model.table().round(3), "D=512, H200: predicted; measured before, of other kernels")


@app.command()
def gate(
    out: Annotated[Path, typer.Option(help="folder of the results; a second call goes on in it")],
    minutes: Annotated[float, typer.Option(min=0.1, help="no step begins after that")] = 10.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="without a GPU, tiny sizes, kernels run by ttsem")] = False,
) -> None:
    """Ten minutes with a GPU: are the losses right, how fast is a step versus the others, what do the kernels need."""
    from perf import gate as gates

    with usage(), terminal.bar() as progress:
        passed = gates.run(out, minutes, dry_run, progress)
    console.print(f"wrote {out}: {'every step done' if passed else 'not every step done'}")
    raise typer.Exit(0 if passed else 1)


@app.command()
def plan(
    classes: Annotated[int, typer.Option(parser=number, help="of all ranks, e.g. 1e6")] = 1_000_000,
    dim: Annotated[int, typer.Option(min=1, help="width of the embeddings")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="samples of a rank")] = 256,
    ranks: Annotated[int, typer.Option(min=1, help="that share the classes")] = 1,
    gpu: Annotated[Literal["a100", "h100", "h200", "b200", "mi300x"] | None, typer.Option(help="not the CPU")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GB of a rank for the head; all there is")] = None,
    sample_rate: Annotated[float, typer.Option(min=0, max=1, help="of the classes in a step")] = 1.0,
    gradient: Annotated[Literal["dense", "sparse", "backward"], typer.Option(help="backward: none is kept")] = "dense",
    optimizer: Annotated[Literal["sgd", "momentum", "adamw"], typer.Option()] = "momentum",
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="of the products")] = None,
) -> None:
    """Memory of a rank by formula, and which settings fit. Exits with 1 if none does."""
    from perf.planner import memory as planner

    size = {name: size for size, name in planner.ITEMS.items()}
    products = size[dtype or ("bfloat16" if gpu else "float32")]
    head = planner.Head(classes, dim, batch, ranks, sample_rate, gradient, optimizer, compute_item=products)
    made = planner.plan(head, gpu, None if memory is None else memory * 1e9)
    boxed(planner.plan_table(made), f"GB of a rank: {head.title}")
    console.print(planner.verdict(made), soft_wrap=True)
    raise typer.Exit(0 if made.fitting else 1)


@app.command("plan-check")
def plan_check(out: Annotated[Path, typer.Option(help="folder of plan*.csv and plan.md")] = REPORTS) -> None:
    """Hold the formula of `plan` to peaks measured here, in processes of their own; minutes. Writes reports/plan*."""
    from perf.planner import check as checked
    from perf.planner import memory as planner

    with terminal.bar() as progress:
        frame = checked.table(checked.grid(), progress)
    worst = checked.worst(frame)
    console.print(f"wrote {planner.write_table(out)} and {checked.write(frame, out)}")
    console.print(f"{len(frame)} heads, at worst {worst:.2%} off the measured peak")
    raise typer.Exit(0 if worst <= checked.WITHIN else 1)
