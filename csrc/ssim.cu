// ssim on CUDA: statistics and index in one pass over the images; its gradient in one pass over the maps that
// the first one leaves (ssim.h).
//
// A block takes a tile of positions of one plane. Its threads stage the tile with the window's halo in shared
// memory; then a warp's lanes own a row each and blur a run of columns across, and then a column each and
// blur a run of rows down. Both times a value that is read enters all the sums of its run, in registers. The
// gradient is the same blur of other numbers, with a halo on the other side. Blocks leave partial sums, which
// a second kernel adds up in order: no atomics, the result is deterministic.
#include "launch.cuh"
#include "ops.h"
#include "ssim.h"
#include "vec.cuh"

namespace vfmvae {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 32, kRun = 8, kTileWidth = kWarps * kRun;  // a lane per row, a run of columns per warp
constexpr int kTileHeight = kRows - kSsimHalo;
constexpr int kDown = (kTileHeight + kWarps - 1) / kWarps;  // rows that a thread finishes
constexpr int kColumns = kTileWidth + kSsimHalo;
static_assert(kTileWidth == 32, "a lane per column");

// Odd strides: the lanes of a warp meet different banks along rows and along columns.
template <int N>
using Staged = float[N][kRows][kColumns + 1];
template <int N>
using Across = float[N][kDown * kWarps + kSsimHalo][kTileWidth + 1];  // the last rows are never used

template <typename T>
struct Image {
  T* data;
  int64_t batch, channel, row, column;  // strides

  __device__ __forceinline__ T* plane(int64_t sample, int64_t own_channel) const {
    return data + sample * batch + own_channel * channel;
  }
  __device__ __forceinline__ int64_t offset(int y, int x) const { return y * row + x * column; }
};

struct Tile {
  int64_t sample, plane;  // plane: of all samples
  int channel, y, x;      // the first row and column
};

__device__ __forceinline__ Tile this_tile(int channels, int tiles_y, int tiles_x) {
  const unsigned tiles = static_cast<unsigned>(tiles_y) * static_cast<unsigned>(tiles_x);
  const unsigned plane = blockIdx.x / tiles, tile = blockIdx.x - plane * tiles;
  const unsigned sample = plane / static_cast<unsigned>(channels);
  const int row = static_cast<int>(tile / static_cast<unsigned>(tiles_x));
  return {sample, plane, static_cast<int>(plane - sample * static_cast<unsigned>(channels)),
          row * kTileHeight, (static_cast<int>(tile) - row * tiles_x) * kTileWidth};
}

// The average of a diagonal of the staged tile's pixels: the same in every warp.
template <typename T>
__device__ __forceinline__ float shift_of_tile(const Image<const T>& image, const T* plane, const Tile& tile,
                                               const SsimSize& size) {
  static_assert(kRows == kShiftPixels && kColumns >= kShiftPixels, "a lane per pixel");
  const int lane = threadIdx.x % 32;
  const int y = min(tile.y + lane, size.height - 1), x = min(tile.x + lane, size.width - 1);
  float sum = to_float(plane[image.offset(y, x)]);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
  return sum / kShiftPixels;
}

// Calls stage(row, column) for every element of the staged tile, neighbouring threads in neighbouring
// columns.
template <typename Stage>
__device__ __forceinline__ void for_staged(const Stage& stage) {
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    const int row = i / kColumns;
    stage(row, i - row * kColumns);
  }
}

// Rows: `expand` makes the M terms that are blurred of the N numbers of a pixel.
template <int N, int M, typename Expand>
__device__ __forceinline__ void blur_across(const Staged<N>& staged, Across<M>& across,
                                            const Expand& expand) {
  const int row = threadIdx.x % 32, first = threadIdx.x / 32 * kRun;
  float sums[M][kRun] = {};
#pragma unroll
  for (int i = 0; i < kRun + kSsimHalo; ++i) {
    float values[N], terms[M];
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = staged[n][row][first + i];
    expand(values, terms);
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      if (i - r < 0 || i - r > kSsimHalo) continue;
#pragma unroll
      for (int m = 0; m < M; ++m) sums[m][r] += ssim_tap(i - r) * terms[m];
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < kRun; ++r) across[m][row][first + r] = sums[m][r];
}

// Columns: the M sums of this thread's rows of the tile, from `first` on.
template <int M>
__device__ __forceinline__ void blur_down(const Across<M>& across, int first, float (&sums)[kDown][M]) {
  const int column = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kDown; ++r)
#pragma unroll
    for (int m = 0; m < M; ++m) sums[r][m] = 0.0f;
#pragma unroll
  for (int i = 0; i < kDown + kSsimHalo; ++i) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float value = across[m][first + i][column];
#pragma unroll
      for (int r = 0; r < kDown; ++r) {
        if (0 <= i - r && i - r <= kSsimHalo) sums[r][m] += ssim_tap(i - r) * value;
      }
    }
  }
}

template <int THREADS, typename F>
__device__ __forceinline__ F sum_of_block(F value) {
  __shared__ F of_warps[THREADS / 32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) value += of_warps[warp];
  return value;
}

struct Maps {
  float *p, *q, *m_a, *m_b;  // planes of valid positions; m_a and m_b may be null, and all of them
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 7)
    ssim_kernel(Image<const T> a, Image<const T> b, Maps maps, float* __restrict__ partials, SsimSize size,
                SsimConstants constants, int tiles_y, int tiles_x) {
  __shared__ Staged<2> staged;
  __shared__ Across<kSsimMeans> across;
  const Tile tile = this_tile(size.channels, tiles_y, tiles_x);
  const T* plane_a = a.plane(tile.sample, tile.channel);
  const T* plane_b = b.plane(tile.sample, tile.channel);
  const float shift_a = shift_of_tile(a, plane_a, tile, size),
              shift_b = shift_of_tile(b, plane_b, tile, size);
  for_staged([&](int row, int column) {
    const int y = tile.y + row, x = tile.x + column;
    const bool inside = y < size.height && x < size.width;
    staged[0][row][column] = inside ? to_float(plane_a[a.offset(y, x)]) - shift_a : 0.0f;
    staged[1][row][column] = inside ? to_float(plane_b[b.offset(y, x)]) - shift_b : 0.0f;
  });
  __syncthreads();
  blur_across<2, kSsimMeans>(staged, across, [](const float (&pixel)[2], float (&terms)[kSsimMeans]) {
    const float difference = pixel[0] - pixel[1];
    terms[kMeanA] = pixel[0];
    terms[kMeanD] = difference;
    terms[kMeanDD] = difference * difference;
    terms[kMeanSquares] = pixel[0] * pixel[0] + pixel[1] * pixel[1];
  });
  __syncthreads();
  const int first = threadIdx.x / 32 * kDown, x = tile.x + threadIdx.x % 32;
  float means[kDown][kSsimMeans], sum = 0.0f;
  blur_down<kSsimMeans>(across, first, means);
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const int y = tile.y + first + r;
    if (first + r >= kTileHeight || y >= size.valid_height() || x >= size.valid_width()) continue;
    SsimPoint<float> point;
    point.compute(means[r], shift_a, shift_a - shift_b, constants);
    sum += point.index;
    if (maps.p == nullptr) continue;
    const int64_t place = (tile.plane * size.valid_height() + y) * size.valid_width() + x;
    maps.p[place] = point.p;
    maps.q[place] = point.q;
    if (maps.m_a != nullptr) maps.m_a[place] = point.m_a;
    if (maps.m_b != nullptr) maps.m_b[place] = point.m_b;
  }
  sum = sum_of_block<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// out[sample] = scale * the sum of its partials.
__global__ void __launch_bounds__(kThreads)
    ssim_mean_kernel(const float* __restrict__ partials, float* __restrict__ out, int64_t count,
                     double scale) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[blockIdx.x * count + i];
  sum = sum_of_block<kThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(scale * sum);
}

// The gradient of `image` from that of the index [B]; m is its map M.
template <typename T>
__global__ void __launch_bounds__(kThreads, 7)
    ssim_gradient_kernel(const float* __restrict__ grad, Image<const T> image, Image<const T> other,
                         const float* __restrict__ m, const float* __restrict__ p,
                         const float* __restrict__ q, Image<T> out, SsimSize size, float scale, int tiles_y,
                         int tiles_x) {
  __shared__ Staged<3> staged;
  __shared__ Across<3> across;
  const Tile tile = this_tile(size.channels, tiles_y, tiles_x);
  const int64_t plane = tile.plane * size.valid_height() * size.valid_width();
  for_staged([&](int row, int column) {
    const int y = tile.y + row - kSsimHalo, x = tile.x + column - kSsimHalo;
    const bool inside = 0 <= y && y < size.valid_height() && 0 <= x && x < size.valid_width();
    const int64_t place = plane + int64_t{y} * size.valid_width() + x;
    staged[0][row][column] = inside ? m[place] : 0.0f;
    staged[1][row][column] = inside ? p[place] : 0.0f;
    staged[2][row][column] = inside ? q[place] : 0.0f;
  });
  __syncthreads();
  blur_across<3, 3>(staged, across, [](const float (&values)[3], float (&terms)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) terms[i] = values[i];
  });
  __syncthreads();
  const int first = threadIdx.x / 32 * kDown, x = tile.x + threadIdx.x % 32;
  float sums[kDown][3];
  blur_down<3>(across, first, sums);
  const float factor = scale * grad[tile.sample];
  const T* plane_of_image = image.plane(tile.sample, tile.channel);
  const T* plane_of_other = other.plane(tile.sample, tile.channel);
  T* plane_of_out = out.plane(tile.sample, tile.channel);
#pragma unroll
  for (int r = 0; r < kDown; ++r) {
    const int y = tile.y + first + r;
    if (first + r >= kTileHeight || y >= size.height || x >= size.width) continue;
    const float own = to_float(plane_of_image[image.offset(y, x)]);
    const float others = to_float(plane_of_other[other.offset(y, x)]);
    const float gradient = sums[r][0] + 2.0f * (own * sums[r][1] + (own - others) * sums[r][2]);
    plane_of_out[out.offset(y, x)] = from_float<T>(factor * gradient);
  }
}

int tiles_along(int positions, int tile) { return (positions + tile - 1) / tile; }

unsigned count_blocks(const SsimSize& size, int tiles_y, int tiles_x) {
  const int64_t tiles = int64_t{tiles_y} * tiles_x, most = (int64_t{1} << 31) - 1;
  check(tiles <= most && size.planes() <= most / tiles, "more than 2^31 tiles: fewer images are needed");
  return static_cast<unsigned>(size.planes() * tiles);
}

template <typename T>
Image<T> image_at(uintptr_t data, const ImageStrides& strides) {
  return {reinterpret_cast<T*>(data), strides[0], strides[1], strides[2], strides[3]};
}

template <typename Run>
void with_element(const std::string& dtype, const Run& run) {
  const DType type = parse_dtype(dtype);
  if (type == DType::kFloat32) run(float{});
  if (type == DType::kFloat16) run(__half{});
  if (type == DType::kBFloat16) run(__nv_bfloat16{});
}

}  // namespace

int64_t ssim_partials(int64_t channels, int64_t height, int64_t width) {
  const SsimSize size = check_ssim(1, channels, height, width);
  return int64_t{size.channels} * tiles_along(size.valid_height(), kTileHeight) *
         tiles_along(size.valid_width(), kTileWidth);
}

void ssim_cuda(const SsimTensors& tensors, const ImageStrides& a_strides, const ImageStrides& b_strides,
               const std::string& dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
               double data_range, int device, uintptr_t stream) {
  const SsimSize size = check_ssim(batch, channels, height, width);
  const int tiles_y = tiles_along(size.valid_height(), kTileHeight);
  const int tiles_x = tiles_along(size.valid_width(), kTileWidth);
  const unsigned blocks = count_blocks(size, tiles_y, tiles_x);
  const auto address = [](uintptr_t map) { return reinterpret_cast<float*>(map); };
  const Maps maps{address(tensors.map_p), address(tensors.map_q), address(tensors.map_a),
                  address(tensors.map_b)};
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    if (batch == 0) return;
    DeviceGuard guard(device);
    launch(ssim_kernel<T>, dim3(blocks), dim3(kThreads), stream, image_at<const T>(tensors.a, a_strides),
           image_at<const T>(tensors.b, b_strides), maps, address(tensors.partials), size,
           ssim_constants(data_range), tiles_y, tiles_x);
    launch(ssim_mean_kernel, dim3(static_cast<unsigned>(batch)), dim3(kThreads), stream,
           static_cast<const float*>(address(tensors.partials)), address(tensors.out),
           int64_t{blocks} / batch, 1.0 / size.positions());
  });
}

void ssim_gradient_cuda(const SsimGradient& tensors, const ImageStrides& image_strides,
                        const ImageStrides& other_strides, const ImageStrides& out_strides,
                        const std::string& dtype, int64_t batch, int64_t channels, int64_t height,
                        int64_t width, int device, uintptr_t stream) {
  const SsimSize size = check_ssim(batch, channels, height, width);
  const int tiles_y = tiles_along(size.height, kTileHeight), tiles_x = tiles_along(size.width, kTileWidth);
  const unsigned blocks = count_blocks(size, tiles_y, tiles_x);
  const auto address = [](uintptr_t map) { return reinterpret_cast<const float*>(map); };
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    if (batch == 0) return;
    DeviceGuard guard(device);
    launch(ssim_gradient_kernel<T>, dim3(blocks), dim3(kThreads), stream, address(tensors.grad),
           image_at<const T>(tensors.image, image_strides), image_at<const T>(tensors.other, other_strides),
           address(tensors.map), address(tensors.map_p), address(tensors.map_q),
           image_at<T>(tensors.out, out_strides), size, static_cast<float>(1.0 / size.positions()), tiles_y,
           tiles_x);
  });
}

}  // namespace vfmvae
