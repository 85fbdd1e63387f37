// What the kernels of group_norm share: how a map is cut into tiles, and the activations.
//
// Maps are [batch, pixels, channels]. A tile is a range of pixels of one sample. A block takes a tile (and
// a part of it where channels are very many); its threads form `rows` x `columns`. A thread owns V
// neighbouring channels, which it reads at once, and every rows-th pixel, so that neighbouring threads read
// neighbouring memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

#include "checks.h"
#include "launch.cuh"
#include "vec.cuh"

namespace vfmvae {

constexpr int kGroupNormThreads = 256;
constexpr int kMostGridSamples = 1024;  // more are taken in turns; a grid may have 65535 rows

// Rows of the float32 table [batch, kTableRows, channels] that the forward leaves for the backward:
//     z = (x - mean) * scale + shift
// Mean is the nearest float to the group's mean; `rest` is what that leaves out, which matters where the mean
// is thousands of standard deviations. Style is part of scale and shift.
enum TableRow { kMean, kScale, kShift, kRstd, kRest, kTableRows };

// Rows of the float32 workspace [batch, kCoefficientRows, channels] of the backward:
//     gradient of x = scale * gradient of z + slope * (x - mean) + offset
// and what this sample adds to the gradients of bias and weight.
enum CoefficientRow { kSlope, kOffset, kGradBias, kGradWeight, kCoefficientRows };

struct GroupNormTiling {
  int64_t batch, pixels;
  int channels;
  int tile_pixels, tiles;  // of a sample
  int columns, rows;       // of threads in a block
  int channel_blocks;

  __device__ __forceinline__ int count(int tile) const {
    const int64_t left = pixels - int64_t{tile} * tile_pixels;
    return left < tile_pixels ? static_cast<int>(left) : tile_pixels;
  }
  __device__ __forceinline__ int64_t offset(int64_t image, int tile) const {
    return (image * pixels + int64_t{tile} * tile_pixels) * channels;
  }
};

// Pixels of a tile. Depends on sizes alone, so that results are the same on every device: about 16 tiles
// for each of the 132 multiprocessors of an H100, but not so small that a thread has nothing to loop over.
inline int64_t group_norm_tile_pixels(int64_t batch, int64_t pixels, int64_t channels) {
  const int64_t wanted = std::max<int64_t>(1, 2112 / std::max<int64_t>(1, batch));
  const int64_t step = 4 * std::max<int64_t>(1, 2048 / channels);  // a multiple of four pixels per row
  const int64_t share = (pixels + wanted - 1) / wanted;
  return std::max<int64_t>(1, std::min(pixels, (share + step - 1) / step * step));
}

inline GroupNormTiling group_norm_tiling(int64_t batch, int64_t pixels, int64_t channels, int vector) {
  check_at_least("batch", batch, 0);
  check_at_least("pixels", pixels, 1);
  check_at_least("channels", channels, 1);
  check(channels <= int64_t{1} << 20,
        "channels is " + std::to_string(channels) + ", but must be at most 2^20");
  const int64_t tile = group_norm_tile_pixels(batch, pixels, channels);
  check(tile < int64_t{1} << 30, "a map of " + std::to_string(pixels) + " pixels is too large");
  const int64_t chunks = channels / vector;
  const int columns = static_cast<int>(std::min<int64_t>(chunks, kGroupNormThreads));
  return {batch,
          pixels,
          static_cast<int>(channels),
          static_cast<int>(tile),
          static_cast<int>((pixels + tile - 1) / tile),
          columns,
          static_cast<int>(std::min<int64_t>(kGroupNormThreads / columns, tile)),
          static_cast<int>((chunks + columns - 1) / columns)};
}

inline dim3 group_norm_grid(const GroupNormTiling& tiling) {
  return dim3(static_cast<unsigned>(tiling.tiles),
              static_cast<unsigned>(std::min<int64_t>(tiling.batch, kMostGridSamples)),
              static_cast<unsigned>(tiling.channel_blocks));
}

inline dim3 group_norm_block(const GroupNormTiling& tiling) {
  return dim3(static_cast<unsigned>(tiling.columns * tiling.rows));
}

inline int64_t group_size(int64_t channels, int64_t groups) {
  check(groups >= 1 && channels % groups == 0,
        std::to_string(channels) + " channels cannot be divided into " + std::to_string(groups) + " groups");
  return channels / groups;
}

enum Activation { kNone, kLeakyRelu, kGelu, kSilu };
constexpr float kLeakySlope = 0.2f;

inline Activation parse_activation(const std::string& name) {
  if (name == "none") return kNone;
  if (name == "leaky_relu") return kLeakyRelu;
  if (name == "gelu") return kGelu;
  if (name == "silu") return kSilu;
  throw std::invalid_argument("activation " + name + " is not one of none, leaky_relu, gelu, silu");
}

template <int ACTIVATION>
__device__ __forceinline__ float activate(float z) {
  if (ACTIVATION == kLeakyRelu) return z > 0.0f ? z : kLeakySlope * z;
  if (ACTIVATION == kGelu) return 0.5f * z * (1.0f + erff(z * 0.70710678f));
  if (ACTIVATION == kSilu) return z / (1.0f + expf(-z));
  return z;
}

template <int ACTIVATION>
__device__ __forceinline__ float activation_slope(float z) {
  if (ACTIVATION == kLeakyRelu) return z > 0.0f ? 1.0f : kLeakySlope;
  if (ACTIVATION == kGelu) {
    return 0.5f * (1.0f + erff(z * 0.70710678f)) + z * 0.39894228f * expf(-0.5f * z * z);
  }
  if (ACTIVATION == kSilu) {
    const float sigmoid = 1.0f / (1.0f + expf(-z));
    return sigmoid * (1.0f + z * (1.0f - sigmoid));
  }
  return 1.0f;
}

// The V channels of a thread, as they lie in memory.
template <typename T, int V>
__device__ __forceinline__ Vec<T, V> load_vector(const T* source) {
  return *reinterpret_cast<const Vec<T, V>*>(source);
}

// The sum over a block of at most kGroupNormThreads threads, each of which gets it.
__device__ __forceinline__ double block_sum(double value, double (&shared)[kGroupNormThreads]) {
  shared[threadIdx.x] = value;
  for (unsigned half = kGroupNormThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    const unsigned other = threadIdx.x + half;
    if (threadIdx.x < half && other < blockDim.x) shared[threadIdx.x] += shared[other];
  }
  __syncthreads();
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

// Calls run(T{}, V) with the constant as a type: 16-byte vectors where all addresses and the
// number of channels allow them, else one channel at a time.
template <typename Run>
void for_vector_and_type(DType type, bool aligned, int64_t channels, const Run& run) {
  const auto choose = [&](auto element) {
    constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(element));
    if (aligned && channels % kVector == 0) {
      run(element, std::integral_constant<int, kVector>{});
    } else {
      run(element, std::integral_constant<int, 1>{});
    }
  };
  if (type == DType::kFloat32) choose(float{});
  if (type == DType::kFloat16) choose(__half{});
  if (type == DType::kBFloat16) choose(__nv_bfloat16{});
}

template <typename Run>
void for_activation(Activation activation, const Run& run) {
  if (activation == kNone) run(std::integral_constant<int, kNone>{});
  if (activation == kLeakyRelu) run(std::integral_constant<int, kLeakyRelu>{});
  if (activation == kGelu) run(std::integral_constant<int, kGelu>{});
  if (activation == kSilu) run(std::integral_constant<int, kSilu>{});
}

}  // namespace vfmvae
