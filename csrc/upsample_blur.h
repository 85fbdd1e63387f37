// The arithmetic that the CUDA and the CPU form of upsample_blur share: binomial taps, replicated borders,
// checks.
//
// The blur is separable, so everything is said in one dimension. With taps w[-R..R] and positions clamped to
// [0, n), output q is sum_t w[t] * x[clamp(q + t)]: position p enters it with the weight
//     c(q, p) = sum of w[t] over the t with clamp(q + t) = p.
// The forward map gathers sum_p c(q, p) x[p], the adjoint sum_q c(q, p) g[q]; both look at |q - p| <= R only.
#pragma once

#include <cstdint>
#include <string>

#include "checks.h"

#ifdef __CUDACC__
#define VFMVAE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VFMVAE_HOST_DEVICE inline
#endif

namespace vfmvae {

// Binomial tap t in [-R, R]: [1], [1 2 1]/4 or [1 4 6 4 1]/16.
template <int R>
VFMVAE_HOST_DEVICE constexpr float binomial_tap(int t) {
  static_assert(0 <= R && R <= 2, "kernel sizes 1, 3 and 5");
  const int distance = t < 0 ? -t : t;
  if (R == 0) return 1.0f;
  if (R == 1) return distance == 0 ? 0.5f : 0.25f;
  return distance == 0 ? 0.375f : (distance == 1 ? 0.25f : 0.0625f);
}

// Weight with which `source` enters `target` on a line of n positions; ADJOINT exchanges the two. Zero for a
// source outside of the line.
template <int R, bool ADJOINT>
VFMVAE_HOST_DEVICE float line_weight(int target, int source, int n) {
  if (source < 0 || source >= n) return 0.0f;
  const int q = ADJOINT ? source : target;
  const int p = ADJOINT ? target : source;
  float weight = 0.0f;
  for (int t = -R; t <= R; ++t) {
    const int clamped = q + t < 0 ? 0 : (q + t >= n ? n - 1 : q + t);
    if (clamped == p) weight += binomial_tap<R>(t);
  }
  return weight;
}

struct UpsampleBlurSize {
  int64_t batch;
  int height, width, channels;  // input pixels, output channels
};

inline UpsampleBlurSize check_upsample_blur(uintptr_t residual, int64_t batch, int64_t height, int64_t width,
                                            int64_t channels, int kernel_size, int upscale, bool adjoint) {
  check_at_least("batch", batch, 0);
  check_at_least("height", height, 1);
  check_at_least("width", width, 1);
  check_at_least("channels", channels, 1);
  check(kernel_size == 1 || kernel_size == 3 || kernel_size == 5,
        "kernel_size " + std::to_string(kernel_size) + " is not one of 1, 3, 5");
  check(upscale == 1 || upscale == 2, "upscale " + std::to_string(upscale) + " is not one of 1, 2");
  check(!(adjoint && residual), "the adjoint of upsample_blur takes no residual");
  const int64_t largest = int64_t{1} << 28;
  check(height < largest && width < largest && channels < largest / 4 && width * channels < largest,
        "an image row of " + std::to_string(width) + " pixels with " + std::to_string(channels) +
            " channels is longer than 2^28 elements");
  return {batch, static_cast<int>(height), static_cast<int>(width), static_cast<int>(channels)};
}

}  // namespace vfmvae
