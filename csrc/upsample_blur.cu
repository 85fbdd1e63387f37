// upsample_blur on CUDA: pixel-shuffle, blur and residual in one pass; forward and adjoint are the same
// kernel.
//
// A thread owns one input pixel column (UP output columns) and V output channels, and walks down a strip of
// rows. Per input row it reads the pixels left and right of it, blurs them horizontally into the newest block
// of a ring of rows held in registers, and blurs the ring vertically into UP finished output rows.
// Neighbouring threads own neighbouring channels, so that all accesses of a warp are contiguous. No atomics:
// the result is deterministic.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "ops.h"
#include "upsample_blur.h"
#include "vec.cuh"

namespace vfmvae {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxGridAxis = 65535;

// A block of UP x UP output pixels with V channels each: what one pixel of the shuffled image holds.
template <int UP, int V>
using Block = float[UP][UP][V];

// SHUFFLED: one pixel of [B, H, W, C*UP*UP], channel c*UP*UP + row*UP + column. Otherwise a UP x UP window of
// [B, H*UP, W*UP, C].
template <bool SHUFFLED, int UP>
__device__ __forceinline__ int64_t block_offset(const UpsampleBlurSize& size, int64_t image, int row,
                                                int column, int channel) {
  if (SHUFFLED) {
    return (((image * size.height + row) * size.width + column) * size.channels + channel) * (UP * UP);
  }
  return ((image * size.height * UP + row * UP) * (size.width * int64_t{UP}) + column * UP) * size.channels +
         channel;
}

template <bool SHUFFLED, int UP, int V, typename T>
__device__ __forceinline__ void load_block(const T* source, int64_t row_stride, int channels,
                                           Block<UP, V>& block) {
  if constexpr (SHUFFLED) {
    float run[V * UP * UP];
    load_run<(V > 1)>(source, run);
#pragma unroll
    for (int r = 0; r < UP; ++r)
#pragma unroll
      for (int c = 0; c < UP; ++c)
#pragma unroll
        for (int v = 0; v < V; ++v) block[r][c][v] = run[(v * UP + r) * UP + c];
  } else {
#pragma unroll
    for (int r = 0; r < UP; ++r)
#pragma unroll
      for (int c = 0; c < UP; ++c) load_run<(V > 1)>(source + r * row_stride + c * channels, block[r][c]);
  }
}

template <bool SHUFFLED, int UP, int V, typename T>
__device__ __forceinline__ void store_block(T* target, int64_t row_stride, int channels,
                                            const Block<UP, V>& block) {
  if constexpr (SHUFFLED) {
    float run[V * UP * UP];
#pragma unroll
    for (int r = 0; r < UP; ++r)
#pragma unroll
      for (int c = 0; c < UP; ++c)
#pragma unroll
        for (int v = 0; v < V; ++v) run[(v * UP + r) * UP + c] = block[r][c][v];
    store_run<(V > 1)>(target, run);
  } else {
#pragma unroll
    for (int r = 0; r < UP; ++r)
#pragma unroll
      for (int c = 0; c < UP; ++c) store_run<(V > 1)>(target + r * row_stride + c * channels, block[r][c]);
  }
}

template <typename T, int R, int UP, int V, bool ADJOINT>
__global__ void __launch_bounds__(kThreads, 4)
    upsample_blur_kernel(const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ out,
                         UpsampleBlurSize size, int strip_rows) {
  constexpr int kHalo = (R + UP - 1) / UP;  // neighbouring pixels that a blur of radius R reaches
  constexpr int kRing = 2 * kHalo + 1;
  constexpr bool kSourceShuffled = !ADJOINT, kTargetShuffled = ADJOINT;

  const int chunks = (size.channels + V - 1) / V;
  const int lane = blockIdx.x * kThreads + threadIdx.x;
  const int column = lane / chunks;
  const int channel = (lane - column * chunks) * V;
  if (column >= size.width) return;
  const int strips = (size.height + strip_rows - 1) / strip_rows;
  const int64_t row_stride = int64_t{size.width} * UP * size.channels;  // of the image that is not shuffled

  // Horizontal weights of this column; [a][d] belongs to output column a and source column d - kHalo*UP.
  float across[UP][kRing * UP];
#pragma unroll
  for (int a = 0; a < UP; ++a)
#pragma unroll
    for (int d = 0; d < kRing * UP; ++d) {
      const int target = column * UP + a, source = (column - kHalo) * UP + d;
      across[a][d] = line_weight<R, ADJOINT>(target, source, size.width * UP);
    }

  for (int64_t image = blockIdx.z; image < size.batch; image += gridDim.z) {
    for (int strip = blockIdx.y; strip < strips; strip += gridDim.y) {
      const int first = strip * strip_rows;
      const int end = min(first + strip_rows, size.height);
      Block<UP, V> ring[kRing] = {};

      for (int row = first - kHalo; row < end + kHalo; ++row) {
#pragma unroll
        for (int k = 0; k + 1 < kRing; ++k)
#pragma unroll
          for (int r = 0; r < UP; ++r)
#pragma unroll
            for (int c = 0; c < UP; ++c)
#pragma unroll
              for (int v = 0; v < V; ++v) ring[k][r][c][v] = ring[k + 1][r][c][v];

        Block<UP, V>& newest = ring[kRing - 1];
#pragma unroll
        for (int r = 0; r < UP; ++r)
#pragma unroll
          for (int a = 0; a < UP; ++a)
#pragma unroll
            for (int v = 0; v < V; ++v) newest[r][a][v] = 0.0f;
        if (0 <= row && row < size.height) {
#pragma unroll
          for (int k = 0; k < kRing; ++k) {
            const int neighbour = column + k - kHalo;
            if (neighbour < 0 || neighbour >= size.width) continue;
            Block<UP, V> pixel;
            const int64_t offset = block_offset<kSourceShuffled, UP>(size, image, row, neighbour, channel);
            load_block<kSourceShuffled, UP, V>(x + offset, row_stride, size.channels, pixel);
#pragma unroll
            for (int r = 0; r < UP; ++r)
#pragma unroll
              for (int c = 0; c < UP; ++c)
#pragma unroll
                for (int a = 0; a < UP; ++a) {
                  const int distance = (k - kHalo) * UP + c - a;
                  if (distance < -R || distance > R) continue;
#pragma unroll
                  for (int v = 0; v < V; ++v) newest[r][a][v] += across[a][k * UP + c] * pixel[r][c][v];
                }
          }
        }

        const int middle = row - kHalo;  // the row whose whole neighbourhood the ring now holds
        if (middle < first) continue;
        Block<UP, V> sum = {};
#pragma unroll
        for (int a = 0; a < UP; ++a) {
          const int target = middle * UP + a;
          const bool interior = target >= R && target + R < size.height * UP;
#pragma unroll
          for (int d = 0; d < kRing * UP; ++d) {
            const int distance = d - kHalo * UP - a;
            if (distance < -R || distance > R) continue;
            const float weight = interior
                                     ? binomial_tap<R>(distance)
                                     : line_weight<R, ADJOINT>(target, target + distance, size.height * UP);
#pragma unroll
            for (int c = 0; c < UP; ++c)
#pragma unroll
              for (int v = 0; v < V; ++v) sum[a][c][v] += weight * ring[d / UP][d % UP][c][v];
          }
        }

        const int64_t offset = block_offset<kTargetShuffled, UP>(size, image, middle, column, channel);
        if (!ADJOINT && residual != nullptr) {
          Block<UP, V> added;
          load_block<false, UP, V>(residual + offset, row_stride, size.channels, added);
#pragma unroll
          for (int r = 0; r < UP; ++r)
#pragma unroll
            for (int c = 0; c < UP; ++c)
#pragma unroll
              for (int v = 0; v < V; ++v) sum[r][c][v] += added[r][c][v];
        }
        store_block<kTargetShuffled, UP, V>(out + offset, row_stride, size.channels, sum);
      }
    }
  }
}

template <typename T, int R, int UP, int V, bool ADJOINT>
void launch_kernel(const void* x, const void* residual, void* out, const UpsampleBlurSize& size,
                   uintptr_t stream) {
  const int64_t lanes = int64_t{size.width} * ((size.channels + V - 1) / V);
  const int64_t columns = (lanes + kThreads - 1) / kThreads;
  // Long strips read fewer border rows twice, short ones give a small image more threads: enough for every
  // multiprocessor of the largest GPUs (about 150, 1024 threads each) first.
  const int64_t wanted_threads = 150 * 1024;
  const int64_t wanted_strips = (wanted_threads + lanes * size.batch - 1) / (lanes * size.batch);
  const int strip_rows =
      std::max<int>(1, std::min<int64_t>(32, size.height / std::max<int64_t>(1, wanted_strips)));
  const int64_t strips = (size.height + strip_rows - 1) / strip_rows;
  const dim3 grid(static_cast<unsigned>(columns),
                  static_cast<unsigned>(std::min<int64_t>(strips, kMaxGridAxis)),
                  static_cast<unsigned>(std::min<int64_t>(size.batch, kMaxGridAxis)));
  launch(upsample_blur_kernel<T, R, UP, V, ADJOINT>, grid, dim3(kThreads), stream, static_cast<const T*>(x),
         static_cast<const T*>(residual), static_cast<T*>(out), size, strip_rows);
}

template <typename T, int R, int UP, int V>
void choose_direction(const void* x, const void* residual, void* out, const UpsampleBlurSize& size,
                      bool adjoint, uintptr_t stream) {
  if (adjoint) {
    launch_kernel<T, R, UP, V, true>(x, residual, out, size, stream);
  } else {
    launch_kernel<T, R, UP, V, false>(x, residual, out, size, stream);
  }
}

template <typename T, int R, int UP>
void choose_vector(const void* x, const void* residual, void* out, const UpsampleBlurSize& size, bool adjoint,
                   bool aligned, uintptr_t stream) {
  // With pixel-shuffle four channels are 16 elements of the shuffled image; without, 16 bytes of either.
  constexpr int kVector = UP == 2 ? 4 : kVectorBytes / static_cast<int>(sizeof(T));
  if (aligned && size.channels % kVector == 0) {
    choose_direction<T, R, UP, kVector>(x, residual, out, size, adjoint, stream);
  } else {
    choose_direction<T, R, UP, 1>(x, residual, out, size, adjoint, stream);
  }
}

template <typename T>
void choose_kernel(const void* x, const void* residual, void* out, const UpsampleBlurSize& size,
                   int kernel_size, int upscale, bool adjoint, bool aligned, uintptr_t stream) {
  const auto choose = [&](auto radius, auto up) {
    choose_vector<T, decltype(radius)::value, decltype(up)::value>(x, residual, out, size, adjoint, aligned,
                                                                   stream);
  };
  using std::integral_constant;
  const auto choose_radius = [&](auto up) {
    if (kernel_size == 1) choose(integral_constant<int, 0>{}, up);
    if (kernel_size == 3) choose(integral_constant<int, 1>{}, up);
    if (kernel_size == 5) choose(integral_constant<int, 2>{}, up);
  };
  if (upscale == 1) choose_radius(integral_constant<int, 1>{});
  if (upscale == 2) choose_radius(integral_constant<int, 2>{});
}

}  // namespace

void upsample_blur_cuda(uintptr_t x, uintptr_t residual, uintptr_t out, const std::string& dtype,
                        int64_t batch, int64_t height, int64_t width, int64_t channels, int kernel_size,
                        int upscale, bool adjoint, int device, uintptr_t stream) {
  const UpsampleBlurSize size =
      check_upsample_blur(residual, batch, height, width, channels, kernel_size, upscale, adjoint);
  const DType type = parse_dtype(dtype);
  if (batch == 0) return;
  const bool aligned =
      is_aligned(x, kVectorBytes) && is_aligned(residual, kVectorBytes) && is_aligned(out, kVectorBytes);
  const auto run = [&](auto element) {
    choose_kernel<decltype(element)>(reinterpret_cast<const void*>(x),
                                     reinterpret_cast<const void*>(residual), reinterpret_cast<void*>(out),
                                     size, kernel_size, upscale, adjoint, aligned, stream);
  };
  DeviceGuard guard(device);
  if (type == DType::kFloat32) run(float{});
  if (type == DType::kFloat16) run(__half{});
  if (type == DType::kBFloat16) run(__nv_bfloat16{});
}

}  // namespace vfmvae
