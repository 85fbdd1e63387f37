// The distance of two feature maps on the CPU, and its gradient: kernels/lpips.py as loops over rows.
//
// A row holds the channels of one position and lies in the first cache while it is read two or three times.
// Rows are shared among threads in runs whose sums are added up in order. Compiled without contraction to
// multiply-adds (CMakeLists.txt): equal vectors then have a distance of exactly 0.
#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "parallel.h"
#include "simd.h"

namespace vfmvae {
namespace {

constexpr int64_t kRunElements = 1 << 15;  // of one map
constexpr float kEpsilon = 1e-10f;

// Calls body(channel, count) for the channels, LANES at a time; the last count may be less.
template <int LANES, typename Body>
VFMVAE_INLINE void for_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) body(c, int64_t{LANES});
  if (c < channels) body(c, channels - c);
}

template <int LANES, typename T>
VFMVAE_INLINE void get(const T* source, int64_t count, Floats<LANES>* result) {
  if (count == LANES) {
    load<LANES>(source, result);
  } else {
    load_some<LANES>(source, count, result);
  }
}

template <int LANES>
VFMVAE_INLINE float total(const Floats<LANES>& value) {
  float sum = 0.0f;
  for (int i = 0; i < LANES; ++i) sum += value[i];
  return sum;
}

// 1 / |x| and 1 / (|x| + 1e-10); both 0 for zeros alone.
struct InverseLength {
  float exact, offset;
  VFMVAE_INLINE explicit InverseLength(float squares) {
    const float length = std::sqrt(squares);
    exact = length == 0.0f ? 0.0f : 1.0f / length;
    offset = length == 0.0f ? 0.0f : 1.0f / (length + kEpsilon);
  }
};

template <int LANES, typename T>
VFMVAE_INLINE void squares_of(const T* a, const T* b, int64_t channels, float* of_a, float* of_b) {
  Floats<LANES> sum_a = {}, sum_b = {};
  for_channels<LANES>(channels, [&](int64_t c, int64_t count) VFMVAE_INLINE_BODY {
    Floats<LANES> x, y;
    get<LANES>(a + c, count, &x);
    get<LANES>(b + c, count, &y);
    sum_a += x * x;
    sum_b += y * y;
  });
  *of_a = total<LANES>(sum_a);
  *of_b = total<LANES>(sum_b);
}

template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

template <typename T>
struct Distance {
  template <int LANES>
  static VFMVAE_INLINE void run(const Rows<T>& a, const Rows<T>& b, const float* weights, int64_t rows,
                                int64_t channels, double* sum) {
    for (int64_t r = 0; r < rows; ++r) {
      const T *own = a.data + r * a.stride, *others = b.data + r * b.stride;
      float of_a, of_b;
      squares_of<LANES>(own, others, channels, &of_a, &of_b);
      const InverseLength scale_a(of_a), scale_b(of_b);
      Floats<LANES> distances = {};
      for_channels<LANES>(channels, [&](int64_t c, int64_t count) VFMVAE_INLINE_BODY {
        Floats<LANES> x, y, weight;
        get<LANES>(own + c, count, &x);
        get<LANES>(others + c, count, &y);
        get<LANES>(weights + c, count, &weight);
        const Floats<LANES> difference = x * scale_a.offset - y * scale_b.offset;
        distances += weight * (difference * difference);
      });
      *sum += total<LANES>(distances);
    }
  }
};

template <typename T>
struct Gradient {
  template <int LANES>
  static VFMVAE_INLINE void run(const Rows<T>& x, const Rows<T>& other, const float* weights, float factor,
                                int64_t rows, int64_t channels, T* out) {
    for (int64_t r = 0; r < rows; ++r) {
      const T *own = x.data + r * x.stride, *others = other.data + r * other.stride;
      float of_x, of_other;
      squares_of<LANES>(own, others, channels, &of_x, &of_other);
      const InverseLength scale(of_x), scale_other(of_other);
      const auto slope_at = [&](int64_t c, int64_t count, Floats<LANES>* value, Floats<LANES>* slope)
                                VFMVAE_INLINE_BODY {
                                  Floats<LANES> y, weight;
                                  get<LANES>(own + c, count, value);
                                  get<LANES>(others + c, count, &y);
                                  get<LANES>(weights + c, count, &weight);
                                  *slope = weight * (*value * scale.offset - y * scale_other.offset);
                                };
      Floats<LANES> products = {};
      for_channels<LANES>(channels, [&](int64_t c, int64_t count) VFMVAE_INLINE_BODY {
        Floats<LANES> value, slope;
        slope_at(c, count, &value, &slope);
        products += slope * (value * scale.offset);
      });
      const float along = total<LANES>(products) * scale.exact, outer = factor * scale.offset;
      for_channels<LANES>(channels, [&](int64_t c, int64_t count) VFMVAE_INLINE_BODY {
        Floats<LANES> value, slope;
        slope_at(c, count, &value, &slope);
        const Floats<LANES> gradient = outer * (slope - value * along);
        if (count == LANES) {
          store<LANES>(gradient, out + r * channels + c);
        } else {
          store_some<LANES>(gradient, count, out + r * channels + c);
        }
      });
    }
  }
};

struct Problem {
  int64_t batch, positions, channels, run_rows, runs;  // runs of rows per sample
};

Problem checked(int64_t batch, int64_t positions, int64_t channels, DType type, int threads) {
  check_at_least("batch", batch, 0);
  check_at_least("positions", positions, 1);
  check_at_least("channels", channels, 1);
  check_at_least("threads", threads, 1);
  check(type != DType::kFloat16, "lpips_distance on the CPU takes float32 and bfloat16, not float16");
  const int64_t rows = std::max<int64_t>(1, kRunElements / channels);
  return {batch, positions, channels, rows, (positions + rows - 1) / rows};
}

// Calls walk(item, sample, first row, rows) for all runs.
template <typename Walk>
void for_runs(const Problem& p, int threads, const Walk& walk) {
  parallel_for(p.batch * p.runs, threads, [&](int64_t item, int) {
    const int64_t sample = item / p.runs, first = (item - sample * p.runs) * p.run_rows;
    walk(item, sample, first, std::min(p.run_rows, p.positions - first));
  });
}

// The weights, or ones.
std::vector<float> weights_of(uintptr_t weights, int64_t channels) {
  const float* given = reinterpret_cast<const float*>(weights);
  return given ? std::vector<float>(given, given + channels) : std::vector<float>(channels, 1.0f);
}

template <typename T>
Rows<T> rows_at(uintptr_t data, const std::array<int64_t, 2>& strides, int64_t sample, int64_t row) {
  return {reinterpret_cast<const T*>(data) + sample * strides[0] + row * strides[1], strides[1]};
}

template <typename T>
void run_forward(const LpipsTensors& tensors, const std::array<int64_t, 2>& a_strides,
                 const std::array<int64_t, 2>& b_strides, const Problem& p, int threads) {
  const std::vector<float> weights = weights_of(tensors.weights, p.channels);
  std::vector<double> sums(p.batch * p.runs, 0.0);
  for_runs(p, threads, [&](int64_t item, int64_t sample, int64_t first, int64_t rows) {
    for_best_isa<Distance<T>>(rows_at<T>(tensors.a, a_strides, sample, first),
                              rows_at<T>(tensors.b, b_strides, sample, first), weights.data(), rows,
                              p.channels, &sums[item]);
  });
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    double sum = 0.0;
    for (int64_t i = 0; i < p.runs; ++i) sum += sums[sample * p.runs + i];
    reinterpret_cast<float*>(tensors.out)[sample] = static_cast<float>(sum / p.positions);
  }
}

template <typename T>
void run_gradient(const LpipsTensors& tensors, uintptr_t grad, const std::array<int64_t, 2>& x_strides,
                  const std::array<int64_t, 2>& other_strides, const Problem& p, int threads) {
  const std::vector<float> weights = weights_of(tensors.weights, p.channels);
  for_runs(p, threads, [&](int64_t, int64_t sample, int64_t first, int64_t rows) {
    const float factor =
        2.0f * reinterpret_cast<const float*>(grad)[sample] / static_cast<float>(p.positions);
    for_best_isa<Gradient<T>>(
        rows_at<T>(tensors.a, x_strides, sample, first), rows_at<T>(tensors.b, other_strides, sample, first),
        weights.data(), factor, rows, p.channels,
        reinterpret_cast<T*>(tensors.out) + (sample * p.positions + first) * p.channels);
  });
}

}  // namespace

void lpips_cpu(const LpipsTensors& tensors, const std::array<int64_t, 2>& a_strides,
               const std::array<int64_t, 2>& b_strides, const std::string& dtype, int64_t batch,
               int64_t positions, int64_t channels, int threads) {
  const DType type = parse_dtype(dtype);
  const Problem problem = checked(batch, positions, channels, type, threads);
  if (type == DType::kFloat32) {
    run_forward<float>(tensors, a_strides, b_strides, problem, threads);
  } else {
    run_forward<BFloat16>(tensors, a_strides, b_strides, problem, threads);
  }
}

void lpips_gradient_cpu(const LpipsTensors& tensors, uintptr_t grad, const std::array<int64_t, 2>& a_strides,
                        const std::array<int64_t, 2>& b_strides, const std::string& dtype, int64_t batch,
                        int64_t positions, int64_t channels, int threads) {
  const DType type = parse_dtype(dtype);
  const Problem problem = checked(batch, positions, channels, type, threads);
  if (type == DType::kFloat32) {
    run_gradient<float>(tensors, grad, a_strides, b_strides, problem, threads);
  } else {
    run_gradient<BFloat16>(tensors, grad, a_strides, b_strides, problem, threads);
  }
}

}  // namespace vfmvae
