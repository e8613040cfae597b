// Stage `trajectory`: clip, statistics, p, loss and per-token gradient of each trajectory, all in float64.
// Order and names are those of reference.py.

#include <cmath>
#include <tuple>
#include <vector>

#include "contract.h"
#include "power_mean.h"
#include "tensors.h"

namespace pmpo {
namespace {

using Options = TrajectoryOptions;

Bounds token_bounds(const Options& o) { return {o.token_low, o.token_high, o.token_dual, o.token_under}; }
Bounds sequence_bounds(const Options& o) {
  return {o.sequence_low, o.sequence_high, o.sequence_dual, o.sequence_under};
}

// What `compute` reads: arrays of all N tokens, nullptr where not given, and the numbers of one trajectory.
struct Inputs {
  const double *logp, *old_logp;
  const bool *mask, *policy_mask;
  const double *ref_logp, *rollout_weights, *entropy;
  double advantage, power, target_ess;
  bool has_power;
};

struct Token {
  bool valid, counts;  // whether it is a response token, and one of the policy term
  double d, l;  // log-ratio, log weight
  bool below, above;
};

Token token(const Inputs& in, const Options& o, int64_t t) {
  if (in.mask && !in.mask[t]) return {false, false, 0, 0, false, false};
  const double logp = in.logp[t];
  // on-policy every ratio is 1, also where logp is -inf
  const double d = in.old_logp ? logp - in.old_logp[t] : logp == -INF ? 0 : logp - logp;
  const Clipped c = clip_log_ratio(d, in.advantage, token_bounds(o));
  const double log_v = in.rollout_weights ? std::log(in.rollout_weights[t]) : 0;
  return {true, !in.policy_mask || in.policy_mask[t], d, c.d + log_v, c.below, c.above};
}

struct Penalty {
  double value, slope;
};

// Estimate of KL(policy, reference), k1, k2 or k3 at r = ref_logp - logp, and its derivative in logp. Where kl_slope_order names
// another estimator, the derivative is that one's. With kl_weighted the estimate is multiplied by exp(d), which depends on logp.
Penalty kl_penalty(double r, double d, const Options& o) {
  const double e = std::expm1(r);
  const double value = o.kl_order == 1 ? -r : o.kl_order == 2 ? r * r / 2 : e - r;
  const double slope = o.kl_slope_order == 1 ? 1 : o.kl_slope_order == 2 ? -r : -e;
  if (o.kl_weighted == 0) return {value, slope};
  return {std::exp(d) * value, std::exp(d) * (slope + value)};
}

// log(n / ESS*), the target that the rule makes of the number of clipped tokens or of target_ess.
double target_deficit(const LogWeights& l, double clipped, double target_ess, const Options& o) {
  const double n = std::max(l.tokens, 1.0);
  if (o.rule == TARGET) return std::log(n) - std::log(target_ess);
  const double severity = std::pow(std::min(clipped / n / o.full_clip_fraction, 1.0), o.ess_sharpness);
  if (o.rule == ABSOLUTE) return -std::log(o.ess_floor + (1 - o.ess_floor) * severity);
  const double lost = -std::expm1(-moments(l, o.power_max).deficit);
  return -std::log1p(-(1 - severity) * lost);
}

// Computes one trajectory: writes its statistics stats[row * B] and its tokens' gradients. `alive` is room for its log weights.
void compute(
    const Inputs& in, const Options& o, int64_t start, int64_t stop, double* alive, double* stats, int64_t B,
    double* dlogp, double* dentropy) {
  const double A = in.advantage;
  double s[NUM_STATS] = {};
  int64_t tokens = 0, counted = 0, count = 0;
  for (int64_t t = start; t < stop; ++t) {
    const Token token_t = token(in, o, t);
    if (!token_t.valid) continue;
    ++tokens;
    if (token_t.counts) {
      ++counted;
      if (token_t.l != -INF) alive[count++] = token_t.l;
      s[CLIPPED_LOW] += token_t.below;
      s[CLIPPED_HIGH] += token_t.above;
    }
    const double ratio = std::exp(token_t.d);
    s[RATIO_SUM] += ratio;
    if (ratio > s[RATIO_MAX] || std::isnan(ratio)) s[RATIO_MAX] = ratio;
    s[APPROX_KL] += std::expm1(token_t.d) - token_t.d;
    if (in.ref_logp) s[KL] += kl_penalty(in.ref_logp[t] - in.logp[t], token_t.d, o).value;
    if (in.entropy) s[ENTROPY] += in.entropy[t];
  }
  const LogWeights l = centre(alive, count, counted);
  const double k = std::max(l.tokens, 1.0), n = std::max(static_cast<double>(tokens), 1.0), share = l.tokens / n;

  double p = in.has_power ? in.power : o.power, deficit = 0;
  if (o.rule != FIXED) {
    deficit = target_deficit(l, s[CLIPPED_LOW] + s[CLIPPED_HIGH], in.target_ess, o);
    p = newton(l, deficit, o.power_min, o.power_max).power;
  }
  const Moments at = moments(l, p);
  const double log_m = log_power_mean(l, p, at.log_mean);
  const Clipped m = clip_log_ratio(log_m, A, sequence_bounds(o));
  const bool acts = counted > 0 && A != 0 && log_m != -INF;
  const double weight = tokens > 0 ? (o.by_length != 0 ? n : 1) / o.length_norm : 0;

  // -w A M_p W_t where nothing is clipped, with M_p W_t in log space. KL and entropy are token means with the same weight.
  const double per_token = weight / n, log_scale = log_m - at.log_mean - std::log(k);
  for (int64_t t = start; t < stop; ++t) {
    const Token token_t = token(in, o, t);
    const bool flows =
        token_t.valid && token_t.counts && token_t.l != -INF && !token_t.below && !token_t.above && acts && !m.below && !m.above;
    dlogp[t] = flows ? -weight * A * share * std::exp(log_scale + p * (token_t.l - l.mean)) : 0;
    if (token_t.valid && in.ref_logp && o.beta != 0)
      dlogp[t] += o.beta * per_token * kl_penalty(in.ref_logp[t] - in.logp[t], token_t.d, o).slope;
    if (dentropy) dentropy[t] = token_t.valid ? -o.entropy_coef * per_token : 0;
  }

  s[TOKENS] = static_cast<double>(tokens);
  s[WEIGHT] = weight;
  s[POLICY_LOSS] = acts ? -A * share * std::exp(m.d) : 0;
  s[POWER] = p;
  s[ESS] = counted > 0 && !nothing_left(l, p) ? k * std::exp(-at.deficit) : 0;
  s[ESS_TARGET] = o.rule == FIXED ? s[ESS] : counted > 0 ? k * std::exp(-deficit) : 0;
  if (m.below) s[CLIPPED_LOW] = l.tokens;
  if (m.above) s[CLIPPED_HIGH] = l.tokens;
  for (int row = 0; row < NUM_STATS; ++row) stats[row * B] = s[row];
}

std::tuple<Tensor, Tensor, Tensor> trajectory(
    const Tensor& logp, const std::optional<Tensor>& entropy, const Tensor& advantages, const Tensor& cu_seqlens,
    const std::optional<Tensor>& old_logp, const std::optional<Tensor>& mask, const std::optional<Tensor>& ref_logp,
    const std::optional<Tensor>& rollout_weights, const std::optional<Tensor>& policy_mask,
    const std::optional<Tensor>& power, const std::optional<Tensor>& target_ess, const std::vector<double>& options) {
  const int64_t N = logp.numel(), B = advantages.numel();
  constexpr ScalarType Double = ScalarType::Double;
  const auto o = read_options<Options>(options, "TrajectoryOptions");
  expect(o.rule != TARGET || target_ess, "target_ess: expected a tensor with this rule of p, got None");
  const Tensor logp64 = argument("logp", logp, Double, N), A = argument("advantages", advantages, Double, B);
  const std::optional<Tensor> old64 = argument("old_logp", old_logp, Double, N),
                              keep = argument("mask", mask, ScalarType::Bool, N),
                              counts = argument("policy_mask", policy_mask, ScalarType::Bool, N),
                              ref64 = argument("ref_logp", ref_logp, Double, N),
                              weights64 = argument("rollout_weights", rollout_weights, Double, N),
                              entropy64 = argument("entropy", entropy, Double, N),
                              power64 = argument("power", power, Double, B),
                              target64 = argument("target_ess", target_ess, Double, B);
  const Tensor offsets = argument("cu_seqlens", cu_seqlens, ScalarType::Long, B + 1);
  check_offsets(data<int64_t>(offsets), B, N);

  const bool has_dentropy = entropy && o.entropy_coef != 0;
  const Tensor dlogp = torch::stable::new_empty(logp64, {N});
  const Tensor dentropy = torch::stable::new_empty(logp64, {has_dentropy ? N : 0});
  const Tensor stats = torch::stable::new_empty(logp64, {NUM_STATS, B});
  std::vector<double> alive(static_cast<size_t>(N));
  parallel_trajectories(data<int64_t>(offsets), B, [&](int64_t i, int64_t start, int64_t stop) {
    const Inputs in{
        data<double>(logp64), data<double>(old64), data<bool>(keep), data<bool>(counts), data<double>(ref64),
        data<double>(weights64), data<double>(entropy64), data<double>(A)[i], power64 ? data<double>(power64)[i] : 0,
        target64 ? data<double>(target64)[i] : 0, power64.has_value()};
    compute(
        in, o, start, stop, alive.data() + start, mutable_data<double>(stats) + i, B, mutable_data<double>(dlogp),
        has_dentropy ? mutable_data<double>(dentropy) : nullptr);
  });
  return {dlogp, dentropy, stats};
}

}  // namespace
}  // namespace pmpo

STABLE_TORCH_LIBRARY_IMPL(pmpo_kernels, CPU, m) { m.impl("trajectory.cpp", TORCH_BOX(&pmpo::trajectory)); }
