// Gradients of weight and bias of depthwise_conv2d on CUDA, in two steps and without atomics:
//
//     partials[p, i * K + j, c] = sum over the tiles of part p of x[h + i - R, w + j - R, c] * grad[h, w, c]
//     partials[p, K * K, c]     = sum over the tiles of part p of grad[h, w, c]
//     out[:, c]                 = sum over p of partials[p, :, c]                                R = K / 2
//
// A thread keeps the K x K sums of its channel in registers. Walking down the rows, it holds the K rows of
// grad that the current row of x meets as a ring. See depthwise_conv.cuh for the rest.
#include "depthwise_conv.cuh"
#include "ops.h"

namespace vfmvae {
namespace {

template <int K, typename T>
__device__ __forceinline__ void add_row(const T* x, const T* grad, int newest, float (&grads)[K][kSpan],
                                        float (&sums)[K][K], float& bias_sum) {
#pragma unroll
  for (int c = 0; c < kSpan; ++c) {
    grads[newest][c] = to_float(grad[c * kChannels]);
    bias_sum += grads[newest][c];
  }
#pragma unroll
  for (int c = 0; c < kSpan + K - 1; ++c) {
    const float value = to_float(x[c * kChannels]);
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const int column = c - j;
        if (column < 0 || column >= kSpan) continue;
        sums[i][j] += value * grads[(newest - i + K) % K][column];
      }
  }
}

// Adds up the sums of a block's spans, in order, in those of the first one. `staged` is [K*K + 1][kChannels].
template <int K>
__device__ __forceinline__ void add_spans(float* staged, int spans, float (&sums)[K][K], float& bias_sum) {
  const int span = threadIdx.x / kChannels;
  float* own = staged + threadIdx.x % kChannels;
#pragma unroll 1
  for (int other = 1; other < spans; ++other) {
    __syncthreads();
    if (span == other) {
#pragma unroll
      for (int t = 0; t < K * K; ++t) own[t * kChannels] = sums[t / K][t % K];
      own[K * K * kChannels] = bias_sum;
    }
    __syncthreads();
    if (span == 0) {
#pragma unroll
      for (int t = 0; t < K * K; ++t) sums[t / K][t % K] += own[t * kChannels];
      bias_sum += own[K * K * kChannels];
    }
  }
}

// Block b: channels of group b % groups, tiles p, p + parts, p + 2 * parts ... with p = b / groups.
template <typename T, int K, bool ALIGNED>
__global__ void __launch_bounds__(kChannels* kMostSpans, 2)
    depthwise_gradient_kernel(const T* __restrict__ x, const T* __restrict__ grad,
                              float* __restrict__ partials, DepthwiseSize size, int parts) {
  constexpr int kRadius = K / 2;
  const int grad_columns = size.spans * kSpan, x_columns = grad_columns + K - 1;
  const int stage = (grad_columns + x_columns) * kChannels;  // elements
  T* staged = reinterpret_cast<T*>(shared_memory());
  const auto x_place = [&](int step) { return staged + step % kStages * stage; };
  const auto grad_place = [&](int step) { return x_place(step) + x_columns * kChannels; };

  const int first_channel = blockIdx.x % size.groups * kChannels, part = blockIdx.x / size.groups;
  const int span = threadIdx.x / kChannels, lane = threadIdx.x % kChannels;
  const int64_t tiles = size.batch * size.tiles_x * size.tiles_y;
  float sums[K][K] = {}, bias_sum = 0.0f;

#pragma unroll 1
  for (int64_t number = part; number < tiles; number += parts) {
    const Tile tile = find_tile(size, number);
    const int steps = tile.rows + K - 1, end_row = tile.first_row + tile.rows;
    RowReader<T, ALIGNED> x_rows(x, size, tile, tile.first_row - kRadius, end_row + kRadius,
                                 tile.first_column - kRadius, x_columns, first_channel);
    RowReader<T, ALIGNED> grad_rows(grad, size, tile, tile.first_row, end_row, tile.first_column, grad_columns,
                                    first_channel);
    const auto begin = [&](int step) {
      x_rows.next(x_place(step), size);
      grad_rows.next(grad_place(step), size);
      commit_copies();
    };
    __syncthreads();  // all are done with the tile before
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) begin(step);

    float grads[K][kSpan] = {};
#pragma unroll 1
    for (int base = 0; base < steps; base += K) {
#pragma unroll
      for (int phase = 0; phase < K; ++phase) {
        const int step = base + phase;
        if (step >= steps) break;
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the rows are there for all, and all are done with those before them,
        begin(step + kStages - 1);  // whose place the new ones take
        const int own = span * (kSpan * kChannels) + lane;
        add_row<K>(x_place(step) + own, grad_place(step) + own, phase, grads, sums, bias_sum);
      }
    }
    wait_for_copies<0>();  // of rows of zeros below the last one
  }

  add_spans<K>(reinterpret_cast<float*>(shared_memory()), size.spans, sums, bias_sum);
  const int channel = first_channel + lane;
  if (span > 0 || channel >= size.channels) return;
  float* own = partials + int64_t{part} * (K * K + 1) * size.channels + channel;
#pragma unroll
  for (int t = 0; t < K * K; ++t) own[int64_t{t} * size.channels] = sums[t / K][t % K];
  own[int64_t{K * K} * size.channels] = bias_sum;
}

constexpr int kColumns = 32, kRows = 16;  // of a block that adds up partial sums

// out[n] = sum over p of partials[p, n].
__global__ void __launch_bounds__(kColumns* kRows)
    add_parts_kernel(const float* __restrict__ partials, float* __restrict__ out, int64_t count, int parts) {
  __shared__ float staged[kRows][kColumns];
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int64_t own = int64_t{blockIdx.x} * kColumns + column;
  float sum = 0.0f;
  if (own < count) {
#pragma unroll 4
    for (int part = row; part < parts; part += kRows) sum += partials[part * count + own];
  }
  staged[row][column] = sum;
  __syncthreads();
  if (row > 0 || own >= count) return;
#pragma unroll
  for (int other = 1; other < kRows; ++other) sum += staged[other][column];
  out[own] = sum;
}

template <typename T, int K>
void launch_kernels(const T* x, const T* grad, float* partials, float* out, const DepthwiseSize& size, int parts,
                    uintptr_t stream) {
  const int columns = 2 * size.spans * kSpan + K - 1;
  const size_t rows = kChannels * kStages * columns * sizeof(T);
  const size_t sums = kChannels * (K * K + 1) * sizeof(float);
  const auto kernel =
      size.aligned ? depthwise_gradient_kernel<T, K, true> : depthwise_gradient_kernel<T, K, false>;
  launch_with_shared(kernel, dim3(static_cast<unsigned>(parts * size.groups)), dim3(kChannels * size.spans),
                     std::max(rows, sums), stream, x, grad, partials, size, parts);
  const int64_t count = int64_t{K * K + 1} * size.channels;
  launch(add_parts_kernel, dim3(static_cast<unsigned>((count + kColumns - 1) / kColumns)),
         dim3(kColumns * kRows), stream, partials, out, count, parts);
}

}  // namespace

void depthwise_weight_gradient_cuda(uintptr_t x, uintptr_t grad, uintptr_t partials, uintptr_t out,
                                    const std::string& dtype, int64_t batch, int64_t height, int64_t width,
                                    int64_t channels, int kernel_size, int strip_rows, int parts, int device,
                                    uintptr_t stream) {
  DepthwiseSize size = check_depthwise(batch, height, width, channels, kernel_size, strip_rows);
  check_at_least("parts", parts, 1);
  check(int64_t{parts} * size.groups < (int64_t{1} << 31), "more than 2^31 blocks: fewer parts are needed");
  DeviceGuard guard(device);
  choose_depthwise(dtype, kernel_size, [&](auto element, auto k) {
    using T = decltype(element);
    size.aligned = is_aligned(x, kVectorBytes) && is_aligned(grad, kVectorBytes) &&
                   channels * sizeof(T) % kVectorBytes == 0;
    launch_kernels<T, decltype(k)::value>(reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(grad),
                                          reinterpret_cast<float*>(partials), reinterpret_cast<float*>(out),
                                          size, parts, stream);
  });
}

}  // namespace vfmvae
