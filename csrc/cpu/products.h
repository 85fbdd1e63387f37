// Matrix products of a tile of rows that lies in the cache with a matrix packed for the purpose, and of two
// such tiles over their rows. All numbers are floats; every function is for one number of lanes (simd.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace vfmvae {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix of `depth` rows and `width` columns in panels of `lanes` columns, the rows of a panel one behind
// the other; the last panel is filled up with zeros.
struct Panels {
  int64_t depth, width;
  std::vector<float> values;

  // element(k, n) gives row k, column n.
  template <typename Element>
  Panels(int64_t depth, int64_t width, int lanes, const Element& element)
      : depth(depth), width(round_up(width, lanes)), values(this->width * depth) {
    for (int64_t n = 0; n < width; ++n)
      for (int64_t k = 0; k < depth; ++k)
        values[(n / lanes * depth + k) * lanes + n % lanes] = element(k, n);
  }
};

// Rows of one inner loop, whose ROWS x 2 sums stay in registers.
template <int LANES>
constexpr int kProductRows = LANES == 16 ? 12 : 6;

// c[r][n] = sum over k of a[r][k] * panels[k][n] for ROWS rows and COUNT panels.
template <int LANES, int ROWS, int COUNT>
VFMVAE_INLINE void product_block(const float* a, int64_t a_stride, const float* panel, int64_t depth, float* c,
                                 int64_t c_stride) {
  Floats<LANES> sums[ROWS][COUNT] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats<LANES> b[COUNT];
#pragma GCC unroll 2
    for (int p = 0; p < COUNT; ++p) load<LANES>(panel + (p * depth + k) * LANES, &b[p]);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < COUNT; ++p) sums[r][p] += a[r * a_stride + k] * b[p];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < COUNT; ++p) store<LANES>(sums[r][p], c + r * c_stride + p * LANES);
  }
}

template <int LANES, int COUNT>
VFMVAE_INLINE void product_columns(const float* a, int64_t a_stride, int64_t rows, const float* panel,
                                   int64_t depth, float* c, int64_t c_stride) {
  constexpr int kRows = kProductRows<LANES>;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    product_block<LANES, kRows, COUNT>(a + r * a_stride, a_stride, panel, depth, c + r * c_stride, c_stride);
  for (; r < rows; ++r)
    product_block<LANES, 1, COUNT>(a + r * a_stride, a_stride, panel, depth, c + r * c_stride, c_stride);
}

// c [rows][panels.width] = a [rows][panels.depth] * panels.
template <int LANES>
VFMVAE_INLINE void product(const float* a, int64_t a_stride, int64_t rows, const Panels& panels, float* c) {
  int64_t n = 0;
  for (; n + 2 * LANES <= panels.width; n += 2 * LANES)
    product_columns<LANES, 2>(a, a_stride, rows, panels.values.data() + n * panels.depth, panels.depth, c + n,
                              panels.width);
  for (; n < panels.width; n += LANES)
    product_columns<LANES, 1>(a, a_stride, rows, panels.values.data() + n * panels.depth, panels.depth, c + n,
                              panels.width);
}

// sums[i][j] += sum over r of a[r][i] * b[r][j] for COUNT_I columns of a and COUNT_J vectors of columns of b.
template <int LANES, int COUNT_I, int COUNT_J>
VFMVAE_INLINE void inner_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                               int64_t rows, float* target, int64_t stride) {
  Floats<LANES> sums[COUNT_I][COUNT_J];
#pragma GCC unroll 12
  for (int i = 0; i < COUNT_I; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < COUNT_J; ++j) load<LANES>(target + i * stride + j * LANES, &sums[i][j]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Floats<LANES> of_b[COUNT_J];
#pragma GCC unroll 2
    for (int j = 0; j < COUNT_J; ++j) load<LANES>(b + r * b_stride + j * LANES, &of_b[j]);
#pragma GCC unroll 12
    for (int i = 0; i < COUNT_I; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < COUNT_J; ++j) sums[i][j] += a[r * a_stride + i] * of_b[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < COUNT_I; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < COUNT_J; ++j) store<LANES>(sums[i][j], target + i * stride + j * LANES);
  }
}

template <int LANES, int COUNT_J>
VFMVAE_INLINE void inner_columns(const float* a, int64_t a_width, int64_t a_stride, const float* b,
                                 int64_t b_stride, int64_t rows, float* target) {
  constexpr int kColumns = kProductRows<LANES>;
  int64_t i = 0;
  for (; i + kColumns <= a_width; i += kColumns)
    inner_block<LANES, kColumns, COUNT_J>(a + i, a_stride, b, b_stride, rows, target + i * b_stride, b_stride);
  for (; i < a_width; ++i)
    inner_block<LANES, 1, COUNT_J>(a + i, a_stride, b, b_stride, rows, target + i * b_stride, b_stride);
}

// target [a_width][b_stride] += transposed a [rows][a_width] * b [rows][b_stride], b_stride a multiple of LANES.
template <int LANES>
VFMVAE_INLINE void add_inner_product(const float* a, int64_t a_width, int64_t a_stride, const float* b,
                                     int64_t b_stride, int64_t rows, float* target) {
  int64_t j = 0;
  for (; j + 2 * LANES <= b_stride; j += 2 * LANES)
    inner_columns<LANES, 2>(a, a_width, a_stride, b + j, b_stride, rows, target + j);
  for (; j < b_stride; j += LANES)
    inner_columns<LANES, 1>(a, a_width, a_stride, b + j, b_stride, rows, target + j);
}

}  // namespace vfmvae
