// The mathematics of one trajectory: clip, weights, power mean, ESS and the Newton solver for p, all in float64.
// No dependency on torch. Order, names and constants are those of reference.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "contract.h"

namespace pmpo {

constexpr double INF = std::numeric_limits<double>::infinity();

struct Clipped {
  double d;
  bool below, above;
};

// Bounds of a clip in log space. For A > 0 they are -under, infinite unless the clip is two-sided, and high. For A < 0 they are
// -low and dual, which is high in a two-sided clip.
struct Bounds {
  double low, high, dual, under;
};

// Clips a token's d or a trajectory's log M_p pessimistically. A = 0 clips nothing.
inline Clipped clip_log_ratio(double d, double advantage, const Bounds& b) {
  const double floor = advantage < 0 ? -b.low : advantage > 0 ? -b.under : -INF;
  const double ceiling = advantage > 0 ? b.high : advantage < 0 ? b.dual : INF;
  const bool below = d < floor, above = d > ceiling;
  return {above ? ceiling : below ? floor : d, below, above};
}

// l = log a of the tokens with a_t > 0, centred on their mean.
struct LogWeights {
  const double* x;
  int64_t alive;
  double mean, x_min, x_max;
  double tokens;  // number of tokens of the policy term, with a_t > 0 or not
  bool has_zero;  // whether some a_t is 0
};

// Centres l[0 .. alive) in place. `tokens` is the number of tokens of the policy term, those with a_t = 0 among them.
inline LogWeights centre(double* l, int64_t alive, int64_t tokens) {
  double sum = 0, least = INF, most = -INF;
  for (int64_t k = 0; k < alive; ++k) {
    sum += l[k];
    least = std::min(least, l[k]);
    most = std::max(most, l[k]);
  }
  const double mean = sum / static_cast<double>(std::max<int64_t>(alive, 1));
  for (int64_t k = 0; k < alive; ++k) l[k] -= mean;
  return {l, alive, mean, alive ? least - mean : 0, alive ? most - mean : 0, static_cast<double>(tokens),
          alive < tokens};
}

// What the loss and the solver need of the weights a^p of a trajectory, at one p.
struct Moments {
  double log_mean;  // log( (1/n) sum a^p ), of a centred on its mean
  double deficit;   // log(n / ESS(p)) = log(1 + CV^2 of a^p)
  double slope;     // d deficit / dp
};

// Moments at p: by expm1 where max |p x| < 1, so that a small p keeps its digits, elsewhere by exp, shifted.
inline Moments moments(const LogWeights& l, double p) {
  const double n = std::max(l.tokens, 1.0);
  const double top = std::max(p * l.x_min, p * l.x_max);
  const bool small = std::max(top, -std::min(p * l.x_min, p * l.x_max)) < 1 && !l.has_zero;
  double sum_e = 0, sum_ee = 0, sum_w = 0, sum_ww = 0, sum_wx = 0, sum_wwx = 0;
  for (int64_t k = 0; k < l.alive; ++k) {
    const double x = l.x[k], e = small ? std::expm1(p * x) : 0, w = small ? 1 + e : std::exp(p * x - top);
    sum_e += e;
    sum_ee += e * e;
    sum_w += w;
    sum_ww += w * w;
    sum_wx += w * x;
    sum_wwx += w * w * x;
  }
  if (sum_w == 0) sum_w = 1;
  if (sum_ww == 0) sum_ww = 1;
  const double slope = 2 * (sum_wwx / sum_ww - sum_wx / sum_w);
  if (!small) return {top + std::log(sum_w / n), std::log(n * sum_ww) - 2 * std::log(sum_w), slope};
  const double mean_e = sum_e / n;
  const double cv2 = (sum_ee / n - mean_e * mean_e) / ((1 + mean_e) * (1 + mean_e));
  return {std::log1p(mean_e), std::log1p(cv2), slope};
}

// Whether M_p is 0: because p <= 0 meets a weight of 0, or all weights are 0.
inline bool nothing_left(const LogWeights& l, double p) { return l.has_zero && (p <= 0 || l.alive == 0); }

// log M_p for any real p. At p = 0 it is the mean of log a; it is -inf where M_p = 0.
inline double log_power_mean(const LogWeights& l, double p, double log_mean) {
  if (nothing_left(l, p)) return -INF;
  return l.mean + (p == 0 ? 0 : log_mean / p);
}

struct Solution {
  double power;
  int64_t iterations;
};

// Solves log(n / ESS(p)) = deficit for p by Newton's method in u = p^2 inside a bracket, as `reference.newton` does.
inline Solution newton(const LogWeights& l, double deficit, double power_min, double power_max) {
  double lo = power_min * power_min, hi = power_max * power_max;
  const double most = moments(l, power_max).deficit;
  if (std::isnan(deficit + most)) return {deficit + most, 0};
  const double tolerance = NEWTON_TOLERANCE * std::min(most, 1.0);
  if (most - deficit <= tolerance || (l.x_max <= l.x_min && !l.has_zero)) return {power_max, 0};
  if (deficit - moments(l, power_min).deficit <= tolerance) return {power_min, 0};
  double variance = 0;
  for (int64_t k = 0; k < l.alive; ++k) variance += l.x[k] * l.x[k];
  double u = deficit / (variance / std::max(l.tokens, 1.0));
  if (!(u > lo && u < hi)) u = (lo + hi) / 2;
  for (int64_t iteration = 1; iteration <= MAX_NEWTON_ITERATIONS; ++iteration) {
    const double p = std::sqrt(u);
    const Moments at = moments(l, p);
    const double g = at.deficit - deficit, slope = at.slope / (2 * p);
    if (std::abs(g) <= tolerance) return {p, iteration};
    if (g < 0) lo = u;
    if (g > 0) hi = u;
    double step = u - g / slope;
    const double room = most - at.deficit;
    const double saturating = u + std::log(room / (most - deficit)) * room / slope;
    if (g < 0 && saturating > step && saturating < hi) step = saturating;
    u = step > lo && step < hi ? step : (lo + hi) / 2;
  }
  return {std::sqrt(u), MAX_NEWTON_ITERATIONS};
}

}  // namespace pmpo
