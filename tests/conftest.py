"""What every test file runs under."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples on every run and every machine; HYPOTHESIS_PROFILE=explore looks at new ones.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("fixed"), derandomize=False, max_examples=1000)
settings.load_profile("fixed")
