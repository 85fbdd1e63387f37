// Loops over long spans of floats. Each is compiled for several instruction sets where the compiler can do
// that, and the right one is chosen when the library is loaded.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define VFMVAE_EVERY_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VFMVAE_EVERY_ISA
#endif

namespace vfmvae {

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// To nearest, ties to even; NaN stays NaN.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
}

VFMVAE_EVERY_ISA static void widen(const BFloat16* source, float* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = to_float(source[i]);
}

VFMVAE_EVERY_ISA static void narrow(const float* source, BFloat16* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = to_bfloat16(source[i]);
}

VFMVAE_EVERY_ISA static void add_to(float* __restrict target, const float* __restrict source, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] += source[i];
}

// Quads (a, b, c, d) to four spans of n floats, and back.
VFMVAE_EVERY_ISA static void split_quads(const float* __restrict quads, float* __restrict a,
                                         float* __restrict b, float* __restrict c, float* __restrict d,
                                         int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    a[i] = quads[4 * i];
    b[i] = quads[4 * i + 1];
    c[i] = quads[4 * i + 2];
    d[i] = quads[4 * i + 3];
  }
}

VFMVAE_EVERY_ISA static void join_quads(const float* __restrict a, const float* __restrict b,
                                        const float* __restrict c, const float* __restrict d,
                                        float* __restrict quads, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    quads[4 * i] = a[i];
    quads[4 * i + 1] = b[i];
    quads[4 * i + 2] = c[i];
    quads[4 * i + 3] = d[i];
  }
}

constexpr int kMostTaps = 5;

// target = sum of weights[t] * sources[t] over 1 to 5 taps.
VFMVAE_EVERY_ISA static void weighted_sum(float* __restrict target, const float* const* sources,
                                          const float* weights, int taps, int64_t n) {
  const float *s0 = sources[0], *s1 = sources[taps > 1 ? 1 : 0], *s2 = sources[taps > 2 ? 2 : 0];
  const float *s3 = sources[taps > 3 ? 3 : 0], *s4 = sources[taps > 4 ? 4 : 0];
  const float w0 = weights[0], w1 = weights[taps > 1 ? 1 : 0], w2 = weights[taps > 2 ? 2 : 0];
  const float w3 = weights[taps > 3 ? 3 : 0], w4 = weights[taps > 4 ? 4 : 0];
  switch (taps) {
    case 1:
      for (int64_t i = 0; i < n; ++i) target[i] = w0 * s0[i];
      break;
    case 2:
      for (int64_t i = 0; i < n; ++i) target[i] = w0 * s0[i] + w1 * s1[i];
      break;
    case 3:
      for (int64_t i = 0; i < n; ++i) target[i] = w0 * s0[i] + w1 * s1[i] + w2 * s2[i];
      break;
    case 4:
      for (int64_t i = 0; i < n; ++i) target[i] = w0 * s0[i] + w1 * s1[i] + w2 * s2[i] + w3 * s3[i];
      break;
    default:
      for (int64_t i = 0; i < n; ++i)
        target[i] = w0 * s0[i] + w1 * s1[i] + w2 * s2[i] + w3 * s3[i] + w4 * s4[i];
  }
}

}  // namespace vfmvae
