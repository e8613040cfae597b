// What every implementation shares: the names of contract.py in their order. A test compares the two files by `_C.contract()`.
// No dependency on torch.

#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace pmpo {

#define PMPO_RULES(X) X(FIXED) X(RELATIVE) X(ABSOLUTE) X(TARGET)
#define PMPO_TRAJECTORY_OPTIONS(X)                                                                                  \
  X(rule) X(power) X(power_min) X(power_max) X(full_clip_fraction) X(ess_sharpness) X(ess_floor)                    \
  X(token_low) X(token_high) X(token_dual) X(token_under)                                                           \
  X(sequence_low) X(sequence_high) X(sequence_dual) X(sequence_under)                                               \
  X(by_length) X(length_norm) X(beta) X(kl_order) X(kl_slope_order) X(kl_weighted) X(entropy_coef)
#define PMPO_AGGREGATE_OPTIONS(X) X(by_tokens) X(beta) X(entropy_coef) X(limit) X(entropy_factor)
#define PMPO_STATS(X)                                                                                               \
  X(TOKENS) X(WEIGHT) X(POLICY_LOSS) X(KL) X(ENTROPY) X(POWER) X(ESS) X(ESS_TARGET) X(CLIPPED_LOW) X(CLIPPED_HIGH)   \
  X(RATIO_SUM) X(RATIO_MAX) X(APPROX_KL)
#define PMPO_METRICS(X)                                                                                             \
  X(CLIP_FRACTION_LOW) X(CLIP_FRACTION_HIGH) X(RATIO_MEAN) X(APPROX_KL) X(REF_KL) X(ENTROPY) X(POWER_MEAN) X(ESS)    \
  X(ESS_TARGET) X(POLICY_LOSS) X(TOKENS) X(TRAJECTORIES) X(RATIO_MAX) X(POWER_MAX) X(POWER_MIN) X(CLIP_FRACTION)

#define PMPO_ENUMERATOR(name) name,
#define PMPO_MEMBER(name) double name;

enum Rule { PMPO_RULES(PMPO_ENUMERATOR) };                  // `TrajectoryOptions::rule`
enum Stat { PMPO_STATS(PMPO_ENUMERATOR) NUM_STATS };        // rows of a trajectory's statistics
namespace metric {
enum Metric { PMPO_METRICS(PMPO_ENUMERATOR) NUM_METRICS };  // elements of the metrics
}

struct TrajectoryOptions {
  PMPO_TRAJECTORY_OPTIONS(PMPO_MEMBER)
};
struct AggregateOptions {
  PMPO_AGGREGATE_OPTIONS(PMPO_MEMBER)
};

// Options from the numbers of an operator, one a member.
template <class Options>
Options read_options(const std::vector<double>& values, const char* name) {
  if (values.size() * sizeof(double) != sizeof(Options))
    throw std::invalid_argument(std::string("options: expected those of ") + name);
  Options options;
  std::memcpy(&options, values.data(), sizeof(Options));
  return options;
}

constexpr int MAX_NEWTON_ITERATIONS = 20;
constexpr double NEWTON_TOLERANCE = 1e-10;
constexpr int64_t ELSEWHERE = -(int64_t{1} << 31);  // the id of a target in another rank's part of the vocabulary

}  // namespace pmpo
