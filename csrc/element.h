// Element types of the logits: converted to float or double, and back with one rounding to nearest even. No dependency on torch.

#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace pmpo {

template <class To, class From>
PMPO_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &x, sizeof(To));
  return out;
}

struct BFloat16 {
  uint16_t raw;
};
struct Float16 {
  uint16_t raw;
};

// Type of the arithmetic: double for double, float for float and the 16-bit types.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

PMPO_INLINE float load(float x) { return x; }
PMPO_INLINE double load(double x) { return x; }
PMPO_INLINE float load(BFloat16 x) { return bits<float>(static_cast<uint32_t>(x.raw) << 16); }
PMPO_INLINE float load(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.raw & 0x7fff) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and NaN have the largest exponent
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);  // exact for subnormals too
  const uint32_t sign = static_cast<uint32_t>(x.raw & 0x8000) << 16;
  return bits<float>(sign | (special ? magnitude | special : finite));
}

PMPO_INLINE void store(float& out, float x) { out = x; }
PMPO_INLINE void store(double& out, double x) { out = x; }
PMPO_INLINE void store(BFloat16& out, float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  out.raw = static_cast<uint16_t>(is_nan ? (u >> 16) | 0x40u : rounded);
}
PMPO_INLINE void store(Float16& out, float x) {
  const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffffu;
  // below 2^-14 the last place is 2^-24, that of a float in [0.5, 1)
  const uint32_t small = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - bits<uint32_t>(0.5f);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // from 65520 on infinite
  const uint32_t half = magnitude < 0x38800000u ? small : magnitude >= 0x477ff000u ? large : normal;
  out.raw = static_cast<uint16_t>(half | ((u >> 16) & 0x8000u));
}

}  // namespace pmpo
