// What the kernels of depthwise_conv.cu and depthwise_conv_gradient.cu share: the division of the work, and
// rows of the image staged in shared memory.
//
// A block has kChannels channels of a tile: a strip of rows, up to kMostSpans spans of kSpan columns wide.
// A thread owns one channel of one span and walks down the rows, so that its k x k weights (or their sums)
// stay in registers. A row of the tile with its halo arrives by 16-byte asynchronous copies, some rows ahead
// of its use, and is converted to float once per thread: for k = 7 a row costs 196 multiply-adds and
// about 40 other instructions. Two channels per thread would need 98 registers for weights; eight columns
// save 4 % of the instructions, but need 28 more registers and twice the unrolled code.
#pragma once

#include <algorithm>

#include "async_copy.cuh"
#include "checks.h"
#include "launch.cuh"
#include "vec.cuh"

namespace vfmvae {

constexpr int kChannels = 64;  // of a block: the 128 bytes of a cache line in bfloat16
constexpr int kSpan = 4;
constexpr int kMostSpans = 4;
constexpr int kStages = 4;  // rows in shared memory

struct DepthwiseSize {
  int64_t batch;
  int height, width, channels;
  int strip_rows;                  // of a tile
  int spans;                       // of a tile
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
  tile.first_column = static_cast<int>(number % size.tiles_x) * (size.spans * kSpan);
  number /= size.tiles_x;
  tile.strip = static_cast<int>(number % size.tiles_y);
  tile.first_row = tile.strip * size.strip_rows;
  tile.rows = min(size.strip_rows, size.height - tile.first_row);
  tile.image = number / size.tiles_y;
  return tile;
}

// Brings rows of a tile to shared memory, [columns][kChannels], one after the other from `first_row` on. Zeros
// stand for what lies outside of the image and for rows from `end_row` on. ALIGNED promises size.aligned.
template <typename T, bool ALIGNED>
class RowReader {
 public:
  __device__ __forceinline__ RowReader(const T* x, const DepthwiseSize& size, const Tile& tile, int first_row,
                                       int end_row, int first_column, int columns, int first_channel)
      : row_(first_row), end_row_(min(end_row, size.height)), columns_(columns), first_column_(first_column) {
    const int piece = ALIGNED || size.aligned ? kVectorBytes / static_cast<int>(sizeof(T)) : 1;
    const int part = threadIdx.x % (kChannels / piece) * piece;
    stride_ = blockDim.x / (kChannels / piece);
    column_ = threadIdx.x / (kChannels / piece);
    has_channel_ = first_channel + part < size.channels;
    target_ = column_ * kChannels + part;
    source_ = x + ((tile.image * size.height + first_row) * size.width + first_column + column_) * size.channels +
              first_channel + part;  // may lie outside of the image, and is not read then
  }

  // Begins to read the next row. The caller commits the copies.
  __device__ __forceinline__ void next(T* target, const DepthwiseSize& size) {
    const bool inside = has_channel_ && 0 <= row_ && row_ < end_row_;
    if (ALIGNED || size.aligned) {
      if (column_ < columns_) copy_async(target + target_, source_, inside && in_image(column_, size));
#pragma unroll 1
      for (int c = column_ + stride_; c < columns_; c += stride_) {
        copy_async(target + target_ + (c - column_) * kChannels,
                   source_ + int64_t{c - column_} * size.channels, inside && in_image(c, size));
      }
    } else {
#pragma unroll 4
      for (int c = column_; c < columns_; c += stride_) {
        const int64_t offset = int64_t{c - column_} * size.channels;
        target[target_ + (c - column_) * kChannels] =
            inside && in_image(c, size) ? source_[offset] : from_float<T>(0.0f);
      }
    }
    ++row_;
    source_ += int64_t{size.width} * size.channels;
  }

 private:
  __device__ __forceinline__ bool in_image(int column, const DepthwiseSize& size) const {
    return static_cast<unsigned>(first_column_ + column) < static_cast<unsigned>(size.width);
  }

  const T* source_;
  int row_, end_row_, columns_, first_column_;
  int column_, stride_, target_;  // of this thread's first piece
  bool has_channel_;
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
  size.spans = std::min(kMostSpans, (size.width + kSpan - 1) / kSpan);
  size.groups = (size.channels + kChannels - 1) / kChannels;
  size.tiles_x = (size.width + size.spans * kSpan - 1) / (size.spans * kSpan);
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
