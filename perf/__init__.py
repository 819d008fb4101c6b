"""Speed and memory of the losses, beside other code that computes the same: `python -m perf --help`.

problem.py    one size: N, D, C, dtype, and its tensors
providers/    one file a competitor
tables.py     which rows are measured, at which sizes
timing.py     all rows of a table round-robin in one process; clock.py times one call
memory.py     the peak of one row, in a process of its own
bounds.py     what the rows promise
audit.py      counted flops and bytes (counts.py) against measured rates (rates.py): what bounds a row
report.py     the page and the plots from the CSVs
kernels.py    the Triton kernels compiled for GPUs that need not be here (compiled.py), what bounds them (static.py with
              the published rates of gpus.py), and a step predicted
tune.py       the table of tiles from the same
counted.py    bytes and flops counted while the kernels execute on the CPU, beside Liger-Kernel's
plan.py       chunk size and memory for given sizes
"""
