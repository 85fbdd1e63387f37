// Weight and bias gradient of a depthwise K x K convolution with zero padding, stride 1, on the CPU.
//
//     out[i * K + j][c] = sum over b, h, w of x[b, h + i - R, w + j - R, c] * grad[b, h, w, c]     R = K / 2
//     out[K * K][c]     = sum over b, h, w of grad[b, h, w, c]
//
// Sixteen channels are a vector. Along one row of grad and for one row of the window, K sums stay in
// registers. The rows are cut into bands whose sums are added in order, so that the number of threads does
// not show in the result.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "parallel.h"
#include "spans.h"

namespace vfmvae {
namespace {

constexpr int kLanes = 16;
constexpr int kLargestKernel = 7;
constexpr int64_t kBandRows = 16;                // at least, so that a band's sums are little beside its work
constexpr int64_t kMostBands = 32;               // the sums of all bands lie in memory at once
constexpr int64_t kProductsPerThread = 1 << 21;  // below this, starting a thread costs more than it brings

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define VFMVAE_INLINE inline __attribute__((always_inline))

struct Row {
  int64_t width, stride;  // pixels, and elements from one to the next
  int channels;           // 1 to kLanes of them
};

VFMVAE_INLINE void widened(const float* source, Lanes* result) { std::memcpy(result, source, sizeof(Lanes)); }
VFMVAE_INLINE void widened(const BFloat16* source, Lanes* result) {
  Halves halves;
  std::memcpy(&halves, source, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  std::memcpy(result, &words, sizeof(words));
}

// Channels beyond the last one are zero.
template <bool WHOLE, typename T>
VFMVAE_INLINE void load(const T* source, int channels, Lanes* result) {
  if (WHOLE) {
    widened(source, result);
  } else {
    T padded[kLanes] = {};
    std::memcpy(padded, source, channels * sizeof(T));
    widened(padded, result);
  }
}

template <int K, bool WHOLE, bool INSIDE, typename T>
VFMVAE_INLINE void add_pixel(const T* x, const T* grad, const Row& row, int64_t pixel, Lanes* sums) {
  Lanes g, neighbour;
  load<WHOLE>(grad + pixel * row.stride, row.channels, &g);
#pragma GCC unroll 7
  for (int j = 0; j < K; ++j) {
    const int64_t source = pixel + j - K / 2;
    if (INSIDE || (source >= 0 && source < row.width)) {
      load<WHOLE>(x + source * row.stride, row.channels, &neighbour);
      sums[j] += neighbour * g;
    }
  }
}

// sums[j] += sum over w of x[w + j - R] * grad[w].
template <int K, bool WHOLE, typename T>
VFMVAE_INLINE void correlate(const T* x, const T* grad, const Row& row, Lanes* sums) {
  Lanes held[K] = {};
  const int64_t left = std::min<int64_t>(K / 2, row.width);
  const int64_t right = std::max(left, row.width - K / 2);
  for (int64_t w = 0; w < left; ++w) add_pixel<K, WHOLE, false>(x, grad, row, w, held);
  for (int64_t w = left; w < right; ++w) add_pixel<K, WHOLE, true>(x, grad, row, w, held);
  for (int64_t w = right; w < row.width; ++w) add_pixel<K, WHOLE, false>(x, grad, row, w, held);
  for (int j = 0; j < K; ++j) sums[j] += held[j];
}

template <int K, typename T>
VFMVAE_INLINE void correlate_channels(const T* x, const T* grad, const Row& row, Lanes* sums) {
  if (row.channels == kLanes) {
    correlate<K, true>(x, grad, row, sums);
  } else {
    correlate<K, false>(x, grad, row, sums);
  }
}

template <typename T>
VFMVAE_INLINE void correlate_kernel(const T* x, const T* grad, const Row& row, int kernel, Lanes* sums) {
  if (kernel == 3) correlate_channels<3>(x, grad, row, sums);
  if (kernel == 5) correlate_channels<5>(x, grad, row, sums);
  if (kernel == 7) correlate_channels<7>(x, grad, row, sums);
}

template <typename T>
VFMVAE_INLINE void add_row(const T* grad, const Row& row, Lanes* sum) {
  Lanes g, held = {};
  for (int64_t w = 0; w < row.width; ++w) {
    load<false>(grad + w * row.stride, row.channels, &g);
    held += g;
  }
  *sum += held;  // row by row loses fewer digits than pixel by pixel
}

VFMVAE_EVERY_ISA static void correlate_row(const float* x, const float* grad, const Row& row, int kernel,
                                           Lanes* sums) {
  correlate_kernel(x, grad, row, kernel, sums);
}
VFMVAE_EVERY_ISA static void correlate_row(const BFloat16* x, const BFloat16* grad, const Row& row,
                                           int kernel, Lanes* sums) {
  correlate_kernel(x, grad, row, kernel, sums);
}
VFMVAE_EVERY_ISA static void sum_row(const float* grad, const Row& row, Lanes* sum) {
  add_row(grad, row, sum);
}
VFMVAE_EVERY_ISA static void sum_row(const BFloat16* grad, const Row& row, Lanes* sum) {
  add_row(grad, row, sum);
}

struct Problem {
  int64_t batch, height, width, channels;
  int kernel;

  int64_t rows() const { return batch * height; }
  int64_t band_rows() const { return std::max(kBandRows, (rows() + kMostBands - 1) / kMostBands); }
  int64_t bands() const { return (rows() + band_rows() - 1) / band_rows(); }
  int64_t blocks() const { return (channels + kLanes - 1) / kLanes; }
  int sums() const { return kernel * kernel + 1; }
};

// The sums of one band and one block of channels, to target[sums][channels].
template <typename T>
void run_band(const T* x, const T* grad, const Problem& problem, int64_t band, int64_t block,
              float* target) noexcept {
  const int64_t first = block * kLanes;
  const Row row{problem.width, problem.channels,
                static_cast<int>(std::min<int64_t>(kLanes, problem.channels - first))};
  const int64_t line = problem.width * problem.channels;
  Lanes sums[kLargestKernel * kLargestKernel + 1] = {};
  const int64_t end = std::min((band + 1) * problem.band_rows(), problem.rows());
  for (int64_t r = band * problem.band_rows(); r < end; ++r) {
    const T* g = grad + r * line + first;
    for (int i = 0; i < problem.kernel; ++i) {
      const int64_t shift = i - problem.kernel / 2, source = r % problem.height + shift;
      if (source < 0 || source >= problem.height) continue;
      correlate_row(x + (r + shift) * line + first, g, row, problem.kernel, sums + i * problem.kernel);
    }
    sum_row(g, row, sums + problem.kernel * problem.kernel);
  }
  for (int s = 0; s < problem.sums(); ++s)
    std::memcpy(target + s * problem.channels + first, &sums[s], row.channels * sizeof(float));
}

template <typename T>
void run(uintptr_t x, uintptr_t grad, float* out, const Problem& problem, int threads) {
  const int64_t bands = problem.bands(), blocks = problem.blocks(), size = problem.sums() * problem.channels;
  std::vector<float> partial((bands - 1) * size);  // the first band's lie in `out`
  const auto place = [&](int64_t band) { return band ? partial.data() + (band - 1) * size : out; };
  const int64_t products = problem.rows() * problem.width * size;
  const int useful = static_cast<int>(std::clamp<int64_t>(products / kProductsPerThread, 1, threads));
  parallel_for(bands * blocks, useful, [&](int64_t item, int) {
    run_band(reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(grad), problem, item / blocks,
             item % blocks, place(item / blocks));
  });
  for (int64_t band = 1; band < bands; ++band) add_to(out, place(band), size);
}

}  // namespace

void depthwise_weight_gradient_cpu(uintptr_t x, uintptr_t grad, uintptr_t out, const std::string& dtype,
                                   int64_t batch, int64_t height, int64_t width, int64_t channels,
                                   int kernel_size, int threads) {
  check_at_least("batch", batch, 0);
  check_at_least("height", height, 1);
  check_at_least("width", width, 1);
  check_at_least("channels", channels, 1);
  check_at_least("threads", threads, 1);
  check(kernel_size == 3 || kernel_size == 5 || kernel_size == 7,
        "kernel_size " + std::to_string(kernel_size) + " is not one of 3, 5, 7");
  const DType type = parse_dtype(dtype);
  check(type != DType::kFloat16,
        "depthwise_weight_gradient on the CPU takes float32 and bfloat16, not float16");
  const Problem problem{batch, height, width, channels, kernel_size};
  float* target = reinterpret_cast<float*>(out);
  if (batch == 0) {
    std::fill_n(target, problem.sums() * channels, 0.0f);
  } else if (type == DType::kFloat32) {
    run<float>(x, grad, target, problem, threads);
  } else {
    run<BFloat16>(x, grad, target, problem, threads);
  }
}

}  // namespace vfmvae
