// ssim on the CPU: the same two passes as ssim.cu, written as loops over rows.
//
// A plane is cut into strips of rows. A walk down a strip blurs one row of pixels across into a ring of rows
// that stays in the cache, blurs the ring down into the means of one row of positions, and takes the index
// from them. The gradient walks over the maps in the same way. A strip's sum does not depend on the number of
// threads, and strips are added up in order.
#include "../ssim.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "../ops.h"
#include "parallel.h"
#include "simd.h"

namespace vfmvae {
namespace {

constexpr int kStripRows = 64;
constexpr int kMostLanes = 16;

constexpr float kTaps[kSsimWindow] = {ssim_tap(0), ssim_tap(1), ssim_tap(2), ssim_tap(3),
                                      ssim_tap(4), ssim_tap(5), ssim_tap(6), ssim_tap(7),
                                      ssim_tap(8), ssim_tap(9), ssim_tap(10)};

// Rows of M numbers per position in a ring as long as the window, and what is blurred into the next of them.
template <int M>
class Ring {
 public:
  explicit Ring(int64_t width) {
    const int64_t padded = (width + kMostLanes - 1) / kMostLanes * kMostLanes;
    memory_.resize(padded * M * kSsimWindow);
    float* next = memory_.data();
    for (auto& row : rows_)
      for (float*& line : row) line = std::exchange(next, next + padded);
  }
  float* const* row(int64_t number) const { return rows_[number % kSsimWindow]; }
  // The window that ends with row `last`, from the top: where each of its M * 11 lines begins.
  void window(int64_t last, const float* (&lines)[kSsimWindow][M]) const {
    for (int t = 0; t < kSsimWindow; ++t)
      for (int m = 0; m < M; ++m) lines[t][m] = row(last + 1 + t)[m];
  }

 private:
  std::vector<float> memory_;
  float* rows_[kSsimWindow][M];
};

// A line that loops may read kMostLanes beyond its end and the window: zeros stand there.
std::vector<float> padded_line(int64_t width) {
  return std::vector<float>(width + 2 * kSsimHalo + kMostLanes, 0.0f);
}

struct StatisticsAcross {
  template <int LANES>
  static VFMVAE_INLINE void run(const float* a, const float* b, int64_t n, float* const* rows) {
    for (int64_t x = 0; x < n; x += LANES) {
      Floats<LANES> sums[kSsimMeans] = {};
#pragma GCC unroll 11
      for (int t = 0; t < kSsimWindow; ++t) {
        Floats<LANES> of_a, of_b;
        load<LANES>(a + x + t, &of_a);
        load<LANES>(b + x + t, &of_b);
        const Floats<LANES> difference = of_a - of_b;
        sums[kMeanA] += kTaps[t] * of_a;
        sums[kMeanD] += kTaps[t] * difference;
        sums[kMeanDD] += kTaps[t] * (difference * difference);
        sums[kMeanSquares] += kTaps[t] * (of_a * of_a + of_b * of_b);
      }
#pragma GCC unroll 4
      for (int m = 0; m < kSsimMeans; ++m) store<LANES>(sums[m], rows[m] + x);
    }
  }
};

struct MapsAcross {
  template <int LANES>
  static VFMVAE_INLINE void run(const float* const* lines, int64_t n, float* const* rows) {
    for (int64_t x = 0; x < n; x += LANES) {
      Floats<LANES> sums[3] = {};
#pragma GCC unroll 11
      for (int t = 0; t < kSsimWindow; ++t) {
#pragma GCC unroll 3
        for (int m = 0; m < 3; ++m) {
          Floats<LANES> value;
          load<LANES>(lines[m] + x + t, &value);
          sums[m] += kTaps[t] * value;
        }
      }
#pragma GCC unroll 3
      for (int m = 0; m < 3; ++m) store<LANES>(sums[m], rows[m] + x);
    }
  }
};

template <int LANES, int M>
VFMVAE_INLINE void blur_down(const float* const (&lines)[kSsimWindow][M], int64_t x,
                             Floats<LANES> (&sums)[M]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) sums[m] = Floats<LANES>{};
#pragma GCC unroll 11
  for (int t = 0; t < kSsimWindow; ++t) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Floats<LANES> value;
      load<LANES>(lines[t][m] + x, &value);
      sums[m] += kTaps[t] * value;
    }
  }
}

// Rows of the maps; all but the first two may be null, and all of them.
struct MapRows {
  float *p, *q, *m_a, *m_b;
};

struct IndexDown {
  template <int LANES>
  static VFMVAE_INLINE void run(const float* const (&lines)[kSsimWindow][kSsimMeans], int64_t n,
                                float shift_a, float shift_d, const SsimConstants& constants,
                                const MapRows& maps, double* sum) {
    Floats<LANES> total = {};
    for (int64_t x = 0; x < n; x += LANES) {
      const int64_t count = n - x < LANES ? n - x : LANES;
      Floats<LANES> means[kSsimMeans];
      blur_down<LANES, kSsimMeans>(lines, x, means);
      SsimPoint<Floats<LANES>> point;
      point.compute(means, shift_a, shift_d, constants);
      if (count < LANES) {  // what lies behind the last position counts for nothing
        Floats<LANES> kept = {};
        for (int64_t i = 0; i < count; ++i) kept[i] = point.index[i];
        point.index = kept;
      }
      total += point.index;
      if (maps.p == nullptr) continue;
      put<LANES>(point.p, count, maps.p + x);
      put<LANES>(point.q, count, maps.q + x);
      if (maps.m_a != nullptr) put<LANES>(point.m_a, count, maps.m_a + x);
      if (maps.m_b != nullptr) put<LANES>(point.m_b, count, maps.m_b + x);
    }
    for (int i = 0; i < LANES; ++i) *sum += total[i];
  }

 private:
  template <int LANES>
  static VFMVAE_INLINE void put(const Floats<LANES>& value, int64_t count, float* target) {
    if (count == LANES) {
      store<LANES>(value, target);
    } else {
      store_some<LANES>(value, count, target);
    }
  }
};

// out may be written kMostLanes beyond n.
struct GradientDown {
  template <int LANES>
  static VFMVAE_INLINE void run(const float* const (&lines)[kSsimWindow][3], const float* image,
                                const float* other, float factor, int64_t n, float* out) {
    for (int64_t x = 0; x < n; x += LANES) {
      Floats<LANES> sums[3], own, others;
      blur_down<LANES, 3>(lines, x, sums);
      load<LANES>(image + x, &own);
      load<LANES>(other + x, &others);
      const Floats<LANES> gradient = sums[0] + 2.0f * (own * sums[1] + (own - others) * sums[2]);
      store<LANES>(factor * gradient, out + x);
    }
  }
};

template <typename T>
struct Image {
  T* data;
  ImageStrides strides;

  T* row(const SsimSize& size, int64_t plane, int64_t y) const {
    const int64_t sample = plane / size.channels;
    return data + sample * strides[0] + (plane - sample * size.channels) * strides[1] + y * strides[2];
  }
};

float widened(float value) { return value; }
float widened(BFloat16 value) { return to_float(value); }
void narrowed(float value, float* target) { *target = value; }
void narrowed(float value, BFloat16* target) { *target = to_bfloat16(value); }

void copy_dense(const float* source, int64_t n, float* target) { std::copy_n(source, n, target); }
void copy_dense(const BFloat16* source, int64_t n, float* target) { widen(source, target, n); }
void copy_dense(const float* source, int64_t n, BFloat16* target) { narrow(source, target, n); }

template <typename T>
void read_row(const Image<const T>& image, const SsimSize& size, int64_t plane, int64_t y, float* line) {
  const T* source = image.row(size, plane, y);
  const int64_t step = image.strides[3];
  if (step == 1) return copy_dense(source, size.width, line);
  for (int x = 0; x < size.width; ++x) line[x] = widened(source[x * step]);
}

// The average of a diagonal of the pixels in rows [first, end).
template <typename T>
float shift_of_rows(const Image<const T>& image, const SsimSize& size, int64_t plane, int64_t first,
                    int64_t end) {
  double sum = 0.0;
  for (int64_t i = 0; i < kShiftPixels; ++i) {
    const T* row = image.row(size, plane, first + i * (end - first) / kShiftPixels);
    sum += widened(row[i * size.width / kShiftPixels * image.strides[3]]);
  }
  return static_cast<float>(sum / kShiftPixels);
}

void subtract(float shift, std::vector<float>* line, int64_t n) {
  for (int64_t x = 0; x < n; ++x) (*line)[x] -= shift;
}

template <typename T>
void write_row(const float* line, const Image<T>& image, const SsimSize& size, int64_t plane, int64_t y) {
  T* target = image.row(size, plane, y);
  const int64_t step = image.strides[3];
  if (step == 1) return copy_dense(line, size.width, target);
  for (int x = 0; x < size.width; ++x) narrowed(line[x], target + x * step);
}

int64_t count_strips(int64_t rows) { return (rows + kStripRows - 1) / kStripRows; }

// Calls walk(item, plane, first row, end row) for the strips of all planes; `rows` per plane.
template <typename Walk>
void for_strips(const SsimSize& size, int64_t rows, int threads, const Walk& walk) {
  const int64_t strips = count_strips(rows);
  parallel_for(size.planes() * strips, threads, [&](int64_t item, int) {
    const int64_t plane = item / strips, first = (item - plane * strips) * kStripRows;
    walk(item, plane, first, std::min(first + kStripRows, rows));
  });
}

template <typename T>
void run_forward(const SsimTensors& tensors, const ImageStrides& a_strides, const ImageStrides& b_strides,
                 const SsimSize& size, const SsimConstants& constants, int threads) {
  const Image<const T> a{reinterpret_cast<const T*>(tensors.a), a_strides};
  const Image<const T> b{reinterpret_cast<const T*>(tensors.b), b_strides};
  const int64_t strips = count_strips(size.valid_height()), width = size.valid_width();
  std::vector<double> sums(size.planes() * strips, 0.0);
  for_strips(
      size, size.valid_height(), threads, [&](int64_t item, int64_t plane, int64_t first, int64_t end) {
        Ring<kSsimMeans> ring(width);
        std::vector<float> line_a = padded_line(size.width), line_b = padded_line(size.width);
        const float shift_a = shift_of_rows(a, size, plane, first, end + kSsimHalo);
        const float shift_b = shift_of_rows(b, size, plane, first, end + kSsimHalo);
        const float* lines[kSsimWindow][kSsimMeans];
        for (int64_t y = first; y < end + kSsimHalo; ++y) {
          read_row(a, size, plane, y, line_a.data());
          read_row(b, size, plane, y, line_b.data());
          subtract(shift_a, &line_a, size.width);
          subtract(shift_b, &line_b, size.width);
          for_best_isa<StatisticsAcross>(line_a.data(), line_b.data(), width, ring.row(y));
          const int64_t position = y - kSsimHalo;
          if (position < first) continue;
          const int64_t place = (plane * size.valid_height() + position) * width;
          const auto row_of = [&](uintptr_t map) {
            return map ? reinterpret_cast<float*>(map) + place : nullptr;
          };
          const MapRows maps{row_of(tensors.map_p), row_of(tensors.map_q), row_of(tensors.map_a),
                             row_of(tensors.map_b)};
          ring.window(y, lines);
          for_best_isa<IndexDown>(lines, width, shift_a, shift_a - shift_b, constants, maps, &sums[item]);
        }
      });
  const int64_t of_sample = size.channels * strips;
  for (int64_t sample = 0; sample < size.batch; ++sample) {
    double sum = 0.0;
    for (int64_t i = 0; i < of_sample; ++i) sum += sums[sample * of_sample + i];
    reinterpret_cast<float*>(tensors.out)[sample] = static_cast<float>(sum / size.positions());
  }
}

template <typename T>
void run_gradient(const SsimGradient& tensors, const ImageStrides& image_strides,
                  const ImageStrides& other_strides, const ImageStrides& out_strides, const SsimSize& size,
                  int threads) {
  const Image<const T> image{reinterpret_cast<const T*>(tensors.image), image_strides};
  const Image<const T> other{reinterpret_cast<const T*>(tensors.other), other_strides};
  const Image<T> out{reinterpret_cast<T*>(tensors.out), out_strides};
  const float* grad = reinterpret_cast<const float*>(tensors.grad);
  const uintptr_t maps[3] = {tensors.map, tensors.map_p, tensors.map_q};
  const int64_t width = size.valid_width();
  for_strips(size, size.height, threads, [&](int64_t, int64_t plane, int64_t first, int64_t end) {
    Ring<3> ring(size.width);
    std::vector<float> of_maps[3], line = padded_line(size.width), line_of_other = line, result = line;
    const float* sources[3];
    for (int m = 0; m < 3; ++m) {
      of_maps[m] = padded_line(size.width);
      sources[m] = of_maps[m].data();
    }
    const float factor = static_cast<float>(grad[plane / size.channels] / size.positions());
    const float* lines[kSsimWindow][3];
    for (int64_t y = first - kSsimHalo; y < end;
         ++y) {  // the row of positions whose windows begin at pixel y
      const bool inside = 0 <= y && y < size.valid_height();
      for (int m = 0; m < 3; ++m) {
        float* target = of_maps[m].data() + kSsimHalo;
        if (inside) {
          std::copy_n(reinterpret_cast<const float*>(maps[m]) + (plane * size.valid_height() + y) * width,
                      width, target);
        } else {
          std::fill_n(target, width, 0.0f);
        }
      }
      for_best_isa<MapsAcross>(static_cast<const float* const*>(sources), int64_t{size.width},
                               ring.row(y + kSsimHalo));
      if (y < first) continue;
      read_row(image, size, plane, y, line.data());
      read_row(other, size, plane, y, line_of_other.data());
      ring.window(y + kSsimHalo, lines);
      for_best_isa<GradientDown>(lines, static_cast<const float*>(line.data()),
                                 static_cast<const float*>(line_of_other.data()), factor, int64_t{size.width},
                                 result.data());
      write_row(result.data(), out, size, plane, y);
    }
  });
}

void check_cpu(DType type, int threads) {
  check_at_least("threads", threads, 1);
  check(type != DType::kFloat16, "ssim on the CPU takes float32 and bfloat16, not float16");
}

}  // namespace

void ssim_cpu(const SsimTensors& tensors, const ImageStrides& a_strides, const ImageStrides& b_strides,
              const std::string& dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
              double data_range, int threads) {
  const SsimSize size = check_ssim(batch, channels, height, width);
  const DType type = parse_dtype(dtype);
  check_cpu(type, threads);
  if (type == DType::kFloat32) {
    run_forward<float>(tensors, a_strides, b_strides, size, ssim_constants(data_range), threads);
  } else {
    run_forward<BFloat16>(tensors, a_strides, b_strides, size, ssim_constants(data_range), threads);
  }
}

void ssim_gradient_cpu(const SsimGradient& tensors, const ImageStrides& image_strides,
                       const ImageStrides& other_strides, const ImageStrides& out_strides,
                       const std::string& dtype, int64_t batch, int64_t channels, int64_t height,
                       int64_t width, int threads) {
  const SsimSize size = check_ssim(batch, channels, height, width);
  const DType type = parse_dtype(dtype);
  check_cpu(type, threads);
  if (type == DType::kFloat32) {
    run_gradient<float>(tensors, image_strides, other_strides, out_strides, size, threads);
  } else {
    run_gradient<BFloat16>(tensors, image_strides, other_strides, out_strides, size, threads);
  }
}

}  // namespace vfmvae
