// Operator `solve_power`: p of each trajectory for a given effective sample size, on the host.

#include <cmath>
#include <tuple>
#include <vector>

#include "power_mean.h"
#include "tensors.h"

namespace pmpo {
namespace {

std::tuple<Tensor, Tensor, Tensor> solve_power(
    const Tensor& log_weights, const std::optional<Tensor>& mask, const Tensor& cu_seqlens, const Tensor& target_ess,
    double power_max) {
  const int64_t N = log_weights.numel(), B = cu_seqlens.numel() - 1;
  const Tensor l = argument("log_weights", log_weights, ScalarType::Double, N);
  const std::optional<Tensor> keep = argument("mask", mask, ScalarType::Bool, N);
  const Tensor offsets = argument("cu_seqlens", cu_seqlens, ScalarType::Long, B + 1);
  const Tensor target = argument("target_ess", target_ess, ScalarType::Double, B);
  check_offsets(data<int64_t>(offsets), B, N);

  const Tensor power = torch::stable::new_empty(target, target.sizes());
  const Tensor iterations = torch::stable::new_empty(target, target.sizes(), ScalarType::Long);
  const Tensor residual = torch::stable::new_empty(target, target.sizes());
  std::vector<double> alive_weights(static_cast<size_t>(N));
  parallel_trajectories(data<int64_t>(offsets), B, [&](int64_t i, int64_t start, int64_t stop) {
    double* alive = alive_weights.data() + start;
    int64_t tokens = 0, count = 0;
    for (int64_t t = start; t < stop; ++t) {
      if (keep && !data<bool>(keep)[t]) continue;
      ++tokens;
      if (data<double>(l)[t] != -INF) alive[count++] = data<double>(l)[t];
    }
    const LogWeights centred = centre(alive, count, tokens);
    const double deficit = std::log(std::max(centred.tokens, 1.0)) - std::log(data<double>(target)[i]);
    const Solution solved = newton(centred, deficit, 0, power_max);
    mutable_data<double>(power)[i] = solved.power;
    mutable_data<int64_t>(iterations)[i] = solved.iterations;
    mutable_data<double>(residual)[i] = moments(centred, solved.power).deficit - deficit;
  });
  return {power, iterations, residual};
}

}  // namespace
}  // namespace pmpo

STABLE_TORCH_LIBRARY_IMPL(pmpo_kernels, CPU, m) { m.impl("solve_power.cpp", TORCH_BOX(&pmpo::solve_power)); }
