"""Speed and memory of the losses versus other code that computes the same: `python -m perf --help`.

    suite/      one harness for CPUs and GPUs: problem -> plans -> runner -> rounds -> worker -> results
    providers/  one file a competitor; `--provider my_head.py:MyHead` adds one of your own
    report/     the page, two runs compared, the tables of README
    counts/     counts instead of times, held by `make perf-check`: work of a step, operations that a GPU step launches
    kernels/    the Triton kernels as machine code, what they need, a model of their time
    planner/    memory of a head before it runs, and the check of that formula
    gate.py     what a person with a GPU for ten minutes runs

perf belongs to the repository and is not installed: it measures a checkout, and its results name the commit.
"""
