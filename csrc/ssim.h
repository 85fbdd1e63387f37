// The arithmetic that the CUDA and the CPU form of ssim share: the window, the index at a position with its
// slopes, checks.
//
// With weighted means over the window at p and the difference d = a - b, the index is S = L * T,
//     L = (2 mean_a mean_b + c1) / (mean_a^2 + mean_b^2 + c1) = 1 - mean_d^2 / (mean_a^2 + mean_b^2 + c1)
//     T = (2 covariance + c2) / (variance_a + variance_b + c2) = 1 - variance_d / (variance_a + variance_b +
//     c2)
// The right hand sides lose no digits where images are alike, and take four means instead of five. Variances
// are taken of a - shift_a and b - shift_b, with an average of some pixels nearby, or they would lose digits
// where images are flat.
//
// A pixel b[q] enters the mean at p with the tap g(p, q), variance_b with 2 g (b[q] - mean_b) and variance_d
// with -2 g (d[q] - mean_d). So its gradient is three sums over positions, and that of a likewise with -d:
//     sum g M + 2 b[q] sum g P - 2 d[q] sum g Q
// where P = dS / d (variance_a + variance_b), Q = dS / d variance_d and M = dS / d mean_b - 2 P mean_b +
// 2 Q mean_d.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "checks.h"

#ifdef __CUDACC__
#define VFMVAE_SSIM_INLINE __host__ __device__ __forceinline__
#else
#define VFMVAE_SSIM_INLINE inline __attribute__((always_inline))
#endif

namespace vfmvae {

constexpr int kSsimWindow = 11, kSsimHalo = kSsimWindow - 1;

// exp(-x^2 / (2 * 1.5^2)) at x = tap - 5, divided by the sum of all eleven.
VFMVAE_SSIM_INLINE constexpr float ssim_tap(int tap) {
  const int distance = tap < 5 ? 5 - tap : tap - 5;
  return distance == 0   ? 2.660117249e-01f
         : distance == 1 ? 2.130055377e-01f
         : distance == 2 ? 1.093606895e-01f
         : distance == 3 ? 3.600077213e-02f
         : distance == 4 ? 7.598758135e-03f
                         : 1.028380084e-03f;
}

// Weighted means of a, d, d^2 and a^2 + b^2: rows of what is blurred.
enum SsimMean { kMeanA, kMeanD, kMeanDD, kMeanSquares, kSsimMeans };

struct SsimConstants {
  float c1, c2;
};

// Pixels whose average is a shift: a power of two, so that the average of equal pixels is exact.
constexpr int kShiftPixels = 32;

// F is float or a vector of floats. The means are those of shifted images; shift_d = shift_a - shift_b.
template <typename F>
struct SsimPoint {
  F index, p, q, m_a, m_b;
  VFMVAE_SSIM_INLINE void compute(const F (&means)[kSsimMeans], float shift_a, float shift_d,
                                  const SsimConstants& constants) {
    const F near_a = means[kMeanA], near_d = means[kMeanD], near_b = near_a - near_d;
    const F scale = means[kMeanSquares] - near_a * near_a - near_b * near_b + constants.c2;
    const F loss = (means[kMeanDD] - near_d * near_d) / scale;
    const F a = near_a + shift_a, d = near_d + shift_d, b = a - d;
    const F light_scale = a * a + b * b + constants.c1;
    const F light_loss = d * d / light_scale;
    const F light = 1.0f - light_loss, structure = 1.0f - loss;
    index = light * structure;
    q = -light / scale;
    p = -q * loss;
    const F slope = 2.0f * structure / light_scale;
    m_a = slope * (light_loss * a - d) - 2.0f * (p * a + q * d);
    m_b = slope * (light_loss * b + d) - 2.0f * (p * b - q * d);
  }
};

struct SsimSize {
  int64_t batch;
  int channels, height, width;

  VFMVAE_SSIM_INLINE int valid_height() const { return height - kSsimHalo; }
  VFMVAE_SSIM_INLINE int valid_width() const { return width - kSsimHalo; }
  VFMVAE_SSIM_INLINE int64_t planes() const { return batch * channels; }
  // Of one map of all planes.
  VFMVAE_SSIM_INLINE int64_t map_elements() const { return planes() * valid_height() * valid_width(); }
  // Positions that a sample's index is the mean of.
  double positions() const { return static_cast<double>(channels) * valid_height() * valid_width(); }
};

// How many elements one step along [B, C, H, W] is.
using ImageStrides = std::array<int64_t, 4>;

inline SsimSize check_ssim(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  check_at_least("batch", batch, 0);
  check_at_least("channels", channels, 1);
  check_at_least("height", height, kSsimWindow);
  check_at_least("width", width, kSsimWindow);
  const int64_t largest = int64_t{1} << 28;
  check(channels < largest && height < largest && width < largest,
        "images of " + std::to_string(channels) + " x " + std::to_string(height) + " x " +
            std::to_string(width) + " are larger than 2^28 in one direction");
  return {batch, static_cast<int>(channels), static_cast<int>(height), static_cast<int>(width)};
}

inline SsimConstants ssim_constants(double data_range) {
  return {static_cast<float>(0.0001 * data_range * data_range),
          static_cast<float>(0.0009 * data_range * data_range)};
}

}  // namespace vfmvae
