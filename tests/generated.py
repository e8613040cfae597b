"""Makes tests of a property: one for each implementation, over cases that hypothesis generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import profiles
import pytest
from conftest import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SMALL, Sizes

Property = Callable[[st.DataObject, str, str, Sizes], None]
COST = {
    "reference": 1.0,
    "cpp": 1.0,
    "triton": 0.12,
}  # the share of the examples that each runs: the interpreter is slow


def for_every(share: float = 1.0, impls: Sequence[str] = tuple(COST)) -> Callable[[Property], Callable[[str], None]]:
    """Make a test of (data, impl, device, sizes) for each implementation, with this share of the profile's examples."""

    def decorate(function: Property) -> Callable[[str], None]:
        @pytest.mark.parametrize("impl", impls)
        def run(impl: str) -> None:
            device = device_of(impl)
            interpreted = impl == "triton" and device == "cpu"
            part = share * (COST[impl] if interpreted else 1.0)

            def case(data: st.DataObject) -> None:
                profiles.cases[function.__name__] += 1
                function(data, impl, device, SMALL if interpreted else Sizes())

            case.__name__ = f"{function.__name__}_{impl}"  # from which `ci` derives its seed
            limit = settings(max_examples=max(1, round(profiles.EXAMPLES[settings.get_current_profile_name()] * part)))
            limit(given(data=st.data())(case))()

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return run

    return decorate
