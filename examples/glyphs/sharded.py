"""`python -m examples.glyphs.sharded`: Hangul and Han together, with class sampling, in one process.

Under `torchrun --nproc-per-node 2 -m examples.glyphs.sharded` the classes are split over the ranks. Run again, on
whatever number of ranks, it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.glyphs.sharded", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps of training (default 2,000)")
    parser.add_argument("--rate", type=float, default=0.1, help="fraction of the classes a step walks (default 0.1)")
    parser.add_argument("--classes", type=int, default=40_000, help="characters to train on (default 40,000)")
    parser.add_argument("--unseen", type=int, default=900, help="characters to evaluate on (default 900)")
    parser.add_argument("--limit", type=int, help="render the first so many code points only")
    parser.add_argument("--batch", type=int, default=256, help="pictures a step, of all ranks together (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interval", type=float, default=15.0, help="seconds between checkpoints (default 15)")
    parser.add_argument("--every", type=int, help="a checkpoint after so many steps instead")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoints of these settings and begin again")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice, torchrun's is 1")
    parser.add_argument("--cache", type=Path, default=Path(".cache/glyphs"), help="rendered glyphs and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("reports/demo"), help="where the report is written")
    parser.add_argument(
        "--compare", action="store_true", help="one process and two ranks over three seeds, see compare.py"
    )
    parser.add_argument("--kinds", nargs="+", help="with --compare: only these, the others stay in the report")
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> int:
    options = arguments(line)
    # Not at the top: the processes that render import this file too, and do without torch.
    import torch
    import torch.distributed as dist

    from examples.glyphs import compare, partial_fc
    from examples.glyphs.train import Interrupted

    if options.compare:
        compare.run(options)
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    try:
        partial_fc.run(options)
    except (Interrupted, KeyboardInterrupt) as reason:
        print(f"\n{reason or 'interrupted'}; the same command without --fresh goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
