// upsample_blur on the CPU: the same separable gather as upsample_blur.cu, written as loops over long spans.
//
// The image is cut into tiles of rows and columns. A tile walks down its rows: one row of pixels is
// unshuffled into UP float rows, blurred horizontally into a ring of rows that stays in the cache, and the
// ring is blurred vertically into UP finished rows. With channels-last memory a shift by one pixel is a shift
// by C floats, so that every step is a weighted sum of up to five shifted spans.
#include "../upsample_blur.h"

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "../ops.h"
#include "parallel.h"
#include "spans.h"

namespace vfmvae {
namespace {

constexpr int64_t kTileFloats = 4096;          // of one blurred row: a ring of rows then lies in the L2 cache
constexpr int kTileRows = 32;                  // input rows per tile
constexpr int64_t kFloatsPerThread = 1 << 15;  // below this, starting a thread costs more than it brings

// The tiles of one call. Columns and rows count input pixels.
struct Tiling {
  int rows, columns;
  int64_t down, across;

  explicit Tiling(const UpsampleBlurSize& size, int upscale, int threads) {
    columns = static_cast<int>(
        std::clamp<int64_t>(kTileFloats / (int64_t{size.channels} * upscale), 8, std::max(8, size.width)));
    across = (size.width + columns - 1) / columns;
    const int64_t bands =
        std::max<int64_t>(1, (2 * threads + size.batch * across - 1) / (size.batch * across));
    rows = static_cast<int>(std::clamp<int64_t>(size.height / bands, 4, kTileRows));
    down = (size.height + rows - 1) / rows;
  }
  int64_t count(const UpsampleBlurSize& size) const { return size.batch * down * across; }
};

const float* as_floats(const float* source, float*, int64_t) { return source; }
const float* as_floats(const BFloat16* source, float* scratch, int64_t n) {
  widen(source, scratch, n);
  return scratch;
}

// Where a result of T can be computed in place (float), or else in scratch memory that `deliver` converts.
float* workplace(float* target, float*) { return target; }
float* workplace(BFloat16*, float* scratch) { return scratch; }
void deliver(const float*, float*, int64_t) {}
void deliver(const float* computed, BFloat16* target, int64_t n) { narrow(computed, target, n); }

// One worker's walk over tiles; owns the scratch rows.
template <typename T, int R, int UP, bool ADJOINT>
class TileWalk {
 public:
  TileWalk(const T* x, const T* residual, T* out, const UpsampleBlurSize& size, const Tiling& tiling)
      : x_(x), residual_(residual), out_(out), size_(size), tiling_(tiling) {
    channels_ = size.channels;
    fine_width_ = int64_t{size.width} * UP;
    fine_height_ = size.height * UP;
    row_floats_ = (int64_t{tiling.columns} * UP + 2 * kHalo * UP) * channels_;
    scratch_.resize(row_floats_ * (UP + kRing * UP + UP + UP * UP));
    float* next = scratch_.data();
    const auto take = [&](int64_t rows) { return std::exchange(next, next + rows * row_floats_); };
    for (float*& row : source_) row = take(1);
    for (float*& row : ring_) row = take(1);
    for (float*& row : sum_) row = take(1);
    converted_ = take(UP * UP);
  }

  void run(int64_t tile) noexcept {
    const int64_t image = tile / (tiling_.down * tiling_.across);
    const int within = static_cast<int>(tile % (tiling_.down * tiling_.across));
    const int first_row = within / static_cast<int>(tiling_.across) * tiling_.rows;
    const int end_row = std::min(first_row + tiling_.rows, size_.height);
    first_ = within % static_cast<int>(tiling_.across) * tiling_.columns;
    end_ = std::min(first_ + tiling_.columns, size_.width);
    for (int row = std::max(0, first_row - kHalo); row < end_row + kHalo; ++row) {
      if (row < size_.height) {
        read_row(image, row);
        for (int r = 0; r < UP; ++r) blur_across(source_[r], ring_row(row * UP + r));
      }
      if (row - kHalo >= first_row) write_row(image, row - kHalo);
    }
  }

 private:
  static constexpr int kHalo = (R + UP - 1) / UP;
  static constexpr int kRing = 2 * kHalo + 1;

  float* ring_row(int fine_row) const { return ring_[fine_row % (kRing * UP)]; }

  // Unshuffles the tile's pixels of one row, with kHalo more on both sides, into `source_`; zero outside of
  // the image.
  void read_row(int64_t image, int row) {
    const int from = std::max(first_ - kHalo, 0), to = std::min(end_ + kHalo, size_.width);
    const int64_t before = int64_t{from - (first_ - kHalo)} * UP * channels_;
    const int64_t inside = int64_t{to - from} * UP * channels_;
    const int64_t after = int64_t{end_ + kHalo - to} * UP * channels_;
    for (float* line : source_) {
      std::fill_n(line, before, 0.0f);
      std::fill_n(line + before + inside, after, 0.0f);
    }
    if (!ADJOINT && UP == 2) {
      const T* pixels = x_ + ((image * size_.height + row) * size_.width + from) * channels_ * 4;
      const float* quads = as_floats(pixels, converted_, inside * 2);
      for (int64_t i = 0; i < to - from; ++i) {
        float *upper = source_[0] + before + i * 2 * channels_,
              *lower = source_[UP - 1] + before + i * 2 * channels_;
        split_quads(quads + i * 4 * channels_, upper, upper + channels_, lower, lower + channels_, channels_);
      }
      return;
    }
    for (int r = 0; r < UP; ++r) {
      const T* pixels = x_ + plain_offset(image, row * UP + r, int64_t{from} * UP);
      const float* line = as_floats(pixels, converted_, inside);
      std::copy_n(line, inside, source_[r] + before);
    }
  }

  // One fine row [first - halo, end + halo) to the blurred columns [first, end).
  void blur_across(const float* line, float* blurred) const {
    const float* start = line + int64_t{kHalo} * UP * channels_;  // the first column that is kept
    const float* shifted[2 * R + 1];
    float weights[2 * R + 1];
    for (int t = -R; t <= R; ++t) {
      shifted[t + R] = start + t * channels_;
      weights[t + R] = binomial_tap<R>(t);
    }
    const int64_t first = int64_t{first_} * UP, end = int64_t{end_} * UP;
    weighted_sum(blurred, shifted, weights, 2 * R + 1, (end - first) * channels_);
    // Columns near the image's border have weights of their own.
    for (int64_t column = first; column < end; ++column) {
      if (column >= R && column + R < fine_width_) {
        column = std::max(column, std::min(end, fine_width_ - R) - 1);
        continue;
      }
      for (int t = -R; t <= R; ++t) {
        shifted[t + R] = start + (column - first + t) * channels_;
        weights[t + R] = line_weight<R, ADJOINT>(static_cast<int>(column), static_cast<int>(column) + t,
                                                 static_cast<int>(fine_width_));
      }
      weighted_sum(blurred + (column - first) * channels_, shifted, weights, 2 * R + 1, channels_);
    }
  }

  // Blurs the ring vertically around one fine row.
  void blur_down(int fine_row, float* target, int64_t n) const {
    const float* rows[2 * R + 1];
    float weights[2 * R + 1];
    int taps = 0;
    for (int source = std::max(0, fine_row - R); source <= std::min(fine_row + R, fine_height_ - 1);
         ++source) {
      rows[taps] = ring_row(source);
      weights[taps++] = line_weight<R, ADJOINT>(fine_row, source, fine_height_);
    }
    weighted_sum(target, rows, weights, taps, n);
  }

  void write_row(int64_t image, int row) {
    const int64_t n = int64_t{end_ - first_} * UP * channels_;
    if (ADJOINT && UP == 2) {
      for (int r = 0; r < UP; ++r) blur_down(row * UP + r, sum_[r], n);
      T* target = out_ + ((image * size_.height + row) * size_.width + first_) * channels_ * 4;
      float* quads = workplace(target, converted_);
      for (int64_t i = 0; i < end_ - first_; ++i) {
        const float *upper = sum_[0] + i * 2 * channels_, *lower = sum_[UP - 1] + i * 2 * channels_;
        join_quads(upper, upper + channels_, lower, lower + channels_, quads + i * 4 * channels_, channels_);
      }
      deliver(quads, target, n * 2);
      return;
    }
    for (int r = 0; r < UP; ++r) {
      const int64_t offset = plain_offset(image, row * UP + r, int64_t{first_} * UP);
      float* target = workplace(out_ + offset, sum_[r]);
      blur_down(row * UP + r, target, n);
      if (residual_ != nullptr) add_to(target, as_floats(residual_ + offset, converted_, n), n);
      deliver(target, out_ + offset, n);
    }
  }

  int64_t plain_offset(int64_t image, int64_t fine_row, int64_t fine_column) const {
    return ((image * fine_height_ + fine_row) * fine_width_ + fine_column) * channels_;
  }

  const T *x_, *residual_;
  T* out_;
  UpsampleBlurSize size_;
  Tiling tiling_;
  int64_t channels_, fine_width_, row_floats_;
  int fine_height_;
  int first_ = 0, end_ = 0;  // the tile's columns
  std::vector<float> scratch_;
  float *source_[UP], *ring_[kRing * UP], *sum_[UP], *converted_;
};

template <typename T, int R, int UP, bool ADJOINT>
void run_tiles(const T* x, const T* residual, T* out, const UpsampleBlurSize& size, int threads) {
  const Tiling tiling(size, UP, threads);
  const int64_t floats = size.batch * size.height * size.width * size.channels * UP * UP;
  const int64_t tiles = tiling.count(size);
  const int useful =
      static_cast<int>(std::min<int64_t>(tiles, std::clamp<int64_t>(floats / kFloatsPerThread, 1, threads)));
  std::vector<TileWalk<T, R, UP, ADJOINT>> walks;
  walks.reserve(useful);  // walks hold pointers into themselves
  for (int i = 0; i < useful; ++i) walks.emplace_back(x, residual, out, size, tiling);
  parallel_for(tiles, useful, [&](int64_t tile, int worker) { walks[worker].run(tile); });
}

template <typename T, int R, int UP>
void choose_direction(const T* x, const T* residual, T* out, const UpsampleBlurSize& size, bool adjoint,
                      int threads) {
  if (adjoint) {
    run_tiles<T, R, UP, true>(x, residual, out, size, threads);
  } else {
    run_tiles<T, R, UP, false>(x, residual, out, size, threads);
  }
}

template <typename T>
void choose_loops(uintptr_t x, uintptr_t residual, uintptr_t out, const UpsampleBlurSize& size,
                  int kernel_size, int upscale, bool adjoint, int threads) {
  const auto run = [&](auto radius, auto up) {
    choose_direction<T, decltype(radius)::value, decltype(up)::value>(
        reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(residual), reinterpret_cast<T*>(out), size,
        adjoint, threads);
  };
  using std::integral_constant;
  const auto choose_radius = [&](auto up) {
    if (kernel_size == 1) run(integral_constant<int, 0>{}, up);
    if (kernel_size == 3) run(integral_constant<int, 1>{}, up);
    if (kernel_size == 5) run(integral_constant<int, 2>{}, up);
  };
  if (upscale == 1) choose_radius(integral_constant<int, 1>{});
  if (upscale == 2) choose_radius(integral_constant<int, 2>{});
}

}  // namespace

void upsample_blur_cpu(uintptr_t x, uintptr_t residual, uintptr_t out, const std::string& dtype,
                       int64_t batch, int64_t height, int64_t width, int64_t channels, int kernel_size,
                       int upscale, bool adjoint, int threads) {
  const UpsampleBlurSize size =
      check_upsample_blur(residual, batch, height, width, channels, kernel_size, upscale, adjoint);
  check_at_least("threads", threads, 1);
  const DType type = parse_dtype(dtype);
  check(type != DType::kFloat16, "upsample_blur on the CPU takes float32 and bfloat16, not float16");
  if (batch == 0) return;
  if (type == DType::kFloat32) {
    choose_loops<float>(x, residual, out, size, kernel_size, upscale, adjoint, threads);
  } else {
    choose_loops<BFloat16>(x, residual, out, size, kernel_size, upscale, adjoint, threads);
  }
}

}  // namespace vfmvae
