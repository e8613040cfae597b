"""Is a loss right? The float64 oracle and what its comparison allows; `baseline`, the loss as people write it in eager PyTorch;
`peers`, the same losses by other packages.
"""

from pmpo_kernels.verification.oracle import (
    Case,
    Oracle,
    ThreePartError,
    Verdict,
    configurations,
    error_bound,
    make_case,
    oracle,
    row_sum_tolerance,
    three_part_error,
    tolerance,
    verify,
)

__all__ = [
    "Case",
    "Oracle",
    "ThreePartError",
    "Verdict",
    "configurations",
    "error_bound",
    "make_case",
    "oracle",
    "row_sum_tolerance",
    "three_part_error",
    "tolerance",
    "verify",
]
