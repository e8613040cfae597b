"""What the kernel that chooses p computes with: the moments of a trajectory's weights at one p, and Newton's iteration for p.

Each pass reads the log weights l of the trajectory from memory, at tokens `start` to `stop` (float64, -inf for a weight of 0).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from pmpo_kernels.contract import ABSOLUTE, MAX_NEWTON_ITERATIONS, NEWTON_TOLERANCE, TARGET

_ABSOLUTE = tl.constexpr(ABSOLUTE)
_TARGET = tl.constexpr(TARGET)
_MAX_ITERATIONS = tl.constexpr(MAX_NEWTON_ITERATIONS)
_TOLERANCE = tl.constexpr(NEWTON_TOLERANCE)
_INF = tl.constexpr(float("inf"))
_INVERSE_FACTORIAL = tl.constexpr(tuple(1 / math.factorial(k) for k in range(19)))


@triton.jit
def expm1(x, exp_x):
    """exp(x) - 1 to a few ulp, from exp(x) and log alone (Kahan)."""
    tiny = exp_x == 1.0
    huge = (exp_x - 1.0 == -1.0) | (exp_x == _INF)
    return tl.where(tiny, x, tl.where(huge, exp_x - 1.0, (exp_x - 1.0) * x / tl.log(tl.where(tiny | huge, 2.0, exp_x))))


@triton.jit
def _expm1_series(x):
    """exp(x) - 1 for |x| < 1 to a few ulp: sum_k x^k / k! up to k = 18. The next term is below 1e-17 of it."""
    series = x * 0.0 + _INVERSE_FACTORIAL[18]
    for k in tl.static_range(17):
        series = series * x + _INVERSE_FACTORIAL[17 - k]
    return series * x


@triton.jit
def _log1p(x):
    """log(1 + x) to a few ulp, from log alone (Kahan)."""
    u = 1.0 + x
    tiny = u == 1.0
    return tl.where(tiny, x, tl.log(u) * x / tl.where(tiny, 1.0, u - 1.0))


@triton.jit
def centred(first, stop, mean, l_ptr, BLOCK: tl.constexpr):
    """Return, for one block of tokens, l - mean where the weight is above 0, else 0, and whether it is above 0."""
    offs = first + tl.arange(0, BLOCK)
    l = tl.load(l_ptr + offs, mask=offs < stop, other=-_INF)
    alive = l != -_INF
    return tl.where(alive, l - mean, 0.0), alive


@triton.jit
def moments(p, mean, x_min, x_max, has_zero, n, start, stop, l_ptr, BLOCK: tl.constexpr):
    """Return the numbers of `reference.Moments` for one trajectory at p: log_mean, deficit and slope."""
    top = tl.maximum(p * x_min, p * x_max)
    small = (tl.maximum(top, -tl.minimum(p * x_min, p * x_max)) < 1) & (has_zero == 0)
    w = tl.zeros((BLOCK,), tl.float64)  # sums of the weights a^p, or if `small` of expm1(p x) = a^p - 1
    ww = tl.zeros((BLOCK,), tl.float64)
    wx = tl.zeros((BLOCK,), tl.float64)
    wwx = tl.zeros((BLOCK,), tl.float64)
    if small:
        for first in range(start, stop, BLOCK):
            x, _ = centred(first, stop, mean, l_ptr, BLOCK)
            e = _expm1_series(p * x)
            w += e
            ww += e * e
            wx += e * x
            wwx += e * e * x
    else:
        for first in range(start, stop, BLOCK):
            x, alive = centred(first, stop, mean, l_ptr, BLOCK)
            e = tl.where(alive, tl.exp(p * x - top), 0.0)
            w += e
            ww += e * e
            wx += e * x
            wwx += e * e * x
    w, ww, wx, wwx = tl.sum(w, axis=0), tl.sum(ww, axis=0), tl.sum(wx, axis=0), tl.sum(wwx, axis=0)
    if small:  # weights 1 + e with sum x = 0
        mean_e = w / n
        log_mean = _log1p(mean_e)
        deficit = _log1p((ww / n - mean_e * mean_e) / ((1.0 + mean_e) * (1.0 + mean_e)))
        slope = (2.0 * wx + wwx) / (n + 2.0 * w + ww) - wx / (n + w)
    else:
        w = tl.where(w == 0, 1.0, w)
        ww = tl.where(ww == 0, 1.0, ww)
        log_mean = top + tl.log(w / n)
        deficit = tl.log(n * ww) - 2.0 * tl.log(w)
        slope = wwx / ww - wx / w
    return log_mean, deficit, 2.0 * slope


@triton.jit
def newton(
    deficit, power_min, power_max, least, most, variance, mean, x_min, x_max, has_zero, n, start, stop, l_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Solve log(n / ESS(p)) = deficit for p as `reference.newton` does. The bracket's ends have the deficits `least` and `most`."""
    lo = power_min * power_min
    hi = power_max * power_max
    tolerance = tl.minimum(most, 1.0) * _TOLERANCE
    at_max = (most - deficit <= tolerance) | ((x_max <= x_min) & (has_zero == 0))
    at_min = deficit - least <= tolerance
    u = deficit / variance
    u = tl.where((u > lo) & (u < hi), u, (lo + hi) / 2)
    left = tl.where(at_max | at_min, 0, _MAX_ITERATIONS)
    while left > 0:
        p = tl.sqrt(u)
        _, now, slope = moments(p, mean, x_min, x_max, has_zero, n, start, stop, l_ptr, BLOCK)
        g = now - deficit
        slope = slope / (2.0 * p)
        lo = tl.where(g < 0, u, lo)
        hi = tl.where(g > 0, u, hi)
        step = u - g / slope
        if g < 0:
            room = most - now
            saturating = u + tl.log(room / (most - deficit)) * room / slope
            step = tl.where((saturating > step) & (saturating < hi), saturating, step)
        step = tl.where((step > lo) & (step < hi), step, (lo + hi) / 2)
        done = tl.abs(g) <= tolerance
        u = tl.where(done, u, step)
        left = tl.where(done, 0, left - 1)
    p = tl.where(at_max, power_max, tl.where(at_min, power_min, tl.sqrt(u)))
    nan = deficit + most
    return tl.where(nan == nan, p, nan)


@triton.jit
def choose_power(
    ess_rule, clipped, target_ess, mean, x_min, x_max, has_zero, n, alive, start, stop, l_ptr, BLOCK: tl.constexpr
):
    """Return p and log(n / ESS*) by an adaptive rule, from the number of clipped tokens or the given target."""
    rule, power_min, power_max, full_clip_fraction, ess_sharpness, ess_floor = ess_rule
    variance = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        x, _ = centred(first, stop, mean, l_ptr, BLOCK)
        variance += x * x
    _, most, _ = moments(power_max, mean, x_min, x_max, has_zero, n, start, stop, l_ptr, BLOCK)
    least = tl.log(n / tl.maximum(alive, 1.0))  # at p = 0 all weights are 1
    if power_min != 0:
        _, least, _ = moments(power_min, mean, x_min, x_max, has_zero, n, start, stop, l_ptr, BLOCK)
    fraction = tl.minimum(clipped / n / full_clip_fraction, 1.0)
    severity = tl.where(fraction > 0, tl.exp(ess_sharpness * tl.log(tl.where(fraction > 0, fraction, 1.0))), 0.0)
    relative = -_log1p((1.0 - severity) * expm1(-most, tl.exp(-most)))
    absolute = -tl.log(ess_floor + (1.0 - ess_floor) * severity)
    deficit = tl.where(rule == _TARGET, tl.log(n) - tl.log(target_ess), tl.where(rule == _ABSOLUTE, absolute, relative))
    p = newton(
        deficit, power_min, power_max, least, most, tl.sum(variance, axis=0) / n, mean, x_min, x_max, has_zero, n,
        start, stop, l_ptr, BLOCK,
    )  # fmt: skip
    return p, deficit
