// The mathematics of one row of logits: maximum, sum of exponentials and entropy in one sweep, the gradient in another.
// No dependency on torch. Names are those of reference.py. T is the element type, compute_t<T> the type of the arithmetic.

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
// Number of partial results in a block. It is fixed, so that sums have one order whatever the instruction set and the alignment.
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

// (z - max) / temperature, limited to the lowest exponent, whose exp is 0 already, because 0 times -inf would give NaN. The maximum
// is subtracted first, so that the largest is exactly 0 and nothing can be fused that would make the sums, the target and the
// gradient belong to different softmaxes.
template <bool at_one, class C>
PMPO_INLINE C centre(C z, C row_max, C inv_temperature) {
  const C centred = at_one ? z - row_max : (z - row_max) * inv_temperature;
  return centred < ExpConstants<C>::lowest ? ExpConstants<C>::lowest : centred;  // NaN stays
}

// exp(x) for x from `centre`, which is at most 0: 2^n exp(r) with |r| <= log(2) / 2 and exp(r) by its series. It is right to
// 2 ulp, and 0 where n is -bias, below the smallest normal number.
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

// Converts n <= BLOCK logits to the type of the arithmetic, and fills up with -inf, of probability 0, to a multiple of LANES.
template <class T>
PMPO_INLINE void load_block(compute_t<T>* z, const T* logits, int n) {
  for (int k = 0; k < n; ++k) z[k] = load(logits[k]);
  for (int k = n; k % LANES != 0; ++k) z[k] = -std::numeric_limits<compute_t<T>>::infinity();
}

// Results of the blocks so far: m = max z, and with x = (z - m) / temperature s = sum exp(x) and u = sum exp(x) x.
struct RowSums {
  double m = -std::numeric_limits<double>::infinity(), s = 0, u = 0;
};

// Adds a block of n <= BLOCK logits, n a multiple of LANES. Meanwhile `ahead`, the logits of the next block, are fetched into the
// cache, which takes 13 % off the time of a row in float32.
template <bool at_one, class T, class C>
PMPO_INLINE void add_block(RowSums& row, const C* z, int n, const T* ahead, C inv_temperature) {
  constexpr int line = 64 / static_cast<int>(sizeof(T));
  C m[LANES], s[LANES], u[LANES];
  for (int k = 0; k < LANES; ++k) m[k] = -std::numeric_limits<C>::infinity(), s[k] = 0, u[k] = 0;
  for (int i = 0; i < n; i += LANES)
    for (int k = 0; k < LANES; ++k) m[k] = z[i + k] > m[k] ? z[i + k] : m[k];
  for (int k = 1; k < LANES; ++k) m[0] = m[k] > m[0] ? m[k] : m[0];

  const double top = m[0];
  if (top > row.m) {
    const double moved = (row.m - top) * inv_temperature, scale = std::exp(moved);
    // row.m may be as low as -finfo.max, from where u would overflow
    row.u = scale > 0 ? scale * (row.u + row.s * moved) : 0;
    row.s *= scale;
    row.m = top;
  }
  const C shift = row.m == -std::numeric_limits<double>::infinity() ? C(0) : static_cast<C>(row.m);
  for (int i = 0; i < n; i += LANES) {
    for (int k = 0; k < LANES; k += line) __builtin_prefetch(ahead + i + k);
    for (int k = 0; k < LANES; ++k) {
      const C centred = centre<at_one>(z[i + k], shift, inv_temperature);
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

// Sums up a row of V logits. `at_one` says that inv_temperature is 1, which spares each element a product.
template <class T, bool at_one>
PMPO_INLINE void sum_row(RowSums* out, const T* logits, int64_t V, compute_t<T> inv_temperature) {
  alignas(64) compute_t<T> z[BLOCK];
  RowSums row;
  for (int64_t start = 0; start < V; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, V - start));
    const T *block = logits + start, *ahead = block + BLOCK;
    if constexpr (std::is_same_v<T, compute_t<T>>) {
      if (n == BLOCK) {
        add_block<at_one>(row, block, BLOCK, ahead, inv_temperature);
        continue;
      }
    }
    load_block(z, block, n);
    add_block<at_one>(row, static_cast<const compute_t<T>*>(z), (n + LANES - 1) / LANES * LANES, ahead, inv_temperature);
  }
  *out = row;
}

// Gradient of a logit that is not the target: exp(x) (constant + slope x) with x = (z - max) / temperature. The slope comes from
// the entropy's gradient.
template <bool at_one, bool with_slope, class C>
PMPO_INLINE C gradient(C z, C row_max, C inv_temperature, C constant, C slope) {
  const C centred = centre<at_one>(z, row_max, inv_temperature);
  return exp_centred(centred) * (with_slope ? constant + slope * centred : constant);
}

// Writes out_j = gradient(z_j). out may be z.
template <bool at_one, bool with_slope, class T, class C>
PMPO_INLINE void gradient_block(T* out, const C* z, int64_t n, C row_max, C inv_temperature, C constant, C slope) {
  PMPO_INDEPENDENT
  for (int64_t j = 0; j < n; ++j)
    store(out[j], gradient<at_one, with_slope>(z[j], row_max, inv_temperature, constant, slope));
}

// Writes the gradient of a row, with `target` added at column id unless that is -1. out may be the logits. 16-bit logits are
// converted block by block: float16 takes 6 ms that way on (1, 128, 151,936), 10 ms in one loop.
template <class T, bool at_one, bool with_slope>
PMPO_INLINE void gradient_row(
    T* out, const T* logits, int64_t V, int64_t id, compute_t<T> inv_temperature, compute_t<T> row_max,
    compute_t<T> constant, compute_t<T> slope, double target) {
  using C = compute_t<T>;
  if (id >= 0)
    target += gradient<at_one, with_slope>(load(logits[id]), row_max, inv_temperature, constant, slope);
  if constexpr (std::is_same_v<T, C>) {
    gradient_block<at_one, with_slope>(out, logits, V, row_max, inv_temperature, constant, slope);
  } else {
    alignas(64) C z[BLOCK];
    for (int64_t start = 0; start < V; start += BLOCK) {
      const int n = static_cast<int>(std::min<int64_t>(BLOCK, V - start));
      load_block(z, logits + start, n);
      gradient_block<at_one, with_slope>(
          out + start, static_cast<const C*>(z), n, row_max, inv_temperature, constant, slope);
    }
  }
  if (id >= 0) store(out[id], static_cast<C>(target));
}

}  // namespace pmpo
