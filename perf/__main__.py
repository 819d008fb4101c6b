"""`python -m perf`."""

import sys

try:
    from perf.cli import main
except ModuleNotFoundError as error:
    print(f"error: {error}; pip install -e '.[perf]' installs what perf needs", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
