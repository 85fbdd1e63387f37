// Group normalisation with an optional activation on the CPU, channels-last.
//
//     y = act((x - mean) * (rstd * weight) + bias)       mean and rstd per (sample, group)
//
// The pixels of a sample are cut into tiles. A tile gives the mean and the sum of squared deviations of each
// channel, in two looks while it lies in the cache; tiles and then channels are merged in order (Chan et al.
// 1983), which is exact where E[x^2] - E[x]^2 is not, and does not depend on the number of threads.
#include <cmath>
#include <string>
#include <vector>

#include "group_norm.h"

namespace vfmvae {
namespace {

using namespace norm;

template <int LANES, int ACTIVATION>
VFMVAE_INLINE void activate(Floats<LANES>* z) {
  Floats<LANES> a, b;
  if (ACTIVATION == kLeakyRelu) *z = *z < 0.0f ? kSlope * *z : *z;
  if (ACTIVATION == kGelu) {
    normal_distribution<LANES>(*z, &a, &b);
    *z *= a;
  }
  if (ACTIVATION == kSilu) {
    sigmoid<LANES>(*z, &a);
    *z *= a;
  }
}

// Mean and sum of squared deviations of every channel over the pixels of a tile.
template <typename T>
struct TileStatistics {
  template <int LANES>
  static VFMVAE_INLINE void run(const T* x, int64_t pixels, int64_t channels, float* mean, float* squares) {
    const float share = 1.0f / static_cast<float>(pixels);
    for_channels<LANES, 4>(channels, [&](auto block, int64_t c, int64_t count) VFMVAE_INLINE_BODY {
      using B = decltype(block);
      Floats<LANES> sums[B::VECTORS][B::PIXELS] = {}, averages[B::VECTORS];
      for_pixels<B::PIXELS>(pixels, [&](int64_t p, int chain) VFMVAE_INLINE_BODY {
#pragma GCC unroll 4
        for (int v = 0; v < B::VECTORS; ++v) {
          Floats<LANES> value;
          get<LANES, B::WHOLE>(x + p * channels + c + v * LANES, count, &value);
          sums[v][chain] += value;
        }
      });
#pragma GCC unroll 4
      for (int v = 0; v < B::VECTORS; ++v) {
        total<LANES, B::PIXELS>(sums[v], &averages[v]);
        averages[v] *= share;
      }
      Floats<LANES> rests[B::VECTORS][B::PIXELS] = {}, of_squares[B::VECTORS][B::PIXELS] = {};
      for_pixels<B::PIXELS>(pixels, [&](int64_t p, int chain) VFMVAE_INLINE_BODY {
#pragma GCC unroll 4
        for (int v = 0; v < B::VECTORS; ++v) {
          Floats<LANES> value;
          get<LANES, B::WHOLE>(x + p * channels + c + v * LANES, count, &value);
          value -= averages[v];
          rests[v][chain] += value;  // what rounding has left out of the mean
          of_squares[v][chain] += value * value;
        }
      });
#pragma GCC unroll 4
      for (int v = 0; v < B::VECTORS; ++v) {
        Floats<LANES> rest, all;
        total<LANES, B::PIXELS>(rests[v], &rest);
        total<LANES, B::PIXELS>(of_squares[v], &all);
        put<LANES, B::WHOLE>(averages[v] + rest * share, count, mean + c + v * LANES);
        put<LANES, B::WHOLE>(all - rest * rest * share, count, squares + c + v * LANES);
      }
    });
  }
};

template <typename T, int ACTIVATION>
struct ApplyTile {
  template <int LANES>
  static VFMVAE_INLINE void run(const T* x, int64_t pixels, int64_t channels, const Channels& of, T* out) {
    for_channels<LANES, 4>(channels, [&](auto block, int64_t c, int64_t count) VFMVAE_INLINE_BODY {
      using B = decltype(block);
      Normed<LANES> n[B::VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < B::VECTORS; ++v) {
        n[v].template read<B::WHOLE>(of, c + v * LANES, count);
        n[v].weight *= n[v].rstd;
      }
      for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < B::VECTORS; ++v) {
          const int64_t place = p * channels + c + v * LANES;
          Floats<LANES> value;
          get<LANES, B::WHOLE>(x + place, count, &value);
          value = (value - n[v].mean) * n[v].weight + n[v].bias;
          activate<LANES, ACTIVATION>(&value);
          put<LANES, B::WHOLE>(value, count, out + place);
        }
      }
    });
  }
};

// Mean and rstd [B, groups] from the statistics [B, tiles, C] of tiles.
void merge_statistics(const Problem& p, const std::vector<float>& means, const std::vector<float>& squares,
                      float eps, float* mean, float* rstd) {
  for (int64_t sample = 0; sample < p.batch; ++sample)
    for (int64_t g = 0; g < p.groups; ++g) {
      double count = 0.0, average = 0.0, deviations = 0.0;
      for (int64_t number = 0; number < p.tiles; ++number) {
        const double pixels = static_cast<double>(p.tile_pixels(number));
        for (int64_t c = g * p.group_size(); c < (g + 1) * p.group_size(); ++c) {
          const int64_t place = (sample * p.tiles + number) * p.channels + c;
          const double difference = means[place] - average, total = count + pixels;
          average += difference * pixels / total;
          deviations += squares[place] + difference * difference * count * pixels / total;
          count = total;
        }
      }
      mean[sample * p.groups + g] = static_cast<float>(average);
      rstd[sample * p.groups + g] = static_cast<float>(1.0 / std::sqrt(deviations / count + eps));
    }
}

template <typename T>
void run_forward(const GroupNormTensors& tensors, const Problem& p, float eps, const std::string& activation,
                 int threads) {
  const T* x = reinterpret_cast<const T*>(tensors.x);
  float *mean = reinterpret_cast<float*>(tensors.mean), *rstd = reinterpret_cast<float*>(tensors.rstd);
  std::vector<float> means(p.batch * p.tiles * p.channels), squares(means.size());
  for_tiles(p, threads, [&](int64_t, int64_t item, int64_t first, int64_t pixels) {
    for_best_isa<TileStatistics<T>>(x + first, pixels, p.channels, means.data() + item * p.channels,
                                    squares.data() + item * p.channels);
  });
  merge_statistics(p, means, squares, eps, mean, rstd);
  const std::vector<float> mean_of = per_channel(p, mean), rstd_of = per_channel(p, rstd);
  with_activation(activation, [&](auto kind) {
    for_tiles(p, threads, [&](int64_t sample, int64_t, int64_t first, int64_t pixels) {
      const Channels of{mean_of.data() + sample * p.channels, rstd_of.data() + sample * p.channels,
                        reinterpret_cast<const float*>(tensors.weight),
                        reinterpret_cast<const float*>(tensors.bias), nullptr, nullptr};
      for_best_isa<ApplyTile<T, decltype(kind)::value>>(x + first, pixels, p.channels, of,
                                                        reinterpret_cast<T*>(tensors.out) + first);
    });
  });
}

}  // namespace

void group_norm_cpu(const GroupNormTensors& tensors, const std::string& dtype, int64_t batch, int64_t pixels,
                    int64_t channels, int64_t groups, double eps, const std::string& activation, int threads) {
  const DType type = parse_dtype(dtype);
  const Problem problem = checked(batch, pixels, channels, groups, threads, type);
  if (type == DType::kFloat32) {
    run_forward<float>(tensors, problem, static_cast<float>(eps), activation, threads);
  } else {
    run_forward<BFloat16>(tensors, problem, static_cast<float>(eps), activation, threads);
  }
}

}  // namespace vfmvae
