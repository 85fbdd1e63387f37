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
    grads[newest % K][c] = to_float(grad[c * kChannels]);
    bias_sum += grads[newest % K][c];
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
        sums[i][j] += value * grads[(newest + K - i) % K][column];
      }
  }
}

// Adds up the sums of a block's spans, in order, in those of the first one. `staged` is [K*K + 1][kChannels].
template <int K>
__device__ __forceinline__ void add_spans(float* staged, float (&sums)[K][K], float& bias_sum) {
  const int span = threadIdx.x / kChannels;
  float* own = staged + threadIdx.x % kChannels;
#pragma unroll 1
  for (int other = 1; other < kSpans; ++other) {
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
__global__ void __launch_bounds__(kThreads, ALIGNED ? 2 : 1)
    depthwise_gradient_kernel(const T* __restrict__ x, const T* __restrict__ grad,
                              float* __restrict__ partials, DepthwiseSize size, int parts) {
  constexpr int kRadius = K / 2, kColumns = kTileWidth + K - 1;  // of a row of x with its halo
  constexpr int kGradRow = kTileWidth * kChannels, kStage = kGradRow + kColumns * kChannels;
  T* staged = reinterpret_cast<T*>(shared_memory());

  const int first_channel = blockIdx.x % size.groups * kChannels, part = blockIdx.x / size.groups;
  const int span = threadIdx.x / kChannels, lane = threadIdx.x % kChannels;
  const int64_t tiles = size.batch * size.tiles_x * size.tiles_y;
  float sums[K][K] = {}, bias_sum = 0.0f;

#pragma unroll 1
  for (int64_t number = part; number < tiles; number += parts) {
    const Tile tile = find_tile(size, number);
    const int steps = tile.rows + K - 1, end_row = tile.first_row + tile.rows;
    RowReader<T, kColumns, ALIGNED> x_rows(x, size, tile, tile.first_row - kRadius, end_row + kRadius,
                                           tile.first_column - kRadius, first_channel);
    RowReader<T, kTileWidth, ALIGNED> grad_rows(grad, size, tile, tile.first_row, end_row, tile.first_column,
                                                first_channel);
    const auto begin = [&](T* stage) {
      grad_rows.next(stage, size);
      x_rows.next(stage + kGradRow, size);
      commit_copies();
    };
    __syncthreads();  // all are done with the tile before
#pragma unroll 1
    for (int step = 0; step < kStages<K> - 1; ++step) begin(staged + step * kStage);

    float grads[K][kSpan] = {};
#pragma unroll 1
    for (int base = 0; base < steps; base += kStages<K>) {
#pragma unroll
      for (int phase = 0; phase < kStages<K>; ++phase) {
        if (base + phase >= steps) break;
        wait_for_copies<kStages<K> - 2>();
        __syncthreads();  // the rows are there for all, and all are done with those whose place new ones take
        begin(staged + (phase + kStages<K> - 1) % kStages<K> * kStage);
        const T* own = staged + phase * kStage + span * (kSpan * kChannels) + lane;
        add_row<K>(own + kGradRow, own, phase, grads, sums, bias_sum);
      }
    }
    wait_for_copies<0>();  // of rows of zeros below the last one
  }

  add_spans<K>(reinterpret_cast<float*>(shared_memory()), sums, bias_sum);
  const int channel = first_channel + lane;
  if (span > 0 || channel >= size.channels) return;
  float* own = partials + int64_t{part} * (K * K + 1) * size.channels + channel;
#pragma unroll
  for (int t = 0; t < K * K; ++t) own[int64_t{t} * size.channels] = sums[t / K][t % K];
  own[int64_t{K * K} * size.channels] = bias_sum;
}

constexpr int kSums = 32, kRows = 16;  // of a block that adds up partial sums

// out[n] = sum over p of partials[p, n].
__global__ void __launch_bounds__(kSums* kRows)
    add_parts_kernel(const float* __restrict__ partials, float* __restrict__ out, int64_t count, int parts) {
  __shared__ float staged[kRows][kSums];
  const int column = threadIdx.x % kSums, row = threadIdx.x / kSums;
  const int64_t own = int64_t{blockIdx.x} * kSums + column;
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
void launch_kernels(const T* x, const T* grad, float* partials, float* out, const DepthwiseSize& size,
                    int parts, uintptr_t stream) {
  const size_t rows = kChannels * kStages<K> * (2 * kTileWidth + K - 1) * sizeof(T);
  const size_t sums = kChannels * (K * K + 1) * sizeof(float);
  const auto kernel =
      size.aligned ? depthwise_gradient_kernel<T, K, true> : depthwise_gradient_kernel<T, K, false>;
  launch_with_shared(kernel, dim3(static_cast<unsigned>(parts * size.groups)), dim3(kThreads),
                     std::max(rows, sums), stream, x, grad, partials, size, parts);
  const int64_t count = int64_t{K * K + 1} * size.channels;
  launch(add_parts_kernel, dim3(static_cast<unsigned>((count + kSums - 1) / kSums)),
         dim3(kSums * kRows), stream, partials, out, count, parts);
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
