"""What every test file runs under."""

from __future__ import annotations

from cases import MORE
from hypothesis import HealthCheck, settings

# The same examples on every run and every machine, unless more are asked for.
settings.register_profile(
    "ours", derandomize=MORE == 1, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ours")
