"""A run: every size of a plan, written as it goes; a second run goes on where the first was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from perf import ceilings, results
from perf.grid import Case, Plan
from perf.measure import Checks, History, blank, measure
from perf.problem import Problem
from perf.results import KEY, Results

Progress = Callable[[float, str], None]  # the part that is done, 0 to 1, and what is being done


def go(plan: Plan, out: Path, facts: dict[str, object], fresh: bool, progress: Progress) -> Results:
    """Measure what `out` does not hold yet. KeyboardInterrupt leaves whole results.

    With `fresh` everything is measured; what was there before stays until the new row is there.
    """
    held = results.load(out)
    blocks = plan.blocks()
    open_ones = [fresh or again(row, held, plan) for row in held.rows.to_dict("records")]
    known = results.done(held.rows[~pd.Series(open_ones, index=held.rows.index, dtype=bool)])
    left = {problem: [case for case in cases if key(case) not in known] for problem, cases in blocks.items()}
    left = {problem: cases for problem, cases in left.items() if cases}
    if not left:
        return held
    number = str(max((int(run) for run in held.runs), default=0) + 1)
    begin = time.monotonic()
    progress(0.0, "the machine's ceilings")
    devices = {problem.device for problem in left}
    hasty = facts["plan"] == "tiny"
    ceiling = [
        {**line, "run": number}
        for line in ceilings.measure(sorted({problem.dtype for problem in left}), devices.pop(), hasty)
    ]
    runs = {**held.runs, number: {**facts, "budget": plan.budget.words, "longest": plan.budget.longest}}
    held = held._replace(ceilings=results.merged(held.ceilings, ceiling, ["kind", "dtype", "run"]), runs=runs)
    history, checks = remembered(held.rows), Checks()
    total, so_far = sum(weight(problem, cases) for problem, cases in left.items()), 0.0
    for problem, cases in left.items():
        part = so_far / total

        def say(words: str, part: float = part) -> None:
            progress(part, words)

        if time.monotonic() - begin > 60.0 * plan.budget.minutes:
            note = f"{results.NOT_BEGUN}: the run's {plan.budget.minutes:g} minutes were over"
            there = results.done(held.rows)
            rows = [{**blank(case, note), "run": number} for case in cases if key(case) not in there]
            held = held._replace(rows=results.merged(held.rows, rows, KEY))
            results.save(out, held)
            continue
        together = with_ours(cases, blocks[problem])
        block = measure(problem, together, plan.budget, int(str(facts["threads"])), history, checks, say)
        rows = [
            {**row, **ceilings.needed(case)._asdict(), "limit_s": ceilings.limit(case, ceiling), "run": number}
            for case, row in zip(together, block.rows, strict=True)
        ]
        samples = [{**line, "run": number} for line in block.samples]
        held = results.with_block(held, rows, samples, {key(case) for case in cases})
        held.runs[number]["seconds"] = round(time.monotonic() - begin, 1)
        results.save(out, held)
        so_far += weight(problem, cases)
    progress(1.0, "done")
    return held


PAST_BUDGET = ("predicted", "one step", "stopped after")


def again(row: dict[Any, Any], held: Results, plan: Plan) -> bool:
    """Whether a case was left out for a step's time, and this plan has more of it."""
    before = held.runs.get(str(row["run"]), {}).get("longest", 0.0)
    return str(row["note"]).startswith(PAST_BUDGET) and plan.budget.longest > before


def key(case: Case) -> tuple[object, ...]:
    p = case.problem
    return p.loss, p.dtype, p.n, p.d, p.classes, p.device, case.provider, case.mode


def with_ours(cases: list[Case], block: list[Case]) -> list[Case]:
    """The cases, and what they are divided by: our rows of the same modes, even if these are there already."""
    modes = {case.mode for case in cases}
    mine = [case for case in block if case.provider in ("ours", "ours-sampled") and case.mode in modes]
    return list(dict.fromkeys([*mine, *cases]))


def weight(problem: Problem, cases: list[Case]) -> float:
    """About how long a size takes, in any unit: starting the processes, and the work."""
    return 2e9 * len({case.provider for case in cases}) + 3.0 * problem.flops * len(cases)


def remembered(rows: pd.DataFrame) -> History:
    """What earlier runs know of the time of a step."""
    history = History()
    for row in rows[rows["samples"] > 0].itertuples():
        problem = Problem(row.N, row.D, row.C, row.dtype, row.device, row.loss)
        history.add(Case(problem, row.provider, row.mode), row.median_s)
    return history
