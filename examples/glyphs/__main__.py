"""`python -m examples.glyphs`: train a small CNN on 20,000 characters with a margin and without, and compare them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.glyphs", description=__doc__)
    parser.add_argument("--loss", nargs="+", default=["arcface", "softmax"], choices=["arcface", "cosface", "softmax"])
    parser.add_argument("--minutes", type=float, default=2.2, help="training time of each loss (default 2.2)")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--classes", type=int, default=20_000, help="characters to train on (default 20,000)")
    parser.add_argument("--unseen", type=int, default=6_000, help="characters to evaluate on (default 6,000)")
    parser.add_argument("--scripts", nargs="+", default=["han"], choices=["han", "hangul"])
    parser.add_argument("--limit", type=int, help="render the first so many code points only")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interval", type=float, default=15.0, help="seconds between checkpoints (default 15)")
    parser.add_argument("--fresh", action="store_true", help="forget the checkpoints of these settings and begin again")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--cache", type=Path, default=Path(".cache/glyphs"), help="rendered glyphs and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("reports/demo"), help="where the report is written")
    return parser.parse_args(line)


def main(line: list[str] | None = None) -> int:
    options = arguments(line)
    # Not at the top: the processes that render import this file too, and do without torch.
    from examples.glyphs import demo
    from examples.glyphs.train import Interrupted

    again = "python -m examples.glyphs " + " ".join(sys.argv[1:] if line is None else line).replace("--fresh", "")
    try:
        demo.run(options)
    except (Interrupted, KeyboardInterrupt) as reason:
        print(f"\n{reason or 'interrupted'}; `{' '.join(again.split())}` goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
