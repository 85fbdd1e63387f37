// group_norm on CUDA, forward: statistics, their merging, and one elementwise pass.
//
//     out = activation(style * ((x - mean) * rstd * weight + bias))        mean and rstd per (sample, group)
//
// 1. Many blocks per sample give the mean and the sum of squared deviations of each channel over a tile of
//    pixels. A convolution that writes x can leave the same numbers, and this pass is skipped.
// 2. One block per (sample, group) merges tiles and channels (Chan et al. 1983) and writes, per (sample,
//    channel), what the elementwise passes need.
// 3. The elementwise pass goes through x from its end, of which the L2 cache still holds a part.
// No atomics: the result is deterministic.
#include "group_norm.cuh"
#include "group_norm_small.cuh"
#include "ops.h"

namespace vfmvae {
namespace {

constexpr int kUnroll = 4;  // pixels whose loads a thread has in flight
constexpr int64_t kCheapElements = 1 << 22;

// partials [batch, tiles, 2, channels]: mean and sum of squared deviations from it; counts [tiles].
template <typename T, int V>
__global__ void __launch_bounds__(kGroupNormThreads, 3)
    group_norm_statistics_kernel(const T* __restrict__ x, float* __restrict__ partials,
                                 float* __restrict__ counts, GroupNormTiling tiling) {
  alignas(16) __shared__ float row_means[kGroupNormThreads * V];  // [rows][columns * V]
  alignas(16) __shared__ float row_squares[kGroupNormThreads * V];
  const int row = threadIdx.x / tiling.columns, column = threadIdx.x - row * tiling.columns;
  const int width = tiling.columns * V;
  const int first_channel = blockIdx.z * width;
  const int channel = first_channel + column * V;
  const int tile = blockIdx.x, count = tiling.count(tile);
  const int64_t stride = int64_t{tiling.rows} * tiling.channels;
  if (blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0) counts[tile] = static_cast<float>(count);

  for (int64_t image = blockIdx.y; image < tiling.batch; image += gridDim.y) {
    const T* origin = x + tiling.offset(image, tile);  // its values are close to those of the whole tile
    float mean[V] = {}, squares[V] = {};               // of the differences to them
    if (channel < tiling.channels) {
      float shift[V];
      load_run<(V > 1)>(origin + channel, shift);
      const T* source = origin + int64_t{row} * tiling.channels + channel;
      int pixel = row;
      float seen = 0.0f;
      for (; pixel + (kUnroll - 1) * tiling.rows < count; pixel += kUnroll * tiling.rows) {
        Vec<T, V> piece[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) piece[i] = load_vector<T, V>(source + i * stride);
        source += kUnroll * stride;
        const float share = kUnroll / (seen + kUnroll), between = seen * share;
        seen += kUnroll;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float value[kUnroll], sum = 0.0f, spread = 0.0f;
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) sum += value[i] = to_float(piece[i].at[v]) - shift[v];
          const float average = sum * (1.0f / kUnroll);
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) spread += (value[i] - average) * (value[i] - average);
          const float step = average - mean[v];
          mean[v] += step * share;
          squares[v] += spread + step * step * between;
        }
      }
      for (; pixel < count; pixel += tiling.rows) {
        const Vec<T, V> piece = load_vector<T, V>(source);
        source += stride;
        const float share = 1.0f / (seen + 1.0f), between = seen * share;
        seen += 1.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float step = to_float(piece.at[v]) - shift[v] - mean[v];
          mean[v] += step * share;
          squares[v] += step * step * between;
        }
      }
    }
    store_run<(V > 1)>(row_means + threadIdx.x * V, mean);
    store_run<(V > 1)>(row_squares + threadIdx.x * V, squares);
    __syncthreads();

    float* result = partials + (image * tiling.tiles + tile) * 2 * tiling.channels;
    for (int c = threadIdx.x; c < width && first_channel + c < tiling.channels; c += blockDim.x) {
      const int rows = min(tiling.rows, count);
      // The first (count % rows) rows have one pixel more than the others.
      const int least = count / tiling.rows, longer = count - least * tiling.rows;
      float sum = 0.0f, spread = 0.0f;
      for (int r = 0; r < rows; ++r) sum += (least + (r < longer)) * row_means[r * width + c];
      const float average = sum / count;
      for (int r = 0; r < rows; ++r) {
        const float step = row_means[r * width + c] - average;
        spread += row_squares[r * width + c] + (least + (r < longer)) * step * step;
      }
      result[first_channel + c] = to_float(origin[first_channel + c]) + average;
      result[tiling.channels + first_channel + c] = spread;
    }
    __syncthreads();
  }
}

// One block per (sample, group); table [batch, kTableRows, channels].
__global__ void __launch_bounds__(kGroupNormThreads)
    group_norm_finalize_kernel(const float* __restrict__ partials, const float* __restrict__ counts,
                               const float* __restrict__ weight, const float* __restrict__ bias,
                               const float* __restrict__ style, float* __restrict__ table, int64_t pixels,
                               int channels, int groups, int tiles, double eps) {
  __shared__ double shared[kGroupNormThreads];
  const int64_t image = blockIdx.x / groups;
  const int group = blockIdx.x - static_cast<int>(image) * groups;
  const int size = channels / groups, first = group * size;
  const float* statistics = partials + image * tiles * 2 * channels + first;
  const double origin = statistics[0];
  double sum = 0.0, squares = 0.0;
  for (int64_t i = threadIdx.x; i < int64_t{tiles} * size; i += kGroupNormThreads) {
    const int tile = static_cast<int>(i / size), c = static_cast<int>(i - int64_t{tile} * size);
    const float* channel = statistics + int64_t{tile} * 2 * channels + c;
    const double count = counts[tile], mean = channel[0] - origin;
    sum += count * mean;
    squares += channel[channels] + count * mean * mean;
  }

  const double count = static_cast<double>(pixels) * size;
  const double shifted = block_sum(sum, shared) / count;
  const double difference = block_sum(squares, shared) / count - shifted * shifted;
  const double variance = difference < 0.0 ? 0.0 : difference;  // NaN stays NaN
  const double mean = origin + shifted, rstd = 1.0 / sqrt(variance + eps);
  const float nearest = static_cast<float>(mean);
  const double rest = mean - nearest;
  float* row = table + image * kTableRows * channels;
  for (int c = first + threadIdx.x; c < first + size; c += kGroupNormThreads) {
    const double factor = style == nullptr ? 1.0 : style[image * channels + c];
    const double scale = rstd * weight[c];
    row[kMean * channels + c] = nearest;
    row[kScale * channels + c] = static_cast<float>(scale * factor);
    row[kShift * channels + c] = static_cast<float>((bias[c] - rest * scale) * factor);
    row[kRstd * channels + c] = static_cast<float>(rstd);
    row[kRest * channels + c] = static_cast<float>(rest);
  }
}

template <typename T, int V, int ACTIVATION>
__global__ void __launch_bounds__(kGroupNormThreads, ACTIVATION == kGelu ? 2 : 3)
    group_norm_apply_kernel(const T* __restrict__ x, const float* __restrict__ table, T* __restrict__ out,
                            GroupNormTiling tiling) {
  const int row = threadIdx.x / tiling.columns, column = threadIdx.x - row * tiling.columns;
  const int channel = (blockIdx.z * tiling.columns + column) * V;
  if (channel >= tiling.channels) return;
  const int tile = tiling.tiles - 1 - blockIdx.x, count = tiling.count(tile);
  const int64_t stride = int64_t{tiling.rows} * tiling.channels;

  for (int64_t image = tiling.batch - 1 - blockIdx.y; image >= 0; image -= gridDim.y) {
    const float* constants = table + image * kTableRows * tiling.channels + channel;
    float mean[V], scale[V], shift[V];
    load_run<(V > 1)>(constants + kMean * tiling.channels, mean);
    load_run<(V > 1)>(constants + kScale * tiling.channels, scale);
    load_run<(V > 1)>(constants + kShift * tiling.channels, shift);
    const int64_t start = tiling.offset(image, tile) + int64_t{row} * tiling.channels + channel;
    const T* source = x + start;
    T* target = out + start;
    const auto write = [&](const Vec<T, V>& piece, T* to) {
      float result[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        result[v] = activate<ACTIVATION>((to_float(piece.at[v]) - mean[v]) * scale[v] + shift[v]);
      }
      store_run<(V > 1)>(to, result);
    };
    int pixel = row;
    for (; pixel + (kUnroll - 1) * tiling.rows < count; pixel += kUnroll * tiling.rows) {
      Vec<T, V> piece[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) piece[i] = load_vector<T, V>(source + i * stride);
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) write(piece[i], target + i * stride);
      source += kUnroll * stride;
      target += kUnroll * stride;
    }
    for (; pixel < count; pixel += tiling.rows) {
      write(load_vector<T, V>(source), target);
      source += stride;
      target += stride;
    }
  }
}

void launch_statistics(const GroupNormCudaTensors& tensors, DType type, bool aligned, int64_t batch,
                       int64_t pixels, int64_t channels, uintptr_t stream) {
  for_vector_and_type(type, aligned, channels, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int kVector = decltype(vector)::value;
    const GroupNormTiling tiling = group_norm_tiling(batch, pixels, channels, kVector);
    launch(group_norm_statistics_kernel<T, kVector>, group_norm_grid(tiling), group_norm_block(tiling),
           stream, reinterpret_cast<const T*>(tensors.x), reinterpret_cast<float*>(tensors.partials),
           reinterpret_cast<float*>(tensors.counts), tiling);
  });
}

void launch_finalize(const GroupNormCudaTensors& tensors, int64_t batch, int64_t pixels, int64_t channels,
                     int64_t groups, int64_t tiles, double eps, uintptr_t stream) {
  launch(group_norm_finalize_kernel, dim3(static_cast<unsigned>(batch * groups)), dim3(kGroupNormThreads),
         stream, reinterpret_cast<const float*>(tensors.partials),
         reinterpret_cast<const float*>(tensors.counts), reinterpret_cast<const float*>(tensors.weight),
         reinterpret_cast<const float*>(tensors.bias), reinterpret_cast<const float*>(tensors.style),
         reinterpret_cast<float*>(tensors.table), pixels, static_cast<int>(channels),
         static_cast<int>(groups), static_cast<int>(tiles), eps);
}

void launch_apply(const GroupNormCudaTensors& tensors, DType type, bool aligned, int64_t batch,
                  int64_t pixels, int64_t channels, Activation activation, uintptr_t stream) {
  for_vector_and_type(type, aligned, channels, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int kVector = decltype(vector)::value;
    const GroupNormTiling tiling = group_norm_tiling(batch, pixels, channels, kVector);
    for_activation(activation, [&](auto function) {
      launch(group_norm_apply_kernel<T, kVector, decltype(function)::value>, group_norm_grid(tiling),
             group_norm_block(tiling), stream, reinterpret_cast<const T*>(tensors.x),
             reinterpret_cast<const float*>(tensors.table), reinterpret_cast<T*>(tensors.out), tiling);
    });
  });
}

}  // namespace

int64_t group_norm_tiles(int64_t batch, int64_t pixels, int64_t channels) {
  return group_norm_tiling(batch, pixels, channels, 1).tiles;
}

void group_norm_cuda(const GroupNormCudaTensors& tensors, const std::string& dtype, int64_t batch,
                     int64_t pixels, int64_t channels, int64_t groups, int64_t given_tiles, double eps,
                     const std::string& activation, int device, uintptr_t stream) {
  group_size(channels, groups);
  const Activation function = parse_activation(activation);
  const DType type = parse_dtype(dtype);
  check_at_least("given_tiles", given_tiles, 0);
  const int64_t own_tiles = group_norm_tiles(batch, pixels, channels);
  check(batch * groups < int64_t{1} << 31,
        std::to_string(batch) + " samples with " + std::to_string(groups) + " groups are too many");
  if (batch == 0) return;
  const bool aligned = is_aligned(tensors.x, kVectorBytes) && is_aligned(tensors.out, kVectorBytes) &&
                       is_aligned(tensors.table, kVectorBytes);
  DeviceGuard guard(device);
  const GroupNormSmall small = group_norm_small(type, pixels, channels, groups, kSmallVectors);
  // One kernel more costs as much as reading some megabytes again, from the L2 cache.
  const bool again = given_tiles == 0 || batch * pixels * channels < kCheapElements;
  if (aligned && small.rows > 0 && again) {
    launch_group_norm_small(tensors, small, type, batch, function, eps, stream);
    return;
  }
  if (given_tiles == 0) launch_statistics(tensors, type, aligned, batch, pixels, channels, stream);
  const int64_t tiles = given_tiles == 0 ? own_tiles : given_tiles;
  launch_finalize(tensors, batch, pixels, channels, groups, tiles, eps, stream);
  launch_apply(tensors, type, aligned, batch, pixels, channels, function, stream);
}

}  // namespace vfmvae
