// group_norm on CUDA where a block can hold the values of a (sample, group) in its registers: one kernel
// forward, one (and the sum over samples) backward, and every value is read once. For the decoder's maps up
// to 32 x 32, whose time is otherwise that of starting kernels. The same threads as in group_norm.cuh, with
// the group's channels as columns.
#include "group_norm.cuh"
#include "group_norm_small.cuh"

namespace vfmvae {
namespace {

template <typename T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

// A thread's vectors: those of its column at pixels row, row + rows, ...
template <typename T, int MOST>
struct Held {
  Vec<T, kVector<T>> at[MOST];

  __device__ __forceinline__ void load(const T* source, int row, const GroupNormSmall& size) {
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
      const int pixel = row + i * size.rows;
      if (pixel < size.pixels) at[i] = load_vector<T, kVector<T>>(source + int64_t{pixel} * size.channels);
    }
  }
};

template <typename T, int ACTIVATION>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_small_kernel(const T* __restrict__ x, const float* __restrict__ weight,
                            const float* __restrict__ bias, const float* __restrict__ style,
                            float* __restrict__ table, T* __restrict__ out, GroupNormSmall size, double eps) {
  constexpr int V = kVector<T>;
  __shared__ double shared[kGroupNormThreads];
  const int64_t image = blockIdx.x / size.groups;
  const int group = blockIdx.x - static_cast<int>(image) * size.groups;
  const int row = threadIdx.x / size.columns, column = threadIdx.x - row * size.columns;
  const int first = group * size.columns * V, channel = first + column * V;
  const int64_t start = image * size.pixels * size.channels;
  Held<T, kSmallVectors> held;
  held.load(x + start + channel, row, size);

  const float origin = to_float(x[start + first]);
  const double count = static_cast<double>(size.pixels) * size.columns * V;
  float sum = 0.0f, spread = 0.0f;
#pragma unroll
  for (int i = 0; i < kSmallVectors; ++i) {
    if (row + i * size.rows >= size.pixels) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) sum += to_float(held.at[i].at[v]) - origin;
  }
  const double shifted = block_sum(sum, shared) / count;
  const float average = static_cast<float>(shifted);
#pragma unroll
  for (int i = 0; i < kSmallVectors; ++i) {
    if (row + i * size.rows >= size.pixels) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float step = to_float(held.at[i].at[v]) - origin - average;
      spread += step * step;
    }
  }
  const double variance = block_sum(spread, shared) / count;

  const double mean = origin + shifted, rstd = 1.0 / sqrt(variance + eps);
  const float nearest = static_cast<float>(mean);
  const float rest = static_cast<float>(mean - nearest);
  float scale[V], shift[V];
  float* constants = table + image * kTableRows * size.channels;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int c = channel + v;
    const float factor = style == nullptr ? 1.0f : style[image * size.channels + c];
    const float normed = static_cast<float>(rstd) * weight[c];
    scale[v] = normed * factor;
    shift[v] = (bias[c] - rest * normed) * factor;
    if (row == 0) {
      constants[kMean * size.channels + c] = nearest;
      constants[kScale * size.channels + c] = scale[v];
      constants[kShift * size.channels + c] = shift[v];
      constants[kRstd * size.channels + c] = static_cast<float>(rstd);
      constants[kRest * size.channels + c] = rest;
    }
  }
#pragma unroll
  for (int i = 0; i < kSmallVectors; ++i) {
    const int pixel = row + i * size.rows;
    if (pixel >= size.pixels) continue;
    float result[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      result[v] = activate<ACTIVATION>((to_float(held.at[i].at[v]) - nearest) * scale[v] + shift[v]);
    }
    store_run<true>(out + start + int64_t{pixel} * size.channels + channel, result);
  }
}

// coefficients: only the rows for the gradients of weight and bias. grad_style may be null.
template <typename T, int ACTIVATION>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_small_gradient_kernel(const T* __restrict__ x, const T* __restrict__ grad,
                                     const float* __restrict__ weight, const float* __restrict__ bias,
                                     const float* __restrict__ style, const float* __restrict__ table,
                                     float* __restrict__ coefficients, float* __restrict__ grad_style,
                                     T* __restrict__ out, GroupNormSmall size) {
  constexpr int V = kVector<T>;
  __shared__ double shared[kGroupNormThreads];
  alignas(16) __shared__ float row_sums[kGroupNormThreads * V];  // [rows][columns * V]
  alignas(16) __shared__ float row_products[kGroupNormThreads * V];
  const int64_t image = blockIdx.x / size.groups;
  const int group = blockIdx.x - static_cast<int>(image) * size.groups;
  const int row = threadIdx.x / size.columns, column = threadIdx.x - row * size.columns;
  const int width = size.columns * V, first = group * width, channel = first + column * V;
  const int64_t start = image * size.pixels * size.channels;
  Held<T, kSmallPairs> values, grads;
  values.load(x + start + channel, row, size);
  grads.load(grad + start + channel, row, size);

  const float* constants = table + image * kTableRows * size.channels;
  const float mean = constants[kMean * size.channels + first];
  const float rest = constants[kRest * size.channels + first];
  const double rstd = constants[kRstd * size.channels + first];
  float scale[V], shift[V], sums[V] = {}, products[V] = {};
  load_run<true>(constants + kScale * size.channels + channel, scale);
  load_run<true>(constants + kShift * size.channels + channel, shift);
  const auto gradient = [&](int i, int v, float centred) {
    const float g = to_float(grads.at[i].at[v]);
    return ACTIVATION == kNone ? g : g * activation_slope<ACTIVATION>(centred * scale[v] + shift[v]);
  };
#pragma unroll
  for (int i = 0; i < kSmallPairs; ++i) {
    if (row + i * size.rows >= size.pixels) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float centred = to_float(values.at[i].at[v]) - mean, g = gradient(i, v, centred);
      sums[v] += g;
      products[v] += g * centred;
    }
  }
  store_run<true>(row_sums + threadIdx.x * V, sums);
  store_run<true>(row_products + threadIdx.x * V, products);
  __syncthreads();

  double group_sum = 0.0, group_product = 0.0;
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    double sum = 0.0, product = 0.0;
    for (int r = 0; r < size.rows; ++r) {
      sum += row_sums[r * width + c];
      product += row_products[r * width + c];
    }
    product = rstd * (product - rest * sum);  // of g and xhat
    const int64_t at = image * size.channels + first + c;
    if (grad_style != nullptr) {
      grad_style[at] = static_cast<float>(weight[first + c] * product + bias[first + c] * sum);
    }
    const double factor = style == nullptr ? 1.0 : style[at];
    float* result = coefficients + image * kCoefficientRows * size.channels + first + c;
    result[kGradBias * size.channels] = static_cast<float>(factor * sum);
    result[kGradWeight * size.channels] = static_cast<float>(factor * product);
    group_sum += factor * weight[first + c] * sum;
    group_product += factor * weight[first + c] * product;
  }
  const double count = static_cast<double>(size.pixels) * width;
  const double slope = -rstd * rstd * block_sum(group_product, shared) / count;
  const double offset = -rstd * block_sum(group_sum, shared) / count - slope * rest;
  const float factor = static_cast<float>(slope), constant = static_cast<float>(offset);
#pragma unroll
  for (int i = 0; i < kSmallPairs; ++i) {
    const int pixel = row + i * size.rows;
    if (pixel >= size.pixels) continue;
    float result[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float centred = to_float(values.at[i].at[v]) - mean;
      result[v] = scale[v] * gradient(i, v, centred) + (factor * centred + constant);
    }
    store_run<true>(out + start + int64_t{pixel} * size.channels + channel, result);
  }
}

template <typename Run>
void for_type_and_activation(DType type, Activation activation, const Run& run) {
  for_activation(activation, [&](auto function) {
    if (type == DType::kFloat32) run(float{}, function);
    if (type == DType::kFloat16) run(__half{}, function);
    if (type == DType::kBFloat16) run(__nv_bfloat16{}, function);
  });
}

dim3 grid_of(const GroupNormSmall& size, int64_t batch) {
  return dim3(static_cast<unsigned>(batch * size.groups));
}
dim3 block_of(const GroupNormSmall& size) { return dim3(static_cast<unsigned>(size.columns * size.rows)); }

}  // namespace

GroupNormSmall group_norm_small(DType type, int64_t pixels, int64_t channels, int64_t groups,
                                int vectors) {
  const int64_t bytes = type == DType::kFloat32 ? 4 : 2, vector = kVectorBytes / bytes;
  const int64_t size = channels / groups, columns = size / vector;
  // With less than 32 bytes per pixel, memory would be fetched by more blocks than one.
  if (size % vector != 0 || columns < 2 || columns > kGroupNormThreads) return {};
  const int64_t rows = std::min<int64_t>(kGroupNormThreads / columns, pixels);
  if (pixels > rows * vectors) return {};
  return {static_cast<int>(pixels), static_cast<int>(channels), static_cast<int>(groups),
          static_cast<int>(columns), static_cast<int>(rows)};
}

void launch_group_norm_small(const GroupNormCudaTensors& tensors, const GroupNormSmall& size, DType type,
                             int64_t batch, Activation activation, double eps, uintptr_t stream) {
  for_type_and_activation(type, activation, [&](auto element, auto function) {
    using T = decltype(element);
    launch(group_norm_small_kernel<T, decltype(function)::value>, grid_of(size, batch), block_of(size),
           stream, reinterpret_cast<const T*>(tensors.x), reinterpret_cast<const float*>(tensors.weight),
           reinterpret_cast<const float*>(tensors.bias), reinterpret_cast<const float*>(tensors.style),
           reinterpret_cast<float*>(tensors.table), reinterpret_cast<T*>(tensors.out), size, eps);
  });
}

void launch_group_norm_small_gradient(const GroupNormCudaTensors& tensors,
                                      const GroupNormCudaGradients& gradients, const GroupNormSmall& size,
                                      DType type, int64_t batch, Activation activation, uintptr_t stream) {
  for_type_and_activation(type, activation, [&](auto element, auto function) {
    using T = decltype(element);
    launch(group_norm_small_gradient_kernel<T, decltype(function)::value>, grid_of(size, batch),
           block_of(size), stream, reinterpret_cast<const T*>(tensors.x),
           reinterpret_cast<const T*>(gradients.out), reinterpret_cast<const float*>(tensors.weight),
           reinterpret_cast<const float*>(tensors.bias), reinterpret_cast<const float*>(tensors.style),
           reinterpret_cast<const float*>(tensors.table), reinterpret_cast<float*>(gradients.coefficients),
           reinterpret_cast<float*>(gradients.style), reinterpret_cast<T*>(gradients.x), size);
  });
}

}  // namespace vfmvae
