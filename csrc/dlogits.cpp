// Stage `dlogits`: the gradient of the logits in one read and one write; rows without a gradient are written, not read.

#include <cmath>
#include <cstring>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "contract.h"
#include "row_math.h"
#include "tensors.h"

namespace pmpo {
namespace {

// Asks for large pages, of 2 MiB. Fresh memory comes in pages, and to get it in those of 4 KiB takes longer than to compute what is
// written there. Where the system has no large pages this changes nothing.
void prefer_large_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, worth_it = 8 << 20;
  if (bytes < static_cast<int64_t>(worth_it)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

void write_gradient(
    const Tensor& out, const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& mask,
    const Tensor& row_max, const Tensor& row_sum, const Tensor& entropy, const std::optional<Tensor>& dlogp,
    const std::optional<Tensor>& dentropy, double temperature) {
  const Shape shape = check_shape(logits, token_ids);
  const int64_t rows = shape.B * shape.T;
  const ScalarType dtype = compute_dtype(logits.scalar_type());
  const Tensor ids = argument("token_ids", token_ids, ScalarType::Long, rows);
  const std::optional<Tensor> keep = argument("mask", mask, ScalarType::Bool, rows);
  const Tensor max = argument("row_max", row_max, dtype, rows), sum = argument("row_sum", row_sum, dtype, rows);
  const Tensor H = argument("entropy", entropy, dtype, rows);
  const std::optional<Tensor> g_rows = argument("dlogp", dlogp, dtype, rows);
  const std::optional<Tensor> h_rows = argument("dentropy", dentropy, dtype, rows);

  for_element_type(logits, [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    const C inv_temperature = static_cast<C>(1 / temperature);
    const int64_t V = shape.V;
    const int64_t strides[4] = {logits.stride(0), logits.stride(1), out.stride(0), out.stride(1)};
    const T* first = data<T>(logits);
    T* first_out = mutable_data<T>(out);

    parallel_rows(shape.B * shape.S, V, [&](int64_t position) {
      const int64_t b = position / shape.S, t = position % shape.S, row = b * shape.T + t;
      T* y = first_out + b * strides[2] + t * strides[3];
      const bool used = t < shape.T && (!keep || data<bool>(keep)[row]);
      double g = used && g_rows ? data<C>(g_rows)[row] : 0, h = used && h_rows ? data<C>(h_rows)[row] : 0;
      if (g == 0 && h == 0) {
        std::memset(static_cast<void*>(y), 0, static_cast<size_t>(V) * sizeof(T));
        return;
      }
      const T* x = first + b * strides[0] + t * strides[1];
      int64_t id = data<int64_t>(ids)[row];
      if (id < 0 || id >= V) {
        if (id != ELSEWHERE) g = std::numeric_limits<double>::quiet_NaN();
        id = -1;
      }

      // -q (g + h (log q + H)) as exp(x) (constant + slope x), because q = exp(x) / sum and log q = x - log sum with
      // x = (z - max) / temperature
      const double scale = 1 / (data<C>(sum)[row] * temperature), log_sum = std::log(data<C>(sum)[row]);
      const C constant = static_cast<C>(-scale * (g + h * (data<C>(H)[row] - log_sum)));
      const C slope = static_cast<C>(-scale * h), shift = data<C>(max)[row];
      const auto write = [&](auto at_one, auto with_slope) {
        run<gradient_row<T, at_one, with_slope>>(
            y, x, V, id, inv_temperature, shift, constant, slope, g / temperature);
      };
      const auto at = [&](auto at_one) { h == 0 ? write(at_one, std::false_type{}) : write(at_one, std::true_type{}); };
      inv_temperature == 1 ? at(std::true_type{}) : at(std::false_type{});
    });
  });
}

Tensor dlogits(
    const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& mask, const Tensor& row_max,
    const Tensor& row_sum, const Tensor& entropy, const std::optional<Tensor>& dlogp,
    const std::optional<Tensor>& dentropy, double temperature) {
  Tensor out = torch::stable::empty_like(logits);
  // rows that overlap in memory can give another order of the dimensions; `ops.empty_gradient` does the same
  if (out.dim() == 3 && out.stride(2) != 1) out = torch::stable::new_empty(logits, logits.sizes());
  prefer_large_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  write_gradient(out, logits, token_ids, mask, row_max, row_sum, entropy, dlogp, dentropy, temperature);
  return out;
}

void dlogits_(
    const Tensor& logits, const Tensor& token_ids, const std::optional<Tensor>& mask, const Tensor& row_max,
    const Tensor& row_sum, const Tensor& entropy, const std::optional<Tensor>& dlogp,
    const std::optional<Tensor>& dentropy, double temperature) {
  write_gradient(logits, logits, token_ids, mask, row_max, row_sum, entropy, dlogp, dentropy, temperature);
}

}  // namespace
}  // namespace pmpo

STABLE_TORCH_LIBRARY_IMPL(pmpo_kernels, CPU, m) {
  m.impl("dlogits.cpp", TORCH_BOX(&pmpo::dlogits));
  m.impl("dlogits_.cpp", TORCH_BOX(&pmpo::dlogits_));
}
