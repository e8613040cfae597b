// The mathematics of one row of logits: maximum, sum of exponentials and entropy in one sweep; gradient in another.
// No dependency on torch. Names as in reference.py; T is the element type, compute_t<T> the type of the arithmetic.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "element.h"

namespace pmpo {

// A row is taken in blocks that stay in the first-level cache between the maximum and the sums.
constexpr int BLOCK = 2048;
// Partial results a block: fixed, so that sums have one order whatever the instruction set and the alignment.
constexpr int LANES = 32;

template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bias = 127, terms = 7;
  static constexpr float lowest = -88.02969f;           // -127 log 2: the scale 2^-127 is then 0
  static constexpr float rounder = 0x1.8p23f;           // x + rounder has the nearest integer in its last bits
  static constexpr float log2e = 0x1.715476p0f, ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
};
template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, bias = 1023, terms = 13;
  static constexpr double lowest = -709.0895657128241;  // -1023 log 2
  static constexpr double rounder = 0x1.8p52;
  static constexpr double log2e = 0x1.71547652b82fep0, ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
};

// 1 / k! for k = 0 .. terms.
template <class C>
struct ExpSeries {
  C coefficient[ExpConstants<C>::terms + 1] = {};
  constexpr ExpSeries() {
    double factorial = 1;
    for (int k = 0; k <= ExpConstants<C>::terms; ++k) {
      factorial *= k > 0 ? k : 1;
      coefficient[k] = static_cast<C>(1 / factorial);
    }
  }
};

// x - max of x = logits / temperature, not below the lowest exponent: exp of it is then 0, and 0 * (x - max) too.
template <class C>
PMPO_INLINE C centre(C logit, C inv_temperature, C row_max) {
  const C x = logit * inv_temperature - row_max;
  return x < ExpConstants<C>::lowest ? ExpConstants<C>::lowest : x;  // NaN stays
}

// exp(x) for x from `centre`, at most 0 up to rounding: 2^n exp(r) with |r| <= log(2) / 2 and exp(r) by its series.
// Right to 2 ulp; 0 at the lowest exponent.
template <class C>
PMPO_INLINE C exp_centred(C x) {
  using K = ExpConstants<C>;
  using Bits = typename K::Bits;
  const C shifted = x * K::log2e + K::rounder;
  const C n = shifted - K::rounder;
  const C r = (x - n * K::ln2_high) - n * K::ln2_low;
  constexpr ExpSeries<C> exp_series;
  C series = exp_series.coefficient[K::terms];
  for (int k = K::terms - 1; k >= 0; --k) series = series * r + exp_series.coefficient[k];
  return series * bits<C>((bits<Bits>(shifted) + Bits{K::bias}) << K::mantissa);
}

// Running m = max x, s = sum exp(x - m), u = sum exp(x - m) (x - m) of a row; x = logits / temperature.
struct RowSums {
  double m = -std::numeric_limits<double>::infinity(), s = 0, u = 0;
};

// One block of n <= BLOCK elements, n a multiple of LANES. `ahead`: x are the logits themselves, and the next block is
// fetched into the cache meanwhile (13 % less time a row in float32).
template <bool ahead, class C>
PMPO_INLINE void add_block(RowSums& row, const C* x, int n, C inv_temperature) {
  C m[LANES], s[LANES], u[LANES];
  for (int k = 0; k < LANES; ++k) m[k] = -std::numeric_limits<C>::infinity(), s[k] = 0, u[k] = 0;
  for (int i = 0; i < n; i += LANES)
    for (int k = 0; k < LANES; ++k) m[k] = x[i + k] > m[k] ? x[i + k] : m[k];
  for (int k = 1; k < LANES; ++k) m[0] = m[k] > m[0] ? m[k] : m[0];

  const double top = m[0] * inv_temperature;
  if (top > row.m) {
    const double moved = row.m - top, scale = std::exp(moved);
    // from far below, down to -finfo.max: u would overflow
    row.u = scale > 0 ? scale * (row.u + row.s * moved) : 0;
    row.s *= scale;
    row.m = top;
  }
  const C shift = row.m == -std::numeric_limits<double>::infinity() ? C(0) : static_cast<C>(row.m);
  for (int i = 0; i < n; i += LANES) {
    if (ahead)
      for (int k = 0; k < LANES; k += 64 / static_cast<int>(sizeof(C))) __builtin_prefetch(x + i + BLOCK + k);
    for (int k = 0; k < LANES; ++k) {
      const C centred = centre(x[i + k], inv_temperature, shift);
      const C e = exp_centred(centred);
      s[k] += e;
      u[k] += e * centred;
    }
  }
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) s[k] += s[k + half], u[k] += u[k + half];
  row.s += s[0];
  row.u += u[0];
}

// A block as the type of the arithmetic; what is missing to a multiple of LANES has probability 0.
template <class T>
PMPO_INLINE void load_block(compute_t<T>* out, const T* x, int n) {
  for (int k = 0; k < n; ++k) out[k] = load(x[k]);
  for (int k = n; k % LANES != 0; ++k) out[k] = -std::numeric_limits<compute_t<T>>::infinity();
}

template <class T>
PMPO_INLINE void sum_row(RowSums* out, const T* x, int64_t V, compute_t<T> inv_temperature) {
  alignas(64) compute_t<T> block[BLOCK];
  RowSums row;
  for (int64_t start = 0; start < V; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, V - start));
    if constexpr (std::is_same_v<T, compute_t<T>>) {
      if (n == BLOCK) {
        add_block<true>(row, x + start, BLOCK, inv_temperature);
        continue;
      }
    }
    load_block(block, x + start, n);
    add_block<false>(row, static_cast<const compute_t<T>*>(block), (n + LANES - 1) / LANES * LANES, inv_temperature);
  }
  *out = row;
}

// out_j = exp(x_j - m) (a + b (x_j - m)), x = logits / temperature; out may be the logits.
template <class T, bool with_entropy>
PMPO_INLINE void gradient_row(
    T* out, const T* logits, int64_t V, compute_t<T> inv_temperature, compute_t<T> row_max, compute_t<T> a,
    compute_t<T> b) {
  using C = compute_t<T>;
  PMPO_INDEPENDENT
  for (int64_t j = 0; j < V; ++j) {
    const C x = centre<C>(load(logits[j]), inv_temperature, row_max);
    store(out[j], exp_centred(x) * (with_entropy ? a + b * x : a));
  }
}

}  // namespace pmpo
