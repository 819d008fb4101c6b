"""Speed and memory of the losses, beside other code that computes the same: `python -m perf --help`.

A run:

    grid.py       which cases are measured (size x provider x mode), and how long each may take
    problem.py    one size: N, D, C, dtype, loss, and its tensors
    providers/    one file a competitor
    run.py        every size of a plan, written as it goes
    measure.py    one size: providers take turns, each in a process of its own (worker.py), under a memory limit
                  (limits.py), with W in memory that they share (shared.py)
    correct.py    is it right? Before it is fast
    peaks.py      peak memory of a step; clock.py: its time
    ceilings.py   what the machine does at best, and the least time a case can take
    results.py    the CSVs and their schema
    noise.py      how far a ratio can be trusted
    findings.py   what the numbers say; bounds.py: what was promised
    report.py     the page (page.html), with the pictures of plots.py; readme.py: the numbers of README.md
    compare.py    one run against another
    check.py      counts instead of times, against the committed counts.json

What bounds a step on this machine: roofline.py (counts.py x rates.py), profiling.py.

GPUs, from compiled code: kernels.py (compiled.py, static.py, gpus.py, kernel_plots.py), tune.py, counted.py,
executed.py, gate.py.

Memory and time of settings before they run: plan.py, planned.py, scale.py, predicted.py, published.py, plan_check.py.
"""
