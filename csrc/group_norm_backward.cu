// group_norm on CUDA, backward, in the three steps of the forward. With z = style * (xhat * weight + bias),
// g = grad * activation'(z) and n values in a group, of which the sums are taken:
//
//     grad of x = rstd * (h - (sum(h) + xhat * sum(h * xhat)) / n)        with h = style * weight * g
//
// 1. Many blocks per sample sum g and g * (x - mean) per channel over a tile of pixels.
// 2. One block per (sample, group) adds the tiles up and writes what step 3 needs per (sample, channel), the
//    gradient of style, and this sample's share of the gradients of weight and bias, which a last small
//    kernel adds up over the samples.
// 3. The elementwise pass recomputes g, from the end of the maps, of which the L2 cache still holds a part.
// No atomics: the result is deterministic.
#include "group_norm.cuh"
#include "group_norm_small.cuh"
#include "ops.h"

namespace vfmvae {
namespace {

constexpr int kPairs = 2;  // pixels of x and of grad whose loads a thread has in flight

// What a thread keeps of the table for its V channels. Without an activation, z is not needed.
template <int V, int ACTIVATION>
struct Normed {
  float mean[V], scale[V], shift[V];

  __device__ __forceinline__ Normed(const float* table, int channels) {
    load_run<(V > 1)>(table + kMean * channels, mean);
    load_run<(V > 1)>(table + kScale * channels, scale);
    load_run<(V > 1)>(table + kShift * channels, shift);
  }
  __device__ __forceinline__ float gradient(int v, float centred, float grad) const {
    if (ACTIVATION == kNone) return grad;
    return grad * activation_slope<ACTIVATION>(centred * scale[v] + shift[v]);
  }
};

// partials [batch, tiles, 2, channels]: sums of g and of g * (x - mean).
template <typename T, int V, int ACTIVATION>
__global__ void __launch_bounds__(kGroupNormThreads, ACTIVATION == kNone ? 3 : 2)
    group_norm_sums_kernel(const T* __restrict__ x, const T* __restrict__ grad,
                           const float* __restrict__ table, float* __restrict__ partials,
                           GroupNormTiling tiling) {
  alignas(16) __shared__ float row_sums[kGroupNormThreads * V];  // [rows][columns * V]
  alignas(16) __shared__ float row_products[kGroupNormThreads * V];
  const int row = threadIdx.x / tiling.columns, column = threadIdx.x - row * tiling.columns;
  const int width = tiling.columns * V;
  const int first_channel = blockIdx.z * width;
  const int channel = first_channel + column * V;
  const int tile = blockIdx.x, count = tiling.count(tile);
  const int64_t stride = int64_t{tiling.rows} * tiling.channels;

  for (int64_t image = blockIdx.y; image < tiling.batch; image += gridDim.y) {
    float sums[V] = {}, products[V] = {};
    if (channel < tiling.channels) {
      const Normed<V, ACTIVATION> normed(table + image * kTableRows * tiling.channels + channel,
                                         tiling.channels);
      const auto add = [&](const Vec<T, V>& values, const Vec<T, V>& grads) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float centred = to_float(values.at[v]) - normed.mean[v];
          const float g = normed.gradient(v, centred, to_float(grads.at[v]));
          sums[v] += g;
          products[v] += g * centred;
        }
      };
      int64_t at = tiling.offset(image, tile) + int64_t{row} * tiling.channels + channel;
      int pixel = row;
      for (; pixel + (kPairs - 1) * tiling.rows < count; pixel += kPairs * tiling.rows) {
        Vec<T, V> values[kPairs], grads[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          values[i] = load_vector<T, V>(x + at + i * stride);
          grads[i] = load_vector<T, V>(grad + at + i * stride);
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) add(values[i], grads[i]);
        at += kPairs * stride;
      }
      for (; pixel < count; pixel += tiling.rows, at += stride) {
        add(load_vector<T, V>(x + at), load_vector<T, V>(grad + at));
      }
    }
    store_run<(V > 1)>(row_sums + threadIdx.x * V, sums);
    store_run<(V > 1)>(row_products + threadIdx.x * V, products);
    __syncthreads();

    float* result = partials + (image * tiling.tiles + tile) * 2 * tiling.channels;
    for (int c = threadIdx.x; c < width && first_channel + c < tiling.channels; c += blockDim.x) {
      float sum = 0.0f, product = 0.0f;
      for (int r = 0; r < tiling.rows; ++r) {
        sum += row_sums[r * width + c];
        product += row_products[r * width + c];
      }
      result[first_channel + c] = sum;
      result[tiling.channels + first_channel + c] = product;
    }
    __syncthreads();
  }
}

// One block per (sample, group). coefficients [batch, kCoefficientRows, channels]; grad_style may be null.
__global__ void __launch_bounds__(kGroupNormThreads)
    group_norm_coefficients_kernel(const float* __restrict__ partials, const float* __restrict__ table,
                                   const float* __restrict__ weight, const float* __restrict__ bias,
                                   const float* __restrict__ style, float* __restrict__ coefficients,
                                   float* __restrict__ grad_style, int64_t pixels, int channels, int groups,
                                   int tiles) {
  __shared__ double sums[2][kGroupNormThreads];
  const int64_t image = blockIdx.x / groups;
  const int group = blockIdx.x - static_cast<int>(image) * groups;
  const int size = channels / groups, first = group * size;
  const float* sample = partials + image * tiles * 2 * channels;
  const float* constants = table + image * kTableRows * channels;
  float* result = coefficients + image * kCoefficientRows * channels;
  const double rstd = constants[kRstd * channels + first], rest = constants[kRest * channels + first];

  // Threads are `rows` of tiles x `columns` of channels; a group of more channels takes several turns.
  const int columns = min(size, kGroupNormThreads), rows = kGroupNormThreads / columns;
  const int row = threadIdx.x / columns, column = threadIdx.x - row * columns;
  double group_sum = 0.0, group_product = 0.0;
  for (int start = 0; start < size; start += columns) {
    const int c = first + start + column;
    const bool mine = row < rows && start + column < size;
    double sum = 0.0, product = 0.0;
    for (int tile = row; mine && tile < tiles; tile += rows) {
      sum += sample[int64_t{tile} * 2 * channels + c];
      product += sample[(int64_t{tile} * 2 + 1) * channels + c];
    }
    sums[0][threadIdx.x] = sum;
    sums[1][threadIdx.x] = product;
    __syncthreads();
    if (mine && row == 0) {
      for (int r = 1; r < rows; ++r) {
        sum += sums[0][r * columns + column];
        product += sums[1][r * columns + column];
      }
      product = rstd * (product - rest * sum);  // of g and xhat
      if (grad_style != nullptr) {
        grad_style[image * channels + c] = static_cast<float>(weight[c] * product + bias[c] * sum);
      }
      const double factor = style == nullptr ? 1.0 : style[image * channels + c];
      result[kGradBias * channels + c] = static_cast<float>(factor * sum);
      result[kGradWeight * channels + c] = static_cast<float>(factor * product);
      group_sum += factor * weight[c] * sum;
      group_product += factor * weight[c] * product;
    }
    __syncthreads();
  }

  const double count = static_cast<double>(pixels) * size;
  const double slope = -rstd * rstd * block_sum(group_product, sums[0]) / count;
  const double offset = -rstd * block_sum(group_sum, sums[0]) / count - slope * rest;
  for (int c = first + threadIdx.x; c < first + size; c += kGroupNormThreads) {
    result[kSlope * channels + c] = static_cast<float>(slope);
    result[kOffset * channels + c] = static_cast<float>(offset);
  }
}

constexpr int kColumns = 32;

// Sums of the samples' shares: gradients of weight and bias [channels].
__global__ void __launch_bounds__(kGroupNormThreads)
    group_norm_weight_gradient_kernel(const float* __restrict__ coefficients, float* __restrict__ grad_weight,
                                      float* __restrict__ grad_bias, int64_t batch, int channels) {
  __shared__ double sums[2][kGroupNormThreads];
  const int row = threadIdx.x / kColumns, column = threadIdx.x - row * kColumns;
  const int channel = blockIdx.x * kColumns + column;
  double of_weight = 0.0, of_bias = 0.0;
  if (channel < channels) {
    for (int64_t image = row; image < batch; image += kGroupNormThreads / kColumns) {
      const float* sample = coefficients + image * kCoefficientRows * channels + channel;
      of_weight += sample[kGradWeight * channels];
      of_bias += sample[kGradBias * channels];
    }
  }
  sums[0][threadIdx.x] = of_weight;
  sums[1][threadIdx.x] = of_bias;
  __syncthreads();
  if (row == 0 && channel < channels) {
    for (int t = threadIdx.x + kColumns; t < kGroupNormThreads; t += kColumns) {
      of_weight += sums[0][t];
      of_bias += sums[1][t];
    }
    grad_weight[channel] = static_cast<float>(of_weight);
    grad_bias[channel] = static_cast<float>(of_bias);
  }
}

template <typename T, int V, int ACTIVATION>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_gradient_kernel(const T* __restrict__ x, const T* __restrict__ grad,
                               const float* __restrict__ table, const float* __restrict__ coefficients,
                               T* __restrict__ out, GroupNormTiling tiling) {
  const int row = threadIdx.x / tiling.columns, column = threadIdx.x - row * tiling.columns;
  const int channel = (blockIdx.z * tiling.columns + column) * V;
  if (channel >= tiling.channels) return;
  const int tile = tiling.tiles - 1 - blockIdx.x, count = tiling.count(tile);
  const int64_t stride = int64_t{tiling.rows} * tiling.channels;

  for (int64_t image = tiling.batch - 1 - blockIdx.y; image >= 0; image -= gridDim.y) {
    const Normed<V, ACTIVATION> normed(table + image * kTableRows * tiling.channels + channel,
                                       tiling.channels);
    const float* constants = coefficients + image * kCoefficientRows * tiling.channels + channel;
    float slope[V], offset[V];
    load_run<(V > 1)>(constants + kSlope * tiling.channels, slope);
    load_run<(V > 1)>(constants + kOffset * tiling.channels, offset);
    const auto write = [&](const Vec<T, V>& values, const Vec<T, V>& grads, T* target) {
      float result[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float centred = to_float(values.at[v]) - normed.mean[v];
        const float g = normed.gradient(v, centred, to_float(grads.at[v]));
        result[v] = normed.scale[v] * g + (slope[v] * centred + offset[v]);
      }
      store_run<(V > 1)>(target, result);
    };
    int64_t at = tiling.offset(image, tile) + int64_t{row} * tiling.channels + channel;
    int pixel = row;
    for (; pixel + (kPairs - 1) * tiling.rows < count; pixel += kPairs * tiling.rows) {
      Vec<T, V> values[kPairs], grads[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        values[i] = load_vector<T, V>(x + at + i * stride);
        grads[i] = load_vector<T, V>(grad + at + i * stride);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) write(values[i], grads[i], out + at + i * stride);
      at += kPairs * stride;
    }
    for (; pixel < count; pixel += tiling.rows, at += stride) {
      write(load_vector<T, V>(x + at), load_vector<T, V>(grad + at), out + at);
    }
  }
}

}  // namespace

void group_norm_backward_cuda(const GroupNormCudaTensors& tensors, const GroupNormCudaGradients& gradients,
                              const std::string& dtype, int64_t batch, int64_t pixels, int64_t channels,
                              int64_t groups, const std::string& activation, int device, uintptr_t stream) {
  group_size(channels, groups);
  const Activation function = parse_activation(activation);
  const DType type = parse_dtype(dtype);
  const int tiles = static_cast<int>(group_norm_tiles(batch, pixels, channels));
  const bool aligned = is_aligned(tensors.x, kVectorBytes) && is_aligned(gradients.out, kVectorBytes) &&
                       is_aligned(gradients.x, kVectorBytes) && is_aligned(tensors.table, kVectorBytes) &&
                       is_aligned(gradients.coefficients, kVectorBytes);
  const auto* table = reinterpret_cast<const float*>(tensors.table);
  auto* partials = reinterpret_cast<float*>(tensors.partials);
  auto* coefficients = reinterpret_cast<float*>(gradients.coefficients);
  const auto for_kernels = [&](const auto& run) {
    for_vector_and_type(type, aligned, channels, [&](auto element, auto vector) {
      for_activation(function, [&](auto activation) {
        run(element, vector, activation,
            group_norm_tiling(batch, pixels, channels, decltype(vector)::value));
      });
    });
  };
  DeviceGuard guard(device);
  const GroupNormSmall small =
      aligned ? group_norm_small(type, pixels, channels, groups, kSmallPairs) : GroupNormSmall{};
  const bool large = batch > 0 && small.rows == 0;
  if (batch > 0 && !large) {
    launch_group_norm_small_gradient(tensors, gradients, small, type, batch, function, stream);
  }
  if (large) {
    for_kernels([&](auto element, auto vector, auto activation, const GroupNormTiling& tiling) {
      using T = decltype(element);
      launch(group_norm_sums_kernel<T, decltype(vector)::value, decltype(activation)::value>,
             group_norm_grid(tiling), group_norm_block(tiling), stream, reinterpret_cast<const T*>(tensors.x),
             reinterpret_cast<const T*>(gradients.out), table, partials, tiling);
    });
    launch(group_norm_coefficients_kernel, dim3(static_cast<unsigned>(batch * groups)),
           dim3(kGroupNormThreads), stream, partials, table, reinterpret_cast<const float*>(tensors.weight),
           reinterpret_cast<const float*>(tensors.bias), reinterpret_cast<const float*>(tensors.style),
           coefficients, reinterpret_cast<float*>(gradients.style), pixels, static_cast<int>(channels),
           static_cast<int>(groups), tiles);
  }
  if (gradients.weight != 0) {
    launch(group_norm_weight_gradient_kernel,
           dim3(static_cast<unsigned>((channels + kColumns - 1) / kColumns)), dim3(kGroupNormThreads), stream,
           coefficients, reinterpret_cast<float*>(gradients.weight), reinterpret_cast<float*>(gradients.bias),
           batch, static_cast<int>(channels));
  }
  if (large) {
    for_kernels([&](auto element, auto vector, auto activation, const GroupNormTiling& tiling) {
      using T = decltype(element);
      launch(group_norm_gradient_kernel<T, decltype(vector)::value, decltype(activation)::value>,
             group_norm_grid(tiling), group_norm_block(tiling), stream, reinterpret_cast<const T*>(tensors.x),
             reinterpret_cast<const T*>(gradients.out), table, coefficients,
             reinterpret_cast<T*>(gradients.x), tiling);
    });
  }
}

}  // namespace vfmvae
