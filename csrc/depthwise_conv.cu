// depthwise_conv2d on CUDA: k x k, zero padding, bias and noise map; its input gradient is the same kernel
// with the weights turned by half a circle. On request it also leaves the statistics of its output, from
// which a group norm starts without reading it.
//
// Sums of the k output rows that a row of the input enters form a ring in registers. A row opens one of
// them, adds to all, and closes the oldest, which is written. See depthwise_conv.cuh for the rest.
#include "depthwise_conv.cuh"
#include "ops.h"

namespace vfmvae {
namespace {

template <typename T>
struct Tensors {
  const T* x;
  const float *weight, *bias, *noise;  // [C, K, K], [C] or null, [H, W] or null
  T* out;
  float *partials, *counts;  // [B, tiles, 2, C], [tiles]
};

// Mean and squared deviations of values that come one by one. They are taken relative to the first value: a
// plain sum of squares loses its digits where the mean is much larger than the deviation.
struct Moments {
  float shift = 0.0f, sum = 0.0f, squares = 0.0f;

  __device__ __forceinline__ void add(float value, bool first) {
    if (first) shift = value;
    const float difference = value - shift;
    sum += difference;
    squares += difference * difference;
  }
  __device__ __forceinline__ float mean(float count) const { return shift + sum / count; }
  __device__ __forceinline__ float deviations(float count) const {
    const float result = squares - sum * (sum / count);
    return result < 0.0f ? 0.0f : result;  // NaN stays
  }
};

// The block's weights, by way of shared memory: there they lie as in global memory, one channel after the
// other, and K * K is odd, so that the lanes of a warp read from different banks.
template <int K>
__device__ __forceinline__ void load_taps(const float* weight, float* staged, int first_channel, int channels,
                                          bool flipped, float (&taps)[K][K]) {
  const int count = min(kChannels, channels - first_channel) * K * K;
  for (int i = threadIdx.x; i < kChannels * K * K; i += kThreads) {
    staged[i] = i < count ? weight[int64_t{first_channel} * K * K + i] : 0.0f;
  }
  __syncthreads();
  const float* own = staged + threadIdx.x % kChannels * (K * K);
#pragma unroll
  for (int t = 0; t < K * K; ++t) taps[t / K][t % K] = own[flipped ? K * K - 1 - t : t];
}

// Adds one row of the input: its tap row i goes to the output row that is i rows above the newest.
template <int K, typename T>
__device__ __forceinline__ void add_row(const T* row, const float (&taps)[K][K], float start, int newest,
                                        float (&sums)[K][kSpan]) {
#pragma unroll
  for (int c = 0; c < kSpan + K - 1; ++c) {
    const float value = to_float(row[c * kChannels]);
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const int column = c - j;
        if (column < 0 || column >= kSpan) continue;
        float& sum = sums[(newest + K - i) % K][column];
        sum = value * taps[i][j] + (i == 0 && j == 0 ? start : sum);
      }
  }
}

// FAST promises whole spans, aligned pixels and no noise. STATISTICS chooses among the fast kernels; the
// general one finds out at run time.
template <typename T, int K, bool FAST, bool STATISTICS>
__global__ void __launch_bounds__(kThreads, FAST ? 2 : 1)
    depthwise_conv_kernel(Tensors<T> tensors, DepthwiseSize size, bool flipped) {
  constexpr int kRadius = K / 2, kColumns = kTileWidth + K - 1;  // of a row with its halo
  constexpr int kRow = kColumns * kChannels;
  float* staged_taps = reinterpret_cast<float*>(shared_memory());
  T* staged_rows = reinterpret_cast<T*>(staged_taps + kChannels * K * K);

  const int first_channel = blockIdx.x % size.groups * kChannels;
  const Tile tile = find_tile(size, blockIdx.x / size.groups);
  const int steps = tile.rows + K - 1;
  RowReader<T, kColumns, FAST> rows(tensors.x, size, tile, tile.first_row - kRadius,
                                       tile.first_row + tile.rows + kRadius, tile.first_column - kRadius,
                                       first_channel);
#pragma unroll 1
  for (int step = 0; step < kStages<K> - 1; ++step) {
    rows.next(staged_rows + step * kRow, size);
    commit_copies();
  }

  float taps[K][K];
  load_taps<K>(tensors.weight, staged_taps, first_channel, size.channels, flipped, taps);

  const int span = threadIdx.x / kChannels, lane = threadIdx.x % kChannels;
  const int column = tile.first_column + span * kSpan, channel = first_channel + lane;
  // Columns of this thread; may be negative.
  const int valid = channel < size.channels ? min(kSpan, size.width - column) : 0;
  const float start = tensors.bias != nullptr && valid > 0 ? tensors.bias[channel] : 0.0f;
  const int64_t pixels = int64_t{size.height} * size.width;
  const int64_t first_pixel = int64_t{tile.first_row} * size.width + column;
  T* out = tensors.out + (tile.image * pixels + first_pixel) * size.channels + channel;
  Moments moments;

  const T* own_row = staged_rows + span * (kSpan * kChannels) + lane;
  float sums[K][kSpan];
#pragma unroll 1
  for (int base = 0; base < steps; base += kStages<K>) {
#pragma unroll
    for (int phase = 0; phase < kStages<K>; ++phase) {
      if (base + phase >= steps) break;
      wait_for_copies<kStages<K> - 2>();
      __syncthreads();  // the row is there for all, and all are done with the one whose place is taken
      rows.next(staged_rows + (phase + kStages<K> - 1) % kStages<K> * kRow, size);
      commit_copies();
      add_row<K>(own_row + phase * kRow, taps, start, phase, sums);
      if (base == 0 && phase < K - 1) continue;  // the oldest row belongs to the strip above

      const float(&done)[kSpan] = sums[(phase + 1) % K];
      const bool first = phase == K - 1 && base == 0;
      if (FAST) {
        if (valid > 0) {
#pragma unroll
          for (int c = 0; c < kSpan; ++c) {
            const T rounded = from_float<T>(done[c]);
            out[static_cast<unsigned>(c * size.channels)] = rounded;
            if (STATISTICS) moments.add(to_float(rounded), first && c == 0);
          }
        }
      } else {
#pragma unroll
        for (int c = 0; c < kSpan; ++c) {
          if (c >= valid) break;
          float value = done[c];
          if (tensors.noise != nullptr) {
            value += tensors.noise[first_pixel + int64_t{base + phase - (K - 1)} * size.width + c];
          }
          const T rounded = from_float<T>(value);
          out[static_cast<unsigned>(c * size.channels)] = rounded;
          moments.add(to_float(rounded), first && c == 0);
        }
      }
      out += int64_t{size.width} * size.channels;
    }
  }
  wait_for_copies<0>();  // of rows of zeros below the last one

  if ((FAST ? STATISTICS : tensors.partials != nullptr) && valid > 0) {
    // Every span of a strip is a tile of its own for the statistics.
    const int spans = (size.width + kSpan - 1) / kSpan;
    const int64_t own = int64_t{tile.strip} * spans + column / kSpan;
    const float count = static_cast<float>(valid) * static_cast<float>(tile.rows);
    const int64_t tiles = int64_t{size.tiles_y} * spans;
    float* partials = tensors.partials + (tile.image * tiles + own) * 2 * size.channels + channel;
    partials[0] = moments.mean(count);
    partials[size.channels] = moments.deviations(count);
    if (tile.image == 0 && channel == 0) tensors.counts[own] = count;
  }
}

template <typename T, int K>
void choose_kernel(const Tensors<T>& tensors, const DepthwiseSize& size, bool flipped, uintptr_t stream) {
  const size_t shared = kChannels * (K * K * sizeof(float) + kStages<K> * (kTileWidth + K - 1) * sizeof(T));
  const auto run = [&](auto kernel) {
    launch_with_shared(kernel, dim3(static_cast<unsigned>(count_blocks(size))), dim3(kThreads),
                       shared, stream, tensors, size, flipped);
  };
  const bool fast = size.aligned && size.width % kSpan == 0 && tensors.noise == nullptr;
  if (!fast) {
    run(depthwise_conv_kernel<T, K, false, true>);
  } else if (tensors.partials != nullptr) {
    run(depthwise_conv_kernel<T, K, true, true>);
  } else {
    run(depthwise_conv_kernel<T, K, true, false>);
  }
}

}  // namespace

void depthwise_conv_cuda(const DepthwiseTensors& tensors, const std::string& dtype, int64_t batch,
                         int64_t height, int64_t width, int64_t channels, int kernel_size, bool flipped,
                         int strip_rows, int device, uintptr_t stream) {
  DepthwiseSize size = check_depthwise(batch, height, width, channels, kernel_size, strip_rows);
  check((tensors.partials == 0) == (tensors.counts == 0), "partials and counts are given together");
  DeviceGuard guard(device);
  choose_depthwise(dtype, kernel_size, [&](auto element, auto k) {
    using T = decltype(element);
    constexpr int K = decltype(k)::value;
    if (batch == 0) return;
    size.aligned = is_aligned(tensors.x, kVectorBytes) && channels * sizeof(T) % kVectorBytes == 0;
    const Tensors<T> typed = {reinterpret_cast<const T*>(tensors.x),
                              reinterpret_cast<const float*>(tensors.weight),
                              reinterpret_cast<const float*>(tensors.bias),
                              reinterpret_cast<const float*>(tensors.noise),
                              reinterpret_cast<T*>(tensors.out),
                              reinterpret_cast<float*>(tensors.partials),
                              reinterpret_cast<float*>(tensors.counts)};
    choose_kernel<T, K>(typed, size, flipped, stream);
  });
}

}  // namespace vfmvae
