"""A run: every size of a plan, written as it goes; a second run goes on where the first was stopped."""

import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from perf.providers import fingerprints
from perf.suite import ceilings, results
from perf.suite.plans import Case, Plan, Row
from perf.suite.problem import Problem
from perf.suite.results import NOT_BEGUN, Results
from perf.suite.rounds import Rounds, blank

PAST_BUDGET = ("predicted", "one step", "stopped after")
Progress = Callable[[float, str], object]  # the part that is done, 0 to 1, and what is being done


def run_plan(
    plan: Plan, folder: Path, facts: Row, fresh: bool = False, progress: Progress = lambda part, words: None
) -> Results:
    """Measure what `folder` does not hold yet. KeyboardInterrupt leaves whole results.

    With `fresh` everything is measured; what was there stays until the new row is there. The rows of a head of your own
    whose file was edited go at once. Raises ValueError for another machine's folder.
    """
    held, begin = results.of_this_machine(folder, facts), time.monotonic()
    heads = fingerprints()

    def current(line: Row) -> bool:
        name, before = str(line["provider"]), held.runs.get(str(line["run"]), {})
        return name not in heads or before.get("heads", {}).get(name) == heads[name]

    rows = {results.key_of(row): row for row in filter(current, held.rows.to_dict("records"))}
    samples = [*filter(current, held.samples.to_dict("records"))]

    def again(row: Row) -> bool:
        """Also what was left out for a step's time, if this plan has more of it."""
        before = held.runs.get(str(row["run"]), {}).get("longest", 0.0)
        more = str(row["note"]).startswith(PAST_BUDGET) and plan.budget.longest > before
        return fresh or more or results.is_open(row)

    known, blocks = {key for key, row in rows.items() if not again(row)}, plan.blocks()
    left = {problem: own for problem, cases in blocks.items() if (own := [c for c in cases if c.key not in known])}
    if not left:
        return held
    number = str(max(map(int, held.runs), default=0) + 1)
    held.runs[number] = {**facts, "longest": plan.budget.longest, "heads": heads}
    progress(0.0, "the machine's ceilings")
    dtypes, device = sorted({problem.dtype for problem in left}), next(iter(left)).device
    best = [{**line, "run": number} for line in ceilings.measure(dtypes, device, hasty=facts.get("plan") == "tiny")]
    held = held._replace(ceilings=pd.DataFrame([*held.ceilings.to_dict("records"), *best]))
    rounds = Rounds(plan.budget, int(facts["threads"]))
    for row in rows.values():
        if row["samples"] > 0:
            p = Problem(row["N"], row["D"], row["C"], row["dtype"], row["device"], row["loss"])
            rounds.history.add(Case(p, row["provider"], row["mode"]), row["median_s"])
    # About how long a size takes, in any unit: starting the processes, and the work.
    weights = [2e9 * len({c.provider for c in cases}) + 3.0 * p.flops * len(cases) for p, cases in left.items()]
    for place, (problem, cases) in enumerate(left.items()):
        if time.monotonic() - begin > 60.0 * plan.budget.minutes:
            note = f"{NOT_BEGUN}: the {plan.budget.minutes:g} minutes were over"
            block = [blank(case, note) for case in cases], []
        else:
            # Ours takes part even where it is there already: the others are divided by it.
            modes = {case.mode for case in cases}
            mine = [c for c in blocks[problem] if c.provider in ("ours", "ours-sampled") and c.mode in modes]
            together = list(dict.fromkeys([*mine, *cases]))
            block = rounds.measure(together, functools.partial(progress, sum(weights[:place]) / sum(weights)))
            for case, row in zip(together, block[0], strict=True):
                row["limit_s"] = ceilings.limit(case, best)
        for line in itertools.chain(*block):
            line["run"] = number
        results.add_block(rows, samples, block, {case.key for case in cases})
        held.runs[number]["seconds"] = round(time.monotonic() - begin, 1)
        held = held._replace(rows=pd.DataFrame([*rows.values()]), samples=pd.DataFrame(samples))
        results.save(folder, held)
    progress(1.0, "done")
    return held
