"""`python -m perf`."""

from perf.cli import app

if __name__ == "__main__":
    app(prog_name="python -m perf")
