// Stage `aggregate`: makes loss and metrics of the trajectories' statistics.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "contract.h"
#include "tensors.h"

namespace pmpo {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

using Options = AggregateOptions;
using metric::NUM_METRICS;

// The larger of the two, NaN if one is NaN.
double maximum(double a, double b) { return std::isnan(a) || a > b ? a : b; }

struct Totals {
  double loss, denominator, coefficient, metrics[NUM_METRICS];  // coefficient: the largest D dentropy of a token
};

// Adds up stats (NUM_STATS, B) over the trajectories, and writes clip_fraction (B,).
Totals totals(
    const double* stats, const bool* skipped, const double* denominator, int64_t B, const Options& o, double* clip_fraction) {
  double sums[NUM_STATS] = {}, kl = 0, entropy = 0, trajectories = 0, known_tokens = 0, known = 0, largest = 0;
  double ratio_max = -INF, power_max = -INF, power_low = -INF;
  for (int64_t i = 0; i < B; ++i) {
    double s[NUM_STATS];
    for (int row = 0; row < NUM_STATS; ++row) s[row] = stats[row * B + i];
    const double n = std::max(s[TOKENS], 1.0), weight = s[WEIGHT];
    const bool some = s[TOKENS] > 0, is_known = some && !(skipped && skipped[i]);
    clip_fraction[i] = (s[CLIPPED_LOW] + s[CLIPPED_HIGH]) / n;
    kl += weight / n * s[KL];
    entropy += weight / n * s[ENTROPY];
    s[POLICY_LOSS] *= weight;
    largest = std::max(largest, weight / n);
    if (!is_known) s[POWER] = 0;
    for (int row = 0; row < NUM_STATS; ++row) sums[row] += s[row];
    trajectories += some;
    if (!is_known) continue;
    ++known;
    known_tokens += s[TOKENS];
    ratio_max = maximum(ratio_max, s[RATIO_MAX]);
    power_max = maximum(power_max, s[POWER]);
    power_low = maximum(power_low, -s[POWER]);
  }
  const double count = o.by_tokens != 0 ? sums[TOKENS] : trajectories;
  const double D = denominator ? *denominator : std::max(count, 1.0);
  double loss = sums[POLICY_LOSS];
  if (o.beta != 0) loss += o.beta * kl;
  if (o.entropy_coef != 0) loss -= o.entropy_coef * entropy;

  const double per_token = std::max(sums[TOKENS], 1.0), per_known = std::max(known_tokens, 1.0), each = std::max(known, 1.0);
  const bool any = known > 0;
  Totals t{loss / D, D, std::abs(o.entropy_coef) * largest, {}};
  t.metrics[metric::CLIP_FRACTION_LOW] = sums[CLIPPED_LOW] / per_token;
  t.metrics[metric::CLIP_FRACTION_HIGH] = sums[CLIPPED_HIGH] / per_token;
  t.metrics[metric::RATIO_MEAN] = sums[RATIO_SUM] / per_known;
  t.metrics[metric::APPROX_KL] = sums[APPROX_KL] / per_known;
  t.metrics[metric::REF_KL] = sums[KL] / per_known;
  t.metrics[metric::ENTROPY] = sums[ENTROPY] / per_known;
  t.metrics[metric::POWER_MEAN] = sums[POWER] / each;
  t.metrics[metric::ESS] = sums[ESS] / each;
  t.metrics[metric::ESS_TARGET] = sums[ESS_TARGET] / each;
  t.metrics[metric::POLICY_LOSS] = sums[POLICY_LOSS] / D;
  t.metrics[metric::TOKENS] = sums[TOKENS];
  t.metrics[metric::TRAJECTORIES] = trajectories;
  t.metrics[metric::RATIO_MAX] = any ? ratio_max : 0;
  t.metrics[metric::POWER_MAX] = any ? power_max : 0;
  t.metrics[metric::POWER_MIN] = any ? 0 - power_low : 0;
  t.metrics[metric::CLIP_FRACTION] = t.metrics[metric::CLIP_FRACTION_LOW] + t.metrics[metric::CLIP_FRACTION_HIGH];
  return t;
}

template <class T>
void write(const Totals& found, const Tensor& loss, const Tensor& metrics) {
  *mutable_data<T>(loss) = static_cast<T>(found.loss);
  for (int m = 0; m < NUM_METRICS; ++m) mutable_data<T>(metrics)[m] = static_cast<T>(found.metrics[m]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> aggregate(
    const Tensor& stats, const std::optional<Tensor>& denominator, const std::optional<Tensor>& largest,
    const std::optional<Tensor>& skipped, const std::vector<double>& options, ScalarType dtype) {
  expect(
      stats.dim() == 2 && stats.size(0) == NUM_STATS && stats.scalar_type() == ScalarType::Double,
      "stats: expected float64 of shape (" + std::to_string(NUM_STATS) + ", B)");
  expect(dtype == ScalarType::Float || dtype == ScalarType::Double, "dtype: expected float32 or float64, got another");
  const int64_t B = stats.size(1);
  const Tensor stats64 = argument("stats", stats, ScalarType::Double, NUM_STATS * B);
  const std::optional<Tensor> D = argument("denominator", denominator, ScalarType::Double, 1),
                              top = argument("largest", largest, ScalarType::Double, 1),
                              left_out = argument("skipped", skipped, ScalarType::Bool, B);
  const Tensor loss = torch::stable::new_empty(stats64, {}, dtype), divisor = torch::stable::new_empty(stats64, {});
  const Tensor metrics = torch::stable::new_empty(stats64, {NUM_METRICS}, dtype);
  const Tensor clip_fraction = torch::stable::new_empty(stats64, {B});
  const auto o = read_options<Options>(options, "AggregateOptions");
  Totals found = totals(
      data<double>(stats64), data<bool>(left_out), data<double>(D), B, o, mutable_data<double>(clip_fraction));
  const bool overflows =
      top && !((*data<double>(top) + o.entropy_factor * found.coefficient) / found.denominator <= o.limit);
  if (overflows) found.loss += INF;
  *mutable_data<double>(divisor) = found.denominator;
  dtype == ScalarType::Float ? write<float>(found, loss, metrics) : write<double>(found, loss, metrics);
  return {loss, divisor, metrics, clip_fraction};
}

}  // namespace
}  // namespace pmpo

STABLE_TORCH_LIBRARY_IMPL(pmpo_kernels, CPU, m) { m.impl("aggregate.cpp", TORCH_BOX(&pmpo::aggregate)); }
