// Runs one body compiled for several instruction sets, chosen on first use. No dependency on torch.
//
// The bodies are plain loops that the compiler vectorises; their source does not depend on the instruction set.

#pragma once

#include <string>

#define PMPO_INLINE inline __attribute__((always_inline))

// Stands before a loop whose iterations are independent even where input and output are the same array.
#if defined(__clang__)
#define PMPO_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PMPO_INDEPENDENT _Pragma("GCC ivdep")
#endif

#if defined(__x86_64__) && defined(__gnu_linux__)
#define PMPO_X86_CLONES 1
#define PMPO_AVX2 "avx2,fma"
#if defined(__clang__)
#define PMPO_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#define PMPO_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
#endif
#endif

namespace pmpo {

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#ifdef PMPO_X86_CLONES
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Isa::avx512 : Isa::avx2;
#else
  return Isa::baseline;
#endif
}

// The instruction set in use: the best of this machine, unless a test limits it.
inline Isa& current_isa() {
  static Isa isa = best_isa();
  return isa;
}

inline std::string isa_name([[maybe_unused]] Isa isa) {
#ifdef PMPO_X86_CLONES
  return isa == Isa::avx512 ? "AVX-512" : isa == Isa::avx2 ? "AVX2" : "SSE2";
#else
  return "baseline";
#endif
}

// Arguments are passed by value, because what is captured by reference may alias, and is then not vectorised.
#ifdef PMPO_X86_CLONES
template <auto body, class... Args>
__attribute__((target(PMPO_AVX512), noinline)) void run_avx512(Args... args) {
  body(args...);
}
template <auto body, class... Args>
__attribute__((target(PMPO_AVX2), noinline)) void run_avx2(Args... args) {
  body(args...);
}
#endif

// Calls body(args...), an always-inlined function, as compiled for the current instruction set.
template <auto body, class... Args>
void run(Args... args) {
#ifdef PMPO_X86_CLONES
  if (current_isa() == Isa::avx512) return run_avx512<body>(args...);
  if (current_isa() == Isa::avx2) return run_avx2<body>(args...);
#endif
  body(args...);
}

}  // namespace pmpo
