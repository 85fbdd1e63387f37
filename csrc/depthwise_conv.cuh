// What the kernels of depthwise_conv.cu and depthwise_conv_gradient.cu share: the division of the work, and
// rows of the image staged in shared memory.
//
// A block has kChannels channels of a tile: a strip of rows, kSpans spans of kSpan columns wide.
// A thread owns one channel of one span and walks down the rows, so that its k x k weights (or their sums)
// stay in registers. A row of the tile with its halo arrives by 16-byte asynchronous copies, some rows ahead
// of its use, and is converted to float once per thread: for k = 7 a row costs 196 multiply-adds and 60 other
// instructions (sm_90a, bfloat16). Two channels per thread would need 98 registers for the weights alone, and
// weights read from shared memory as many of its cycles as there are multiply-adds; eight columns would need
// 28 more registers, leaving three quarters of the warps, and twice the unrolled code.
#pragma once

#include <algorithm>

#include "async_copy.cuh"
#include "checks.h"
#include "launch.cuh"
#include "vec.cuh"

namespace vfmvae {

constexpr int kChannels = 64;  // of a block: the 128 bytes of a cache line in bfloat16
constexpr int kSpan = 4;  // vfmvae/ops/conv.py knows kChannels, kSpan and kTileWidth
constexpr int kSpans = 4;
constexpr int kThreads = kChannels * kSpans;
constexpr int kTileWidth = kSpan * kSpans;

// Rows in shared memory: one for each step of the unrolled loop, so that their places are constants in it. A
// multiple of K, the length of the rings.
template <int K>
constexpr int kStages = K == 3 ? 6 : K;

struct DepthwiseSize {
  int64_t batch;
  int height, width, channels;
  int strip_rows;                  // of a tile
  int groups, tiles_x, tiles_y;    // kChannels channels, tiles of an image
  bool aligned;                    // whether pixels can be read in pieces of 16 bytes
};

// One tile's place. Of images, `image` is the first pixel's index.
struct Tile {
  int64_t image;
  int strip, first_row, rows, first_column;
};

__device__ __forceinline__ Tile find_tile(const DepthwiseSize& size, int64_t number) {
  Tile tile;
  tile.first_column = static_cast<int>(number % size.tiles_x) * kTileWidth;
  number /= size.tiles_x;
  tile.strip = static_cast<int>(number % size.tiles_y);
  tile.first_row = tile.strip * size.strip_rows;
  tile.rows = min(size.strip_rows, size.height - tile.first_row);
  tile.image = number / size.tiles_y;
  return tile;
}

// Brings rows of a tile to shared memory, [COLUMNS][kChannels], one after the other from `first_row` on.
// Zeros stand for what lies outside of the image and for rows from `end_row` on. ALIGNED promises
// size.aligned.
template <typename T, int COLUMNS, bool ALIGNED>
class RowReader {
 public:
  __device__ __forceinline__ RowReader(const T* x, const DepthwiseSize& size, const Tile& tile, int first_row,
                                       int end_row, int first_column, int first_channel)
      : row_(first_row), end_row_(min(end_row, size.height)), row_elements_(size.width * size.channels) {
    const int piece = ALIGNED || size.aligned ? kElements : 1;
    const int channel = threadIdx.x % (kChannels / piece) * piece;
    own_ = threadIdx.x / (kChannels / piece);
    target_ = own_ * kChannels + channel;
    const bool has_channel = first_channel + channel < size.channels;
    end_column_ = has_channel ? size.width - first_column : 0;
    first_column_ = has_channel ? -first_column : 1;
    const int64_t pixel = (tile.image * size.height + first_row) * size.width + first_column + own_;
    source_ = x + pixel * size.channels + first_channel + channel;  // not read where outside of the image
  }

  // Begins to read the next row. The caller commits the copies.
  __device__ __forceinline__ void next(T* target, const DepthwiseSize& size) {
    const bool inside = static_cast<unsigned>(row_) < static_cast<unsigned>(end_row_);
    if (ALIGNED || size.aligned) {
      constexpr int kStride = kThreads * kElements / kChannels;
#pragma unroll
      for (int c = 0; c < COLUMNS; c += kStride) {
        if (c + kStride > COLUMNS && own_ + c >= COLUMNS) break;
        copy_async(target + target_ + c * kChannels, source_ + static_cast<unsigned>(c * size.channels),
                   inside && in_image(own_ + c));
      }
    } else {
#pragma unroll 4
      for (int c = 0; own_ + c < COLUMNS; c += kSpans) {
        target[target_ + c * kChannels] =
            inside && in_image(own_ + c) ? source_[int64_t{c} * size.channels] : from_float<T>(0.0f);
      }
    }
    ++row_;
    source_ += row_elements_;
  }

 private:
  static constexpr int kElements = kVectorBytes / static_cast<int>(sizeof(T));

  __device__ __forceinline__ bool in_image(int c) const { return first_column_ <= c && c < end_column_; }

  const T* source_;
  int row_, end_row_;
  unsigned row_elements_;
  int own_, target_;               // this thread's first column, and its place
  int first_column_, end_column_;  // of those staged, the ones in the image: none without a channel
};

inline int64_t count_blocks(const DepthwiseSize& size) {  // one per tile and group of channels
  return size.batch * size.groups * size.tiles_x * size.tiles_y;
}

inline DepthwiseSize check_depthwise(int64_t batch, int64_t height, int64_t width, int64_t channels,
                                     int kernel_size, int strip_rows) {
  check_at_least("batch", batch, 0);
  check_at_least("height", height, 1);
  check_at_least("width", width, 1);
  check_at_least("channels", channels, 1);
  check_at_least("strip_rows", strip_rows, 1);
  check(kernel_size == 3 || kernel_size == 5 || kernel_size == 7,
        "kernel_size " + std::to_string(kernel_size) + " is not one of 3, 5, 7");
  const int64_t largest = int64_t{1} << 28;
  check(height < largest && width < largest && channels < largest && width * channels < largest,
        "an image row of " + std::to_string(width) + " pixels with " + std::to_string(channels) +
            " channels is longer than 2^28 elements");
  DepthwiseSize size = {};
  size.batch = batch;
  size.height = static_cast<int>(height);
  size.width = static_cast<int>(width);
  size.channels = static_cast<int>(channels);
  size.strip_rows = std::min(strip_rows, size.height);
  size.groups = (size.channels + kChannels - 1) / kChannels;
  size.tiles_x = (size.width + kTileWidth - 1) / kTileWidth;
  size.tiles_y = (size.height + size.strip_rows - 1) / size.strip_rows;
  check(count_blocks(size) < (int64_t{1} << 31),
        "more than 2^31 blocks: fewer images or longer strips are needed");
  return size;
}

// Calls run(element, size) with a value of the C++ type of `dtype` and the kernel size as a constant.
template <typename Run>
void choose_depthwise(const std::string& dtype, int kernel_size, const Run& run) {
  using std::integral_constant;
  const auto choose_size = [&](auto element) {
    if (kernel_size == 3) run(element, integral_constant<int, 3>{});
    if (kernel_size == 5) run(element, integral_constant<int, 5>{});
    if (kernel_size == 7) run(element, integral_constant<int, 7>{});
  };
  const DType type = parse_dtype(dtype);
  if (type == DType::kFloat32) choose_size(float{});
  if (type == DType::kFloat16) choose_size(__half{});
  if (type == DType::kBFloat16) choose_size(__nv_bfloat16{});
}

}  // namespace vfmvae
