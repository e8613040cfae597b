// What the operators share: checks of arguments, access to elements, loops over rows and trajectories on torch's threads.
// Only torch's stable ABI is used, so that one binary serves every torch from 2.10 on.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "element.h"

namespace pmpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws unless ok. Python sees std::invalid_argument as ValueError.
inline void expect(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

// Returns `value` with this dtype, contiguous. Its device and its number of elements are checked.
inline Tensor argument(const char* name, const Tensor& value, ScalarType dtype, int64_t numel) {
  expect(value.is_cpu(), std::string(name) + ": expected a tensor on cpu");
  expect(
      value.numel() == numel, std::string(name) + ": expected " + std::to_string(numel) + " elements, got " +
                                  std::to_string(value.numel()));
  return torch::stable::contiguous(value.scalar_type() == dtype ? value : torch::stable::to(value, dtype));
}

inline std::optional<Tensor> argument(
    const char* name, const std::optional<Tensor>& value, ScalarType dtype, int64_t numel) {
  return value ? std::optional<Tensor>(argument(name, *value, dtype, numel)) : std::nullopt;
}

// Pointer to the elements of a tensor that `argument` returned, nullptr for one that is not given.
template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T{}) with T the element type of the logits.
template <class F>
void for_element_type(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Float16{});
    default: throw std::invalid_argument("logits: expected dtype float16, bfloat16, float32, float64");
  }
}

// Sizes of logits (B, S, V) and token_ids (B, T), with S >= T.
struct Shape {
  int64_t B, T, S, V;
};

inline Shape check_shape(const Tensor& logits, const Tensor& token_ids) {
  expect(logits.is_cpu(), "logits: expected a tensor on cpu");
  expect(logits.dim() == 3 && token_ids.dim() == 2, "logits: expected shape (B, S, V) with token_ids (B, T)");
  const Shape shape{logits.size(0), token_ids.size(1), logits.size(1), logits.size(2)};
  expect(
      token_ids.size(0) == shape.B && shape.T <= shape.S && shape.V > 0,
      "logits: expected shape (B, S, V) with token_ids (B, T), T <= S, V > 0");
  expect(logits.stride(2) == 1 || shape.V == 1, "logits: expected stride 1 in the vocabulary dimension");
  return shape;
}

// Calls f(row) for each of `rows` rows of V elements, on torch's threads. Rows differ in cost (those without a gradient are not
// read), so a thread takes the next chunk when it is done. Chunks are large, because two threads that write to one fresh page
// of 2 MiB would both clear it. A row is computed by one thread, so that its bits do not depend on the number of threads.
template <class F>
void parallel_rows(int64_t rows, int64_t V, const F& f) {
  constexpr int64_t few = 16384;  // elements that are not worth a thread of their own
  constexpr int64_t chunks_a_thread = 8;
  const int64_t least = std::max<int64_t>(1, few / V), threads = torch::stable::get_num_threads();
  const int64_t chunk = std::max(least, rows / (threads * chunks_a_thread));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, rows, least, [&](int64_t, int64_t) {
    for (int64_t start = next.fetch_add(chunk); start < rows; start = next.fetch_add(chunk))
      for (int64_t row = start; row < std::min(rows, start + chunk); ++row) f(row);
  });
}

// Throws unless the offsets start at 0, never fall, and end at the number of tokens.
inline void check_offsets(const int64_t* offsets, int64_t B, int64_t tokens) {
  bool ok = B >= 0 && offsets[0] == 0 && offsets[B] == tokens;
  for (int64_t i = 0; ok && i < B; ++i) ok = offsets[i] <= offsets[i + 1];
  expect(ok, "cu_seqlens: expected non-decreasing offsets from 0 to the " + std::to_string(tokens) + " tokens");
}

// Calls f(i, start, stop) for the tokens of each trajectory, on torch's threads. A trajectory is computed by one thread. A token,
// with its exp and log, is taken to cost as much as 64 elements of a row.
template <class F>
void parallel_trajectories(const int64_t* offsets, int64_t B, const F& f) {
  const int64_t mean_tokens = offsets[B] / std::max<int64_t>(B, 1) + 1;
  parallel_rows(B, 64 * mean_tokens, [&](int64_t i) { f(i, offsets[i], offsets[i + 1]); });
}

}  // namespace pmpo
