// Vectors of floats, and loops compiled for several instruction sets of which the best one that this
// processor has is taken.
//
// A loop is a struct with `template <int LANES> static void run(...)`; `for_best_isa<Loop>(...)` calls the
// instance of 16 lanes (AVX-512), 8 lanes (AVX2 with FMA) or 8 lanes in whatever the compiler makes of them.
// Everything that `run` calls must be VFMVAE_INLINE, or it is compiled for the oldest processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "spans.h"

#define VFMVAE_INLINE inline __attribute__((always_inline))
#define VFMVAE_INLINE_BODY __attribute__((always_inline))  // of a lambda, behind its parameters

namespace vfmvae {

template <int LANES>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
};
template <int LANES>
using Floats = typename Vector<LANES>::Floats;

// LANES numbers from memory, which need not be aligned.
template <int LANES>
VFMVAE_INLINE void load(const float* source, Floats<LANES>* result) {
  std::memcpy(result, source, sizeof(*result));
}
template <int LANES>
VFMVAE_INLINE void load(const BFloat16* source, Floats<LANES>* result) {
  typename Vector<LANES>::Halves halves;
  std::memcpy(&halves, source, sizeof(halves));
  const auto words = __builtin_convertvector(halves, typename Vector<LANES>::Words) << 16;
  std::memcpy(result, &words, sizeof(words));
}

template <int LANES>
VFMVAE_INLINE void store(const Floats<LANES>& value, float* target) {
  std::memcpy(target, &value, sizeof(value));
}
// To nearest, ties to even; NaN stays NaN.
template <int LANES>
VFMVAE_INLINE void store(const Floats<LANES>& value, BFloat16* target) {
  typename Vector<LANES>::Words bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const auto rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet_nan = (bits >> 16) | 0x40u;
  const auto result = (bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded;
  const auto halves = __builtin_convertvector(result, typename Vector<LANES>::Halves);
  std::memcpy(target, &halves, sizeof(halves));
}

// The first `count` of LANES numbers; the others are zero, or stay as they are.
template <int LANES, typename T>
VFMVAE_INLINE void load_some(const T* source, int64_t count, Floats<LANES>* result) {
  T padded[LANES] = {};
  std::memcpy(padded, source, count * sizeof(T));
  load<LANES>(padded, result);
}
template <int LANES, typename T>
VFMVAE_INLINE void store_some(const Floats<LANES>& value, int64_t count, T* target) {
  T padded[LANES];
  store<LANES>(value, padded);
  std::memcpy(target, padded, count * sizeof(T));
}

// exp(-y) for y >= 0, to about one unit in the last place; 0 from 87 on, NaN for NaN.
template <int LANES>
VFMVAE_INLINE void exp_of_minus(const Floats<LANES>& y, Floats<LANES>* result) {
  typedef Floats<LANES> F;
  typedef typename Vector<LANES>::Words W;
  const F zero = {};
  const F x = y > 87.0f ? zero - 87.0f : -y;
  // x = n log 2 + r. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const F shifted = x * 1.44269504088896341f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  F e = zero + 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  W bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000u + 127u) << 23;
  F power;
  std::memcpy(&power, &bits, sizeof(power));
  *result = y > 87.0f ? zero : e * power;
}

// The standard normal distribution at h: the share below it, and the density.
//
// Above 0 the share beyond h is exp(-h^2 / 2) times a smooth function of t = 1 / (1 + 0.3 h), here a polynomial
// whose relative error is below 6e-8 (fitted to erfcx in float64).
template <int LANES>
VFMVAE_INLINE void normal_distribution(const Floats<LANES>& h, Floats<LANES>* below,
                                       Floats<LANES>* density) {
  typedef Floats<LANES> F;
  const F zero = {};
  const F size = h < 0.0f ? -h : h;
  F falloff;
  exp_of_minus<LANES>(0.5f * h * h, &falloff);
  const F t = 1.0f / (1.0f + 0.3f * size);
  F p = zero + 3.82979788e-02f;
  p = p * t - 1.68775494e-01f;
  p = p * t + 2.27852403e-01f;
  p = p * t - 7.55815525e-02f;
  p = p * t + 1.41895620e-01f;
  p = p * t + 9.49566677e-02f;
  p = p * t + 1.21850275e-01f;
  p = p * t + 1.19497542e-01f;
  p = p * t + 6.58839394e-06f;
  const F beyond = falloff * p;
  *below = h < 0.0f ? beyond : 1.0f - beyond;
  *density = falloff * 0.398942280401432678f;
}

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Isa best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512vl")
                              ? Isa::kAvx512
                          : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::kAvx2
                                                                                            : Isa::kBaseline;
  return best;
#else
  return Isa::kBaseline;
#endif
}

#if defined(__x86_64__) && defined(__GNUC__)
#define VFMVAE_TARGET(features) __attribute__((target(features), noinline))
#else
#define VFMVAE_TARGET(features)
#endif

template <typename Loop, typename... Arguments>
VFMVAE_TARGET("avx512f,avx512bw,avx512vl,avx2,fma")
void run_avx512(const Arguments&... arguments) { Loop::template run<16>(arguments...); }
template <typename Loop, typename... Arguments>
VFMVAE_TARGET("avx2,fma")
void run_avx2(const Arguments&... arguments) { Loop::template run<8>(arguments...); }
template <typename Loop, typename... Arguments>
void run_baseline(const Arguments&... arguments) { Loop::template run<8>(arguments...); }

// Lanes of the instance that `for_best_isa` takes.
inline int best_lanes() { return best_isa() == Isa::kAvx512 ? 16 : 8; }

template <typename Loop, typename... Arguments>
void for_best_isa(const Arguments&... arguments) {
  switch (best_isa()) {
#if defined(__x86_64__) && defined(__GNUC__)
    case Isa::kAvx512:
      return run_avx512<Loop>(arguments...);
    case Isa::kAvx2:
      return run_avx2<Loop>(arguments...);
#endif
    default:
      return run_baseline<Loop>(arguments...);
  }
}

}  // namespace vfmvae
