// Stage `token_logp`: log-prob, logsumexp in two parts and entropy of each row, in one sweep over the logits.

#include <cmath>
#include <limits>
#include <tuple>

#include "row_math.h"
#include "tensors.h"

namespace pmpo {
namespace {

// Throws unless unmasked ids lie in [0, V). For the other implementations `checks.check_token_ids` says the same words.
void check_token_ids(const int64_t* token_ids, const bool* mask, const Shape& shape) {
  for (int64_t row = 0; row < shape.B * shape.T; ++row) {
    const int64_t id = token_ids[row];
    if ((mask && !mask[row]) || (id >= 0 && id < shape.V)) continue;
    throw std::invalid_argument(
        "token_ids: expected ids in [0, " + std::to_string(shape.V) + ") where mask is true, got " +
        std::to_string(id) + " at [" + std::to_string(row / shape.T) + ", " + std::to_string(row % shape.T) + "]");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logp(
    const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& mask, double temperature) {
  const Shape shape = check_shape(logits, token_ids);
  const int64_t rows = shape.B * shape.T;
  const Tensor ids = argument("token_ids", token_ids, ScalarType::Long, rows);
  const std::optional<Tensor> keep = argument("mask", mask, ScalarType::Bool, rows);
  check_token_ids(data<int64_t>(ids), data<bool>(keep), shape);

  const ScalarType dtype = compute_dtype(logits.scalar_type());
  Tensor out[4] = {
      torch::stable::new_empty(ids, ids.sizes(), dtype), torch::stable::new_empty(ids, ids.sizes(), dtype),
      torch::stable::new_empty(ids, ids.sizes(), dtype), torch::stable::new_empty(ids, ids.sizes(), dtype)};

  for_element_type(logits, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    const T* first = data<T>(logits);
    const int64_t stride_b = logits.stride(0), stride_t = logits.stride(1), V = shape.V;
    const C inv_temperature = static_cast<C>(1 / temperature);
    const int64_t* id = data<int64_t>(ids);
    const bool* is_kept = data<bool>(keep);
    C *logp = mutable_data<C>(out[0]), *row_max = mutable_data<C>(out[1]), *row_sum = mutable_data<C>(out[2]),
      *entropy = mutable_data<C>(out[3]);

    parallel_rows(rows, V, [&](int64_t row) {
      if (is_kept && !is_kept[row]) {
        logp[row] = row_max[row] = entropy[row] = 0;
        row_sum[row] = 1;
        return;
      }
      const T* x = first + row / shape.T * stride_b + row % shape.T * stride_t;
      RowSums sums;
      if (inv_temperature == 1)
        run<sum_row<T, true>>(&sums, x, V, inv_temperature);
      else
        run<sum_row<T, false>>(&sums, x, V, inv_temperature);
      const double log_sum = std::log(sums.s);
      logp[row] = static_cast<C>((load(x[id[row]]) - sums.m) * inv_temperature - log_sum);
      row_max[row] = static_cast<C>(sums.m);
      row_sum[row] = static_cast<C>(sums.s);
      entropy[row] = static_cast<C>(log_sum - sums.u / sums.s);
    });
  });
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace
}  // namespace pmpo

STABLE_TORCH_LIBRARY_IMPL(pmpo_kernels, CPU, m) { m.impl("token_logp.cpp", TORCH_BOX(&pmpo::token_logp)); }
