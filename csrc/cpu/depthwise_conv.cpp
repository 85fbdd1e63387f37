// Weight and bias gradient of a depthwise K x K convolution with zero padding, stride 1, on the CPU.
//
//     out[i * K + j][c] = sum over b, h, w of x[b, h + i - R, w + j - R, c] * grad[b, h, w, c]     R = K / 2
//     out[K * K][c]     = sum over b, h, w of grad[b, h, w, c]
//
// LANES channels are a vector. Along one row of grad and for one row of the window, K sums stay in
// registers. The rows are cut into bands whose sums are added in order, so that the number of threads does
// not show in the result.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "parallel.h"
#include "simd.h"

namespace vfmvae {
namespace {

constexpr int64_t kBandRows = 16;                // at least, so that a band's sums are little beside its work
constexpr int64_t kMostBands = 32;               // the sums of all bands lie in memory at once
constexpr int64_t kProductsPerThread = 1 << 21;  // below this, starting a thread costs more than it brings

struct Row {
  int64_t width, stride;  // pixels, and elements from one to the next
  int64_t channels;       // 1 to LANES of them
};

// Channels beyond the last one are zero.
template <int LANES, bool WHOLE, typename T>
VFMVAE_INLINE void load_pixel(const T* source, const Row& row, int64_t pixel, Floats<LANES>* result) {
  if (WHOLE) {
    load<LANES>(source + pixel * row.stride, result);
  } else {
    load_some<LANES>(source + pixel * row.stride, row.channels, result);
  }
}

template <int LANES, int K, bool WHOLE, bool INSIDE, typename T>
VFMVAE_INLINE void add_pixel(const T* x, const T* grad, const Row& row, int64_t pixel, Floats<LANES>* sums) {
  Floats<LANES> g, neighbour;
  load_pixel<LANES, WHOLE>(grad, row, pixel, &g);
#pragma GCC unroll 7
  for (int j = 0; j < K; ++j) {
    const int64_t source = pixel + j - K / 2;
    if (INSIDE || (source >= 0 && source < row.width)) {
      load_pixel<LANES, WHOLE>(x, row, source, &neighbour);
      sums[j] += neighbour * g;
    }
  }
}

// sums[j] += sum over w of x[w + j - R] * grad[w].
template <int LANES, int K, bool WHOLE, typename T>
VFMVAE_INLINE void correlate(const T* x, const T* grad, const Row& row, Floats<LANES>* sums) {
  Floats<LANES> held[K] = {};
  const int64_t left = std::min<int64_t>(K / 2, row.width);
  const int64_t right = std::max(left, row.width - K / 2);
  for (int64_t w = 0; w < left; ++w) add_pixel<LANES, K, WHOLE, false>(x, grad, row, w, held);
  for (int64_t w = left; w < right; ++w) add_pixel<LANES, K, WHOLE, true>(x, grad, row, w, held);
  for (int64_t w = right; w < row.width; ++w) add_pixel<LANES, K, WHOLE, false>(x, grad, row, w, held);
  for (int j = 0; j < K; ++j) sums[j] += held[j];
}

template <int LANES, bool WHOLE, typename T>
VFMVAE_INLINE void add_row(const T* grad, const Row& row, Floats<LANES>* sum) {
  Floats<LANES> g, held = {};
  for (int64_t w = 0; w < row.width; ++w) {
    load_pixel<LANES, WHOLE>(grad, row, w, &g);
    held += g;
  }
  *sum += held;  // row by row loses fewer digits than pixel by pixel
}

struct Problem {
  int64_t batch, height, width, channels;
  int kernel;

  int64_t rows() const { return batch * height; }
  int64_t band_rows() const { return std::max(kBandRows, (rows() + kMostBands - 1) / kMostBands); }
  int64_t bands() const { return (rows() + band_rows() - 1) / band_rows(); }
  int64_t blocks(int lanes) const { return (channels + lanes - 1) / lanes; }
  int sums() const { return kernel * kernel + 1; }
};

// The sums of one band and one block of LANES channels, to target[sums][channels].
template <typename T>
struct BandLoop {
  template <int LANES>
  static VFMVAE_INLINE void run(const T* x, const T* grad, const Problem& problem, int64_t band, int64_t block,
                                float* target) {
    const int64_t channels = std::min<int64_t>(LANES, problem.channels - block * LANES);
    const Row row{problem.width, problem.channels, channels};
    if (channels < LANES) {
      run_kernel<LANES, false>(x, grad, problem, row, band, block * LANES, target);
    } else {
      run_kernel<LANES, true>(x, grad, problem, row, band, block * LANES, target);
    }
  }

 private:
  template <int LANES, bool WHOLE>
  static VFMVAE_INLINE void run_kernel(const T* x, const T* grad, const Problem& problem, const Row& row,
                                       int64_t band, int64_t first, float* target) {
    if (problem.kernel == 3) run_rows<LANES, 3, WHOLE>(x, grad, problem, row, band, first, target);
    if (problem.kernel == 5) run_rows<LANES, 5, WHOLE>(x, grad, problem, row, band, first, target);
    if (problem.kernel == 7) run_rows<LANES, 7, WHOLE>(x, grad, problem, row, band, first, target);
  }

  template <int LANES, int K, bool WHOLE>
  static VFMVAE_INLINE void run_rows(const T* x, const T* grad, const Problem& problem, const Row& row,
                                     int64_t band, int64_t first, float* target) {
    const int64_t line = problem.width * problem.channels;
    Floats<LANES> sums[K * K + 1] = {};
    const int64_t end = std::min((band + 1) * problem.band_rows(), problem.rows());
    for (int64_t r = band * problem.band_rows(); r < end; ++r) {
      const T* g = grad + r * line + first;
      for (int i = 0; i < K; ++i) {
        const int64_t shift = i - K / 2, source = r % problem.height + shift;
        if (source < 0 || source >= problem.height) continue;
        correlate<LANES, K, WHOLE>(x + (r + shift) * line + first, g, row, sums + i * K);
      }
      add_row<LANES, WHOLE>(g, row, sums + K * K);
    }
    for (int s = 0; s < K * K + 1; ++s)
      store_some<LANES>(sums[s], row.channels, target + s * problem.channels + first);
  }
};

template <typename T>
void run(uintptr_t x, uintptr_t grad, float* out, const Problem& problem, int threads) {
  const int64_t bands = problem.bands(), blocks = problem.blocks(best_lanes());
  const int64_t size = problem.sums() * problem.channels;
  std::vector<float> partial((bands - 1) * size);  // the first band's lie in `out`
  const auto place = [&](int64_t band) { return band ? partial.data() + (band - 1) * size : out; };
  const int64_t products = problem.rows() * problem.width * size;
  const int useful = static_cast<int>(std::clamp<int64_t>(products / kProductsPerThread, 1, threads));
  parallel_for(bands * blocks, useful, [&](int64_t item, int) {
    for_best_isa<BandLoop<T>>(reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(grad), problem,
                              item / blocks, item % blocks, place(item / blocks));
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
