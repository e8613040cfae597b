"""The profiles that say how many cases the property tests generate: `ci`, the same ones each time, or `nightly` for `make nightly`,
others each time."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, Phase, settings

SHARED = {
    "deadline": None,
    "database": None,
    "phases": [
        Phase.explicit,
        Phase.reuse,
        Phase.generate,
        Phase.target,
    ],  # to shrink takes minutes, and numbers come from a seed
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
}
settings.register_profile("ci", derandomize=True, **SHARED)
settings.register_profile("nightly", print_blob=True, **SHARED)

EXAMPLES = {"ci": 60, "nightly": 620}  # of a property with share 1, in one implementation
cases: Counter[str] = Counter()  # generated in this run, by test
