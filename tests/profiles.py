"""How many cases the property tests generate: `ci`, the same ones each time, or `nightly`, `make nightly`, others each time."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, Phase, settings

SHARED = {
    "deadline": None,
    "database": None,
    "phases": [
        p for p in Phase if p not in (Phase.explain, Phase.shrink)
    ],  # minutes a failure, and numbers come from a seed
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
}
settings.register_profile("ci", max_examples=40, derandomize=True, **SHARED)
settings.register_profile("nightly", max_examples=680, print_blob=True, **SHARED)

cases: Counter[str] = Counter()  # generated in this run, by test
