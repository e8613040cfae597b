"""How many cases the property tests generate: `ci`, the same ones each time, or `nightly`, `make nightly`, others each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

SHARED = {
    "phases": [p for p in Phase if p not in (Phase.explain, Phase.shrink)],
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
}
settings.register_profile("ci", max_examples=30, derandomize=True, **SHARED)
settings.register_profile("nightly", max_examples=2000, derandomize=False, print_blob=True, **SHARED)


def examples(share: float) -> Callable[[Any], Any]:
    """Settings of a test that runs this share of the profile's examples."""
    return settings(max_examples=max(1, round(settings().max_examples * share)))
