// Group normalisation with an optional activation on the CPU, channels-last.
//
//     y = act((x - mean) * (rstd * weight) + bias)       mean and rstd per (sample, group)
//
// The pixels of a sample are cut into tiles. A tile gives the mean and the sum of squared deviations of each
// channel, in two looks while it lies in the cache; tiles and then channels are merged in order (Chan et al.
// 1983), which is exact where E[x^2] - E[x]^2 is not, and does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "parallel.h"
#include "simd.h"

namespace vfmvae {
namespace {

constexpr int64_t kTileFloats = 1 << 12;  // few, as sums within a tile lose digits one by one
constexpr int64_t kLeastTilePixels = 32;
constexpr int64_t kFloatsPerThread = 1 << 16;  // below this, starting a thread costs more than it brings

enum Activation { kNone, kLeakyRelu, kGelu, kSilu };
constexpr float kSlope = 0.2f;

struct Problem {
  int64_t batch, pixels, channels, groups;
  int64_t tile, tiles;  // pixels in a tile, tiles in a sample

  Problem(int64_t batch, int64_t pixels, int64_t channels, int64_t groups)
      : batch(batch), pixels(pixels), channels(channels), groups(groups) {
    tile = std::max(kLeastTilePixels, kTileFloats / channels);
    tiles = (pixels + tile - 1) / tile;
  }
  int64_t group_size() const { return channels / groups; }
  int64_t tile_pixels(int64_t number) const { return std::min(tile, pixels - number * tile); }
  int useful_threads(int threads) const {
    return static_cast<int>(
        std::clamp<int64_t>(batch * pixels * channels / kFloatsPerThread, 1, threads));
  }
};

// VECTORS times LANES neighbouring channels, which a loop over pixels takes at once: whole cache lines, and
// sums that do not wait for each other. Where the vectors are few, several pixels go side by side.
template <int VECTORS_, bool WHOLE_>
struct Block {
  static constexpr int VECTORS = VECTORS_;
  static constexpr bool WHOLE = WHOLE_;  // else fewer than LANES channels
  static constexpr int PIXELS = 4 / VECTORS;
};

// Calls body(Block, first channel, how many there are in each vector) for all channels.
template <int LANES, int MOST_VECTORS, typename Body>
VFMVAE_INLINE void for_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  if (MOST_VECTORS >= 4)
    for (; c + 4 * LANES <= channels; c += 4 * LANES) body(Block<4, true>{}, c, LANES);
  for (; c + 2 * LANES <= channels; c += 2 * LANES) body(Block<2, true>{}, c, LANES);
  for (; c + LANES <= channels; c += LANES) body(Block<1, true>{}, c, LANES);
  if (c < channels) body(Block<1, false>{}, c, channels - c);
}

// One vector; beyond the last channel there are zeros, and nothing is stored.
template <int LANES, bool WHOLE, typename T>
VFMVAE_INLINE void get(const T* source, int64_t count, Floats<LANES>* value) {
  if (WHOLE) {
    load<LANES>(source, value);
  } else {
    load_some<LANES>(source, count, value);
  }
}
template <int LANES, bool WHOLE, typename T>
VFMVAE_INLINE void put(const Floats<LANES>& value, int64_t count, T* target) {
  if (WHOLE) {
    store<LANES>(value, target);
  } else {
    store_some<LANES>(value, count, target);
  }
}

template <int LANES>
VFMVAE_INLINE void sigmoid(const Floats<LANES>& z, Floats<LANES>* result) {
  Floats<LANES> e;
  exp_of_minus<LANES>(z < 0.0f ? -z : z, &e);
  *result = (z < 0.0f ? e : Floats<LANES>{} + 1.0f) / (1.0f + e);
}

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

// grad *= derivative of the activation at z.
template <int LANES, int ACTIVATION>
VFMVAE_INLINE void through_activation(const Floats<LANES>& z, Floats<LANES>* grad) {
  Floats<LANES> a, b;
  if (ACTIVATION == kLeakyRelu) *grad = z < 0.0f ? kSlope * *grad : *grad;
  if (ACTIVATION == kGelu) {
    normal_distribution<LANES>(z, &a, &b);
    *grad *= a + z * b;
  }
  if (ACTIVATION == kSilu) {
    sigmoid<LANES>(z, &a);
    *grad *= a * (1.0f + z * (1.0f - a));
  }
}

// Calls body(pixel, chain) for all pixels, with the chains 0 to PIXELS - 1 in turn.
template <int PIXELS, typename Body>
VFMVAE_INLINE void for_pixels(int64_t pixels, const Body& body) {
  int64_t p = 0;
  for (; p + PIXELS <= pixels; p += PIXELS) {
#pragma GCC unroll 4
    for (int chain = 0; chain < PIXELS; ++chain) body(p + chain, chain);
  }
  for (; p < pixels; ++p) body(p, 0);
}

// The sum over the chains.
template <int LANES, int PIXELS>
VFMVAE_INLINE void total(const Floats<LANES>* chains, Floats<LANES>* sum) {
  *sum = chains[0];
#pragma GCC unroll 4
  for (int chain = 1; chain < PIXELS; ++chain) *sum += chains[chain];
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

// What the loops over a tile know of its sample, a number per channel.
struct Channels {
  const float *mean, *rstd, *weight, *bias;
  const float *of_grad, *of_product;  // backward: means over the group of w dz, and of w dz xhat
};

// The channels of one vector, and what was normalised with what.
template <int LANES>
struct Normed {
  Floats<LANES> mean, rstd, weight, bias;

  template <bool WHOLE>
  VFMVAE_INLINE void read(const Channels& of, int64_t c, int64_t count) {
    get<LANES, WHOLE>(of.mean + c, count, &mean);
    get<LANES, WHOLE>(of.rstd + c, count, &rstd);
    get<LANES, WHOLE>(of.weight + c, count, &weight);
    get<LANES, WHOLE>(of.bias + c, count, &bias);
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

// Sums over the pixels of a tile of dz and of dz xhat, dz the gradient before the activation.
template <typename T, int ACTIVATION>
struct TileSums {
  template <int LANES>
  static VFMVAE_INLINE void run(const T* x, const T* grad, int64_t pixels, int64_t channels, const Channels& of,
                                float* of_grad, float* of_product) {
    for_channels<LANES, 2>(channels, [&](auto block, int64_t c, int64_t count) VFMVAE_INLINE_BODY {
      using B = decltype(block);
      Normed<LANES> n[B::VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < B::VECTORS; ++v) n[v].template read<B::WHOLE>(of, c + v * LANES, count);
      Floats<LANES> sums[B::VECTORS][B::PIXELS] = {}, products[B::VECTORS][B::PIXELS] = {};
      for_pixels<B::PIXELS>(pixels, [&](int64_t p, int chain) VFMVAE_INLINE_BODY {
#pragma GCC unroll 4
        for (int v = 0; v < B::VECTORS; ++v) {
          const int64_t place = p * channels + c + v * LANES;
          Floats<LANES> value, dz;
          get<LANES, B::WHOLE>(x + place, count, &value);
          get<LANES, B::WHOLE>(grad + place, count, &dz);
          value = (value - n[v].mean) * n[v].rstd;
          through_activation<LANES, ACTIVATION>(value * n[v].weight + n[v].bias, &dz);
          sums[v][chain] += dz;
          products[v][chain] += dz * value;
        }
      });
#pragma GCC unroll 4
      for (int v = 0; v < B::VECTORS; ++v) {
        Floats<LANES> sum, product;
        total<LANES, B::PIXELS>(sums[v], &sum);
        total<LANES, B::PIXELS>(products[v], &product);
        put<LANES, B::WHOLE>(sum, count, of_grad + c + v * LANES);
        put<LANES, B::WHOLE>(product, count, of_product + c + v * LANES);
      }
    });
  }
};

// dx = rstd (w dz - mean of w dz - xhat * mean of w dz xhat), the means over the group.
template <typename T, int ACTIVATION>
struct BackwardTile {
  template <int LANES>
  static VFMVAE_INLINE void run(const T* x, const T* grad, int64_t pixels, int64_t channels, const Channels& of,
                                T* out) {
    for_channels<LANES, 2>(channels, [&](auto block, int64_t c, int64_t count) VFMVAE_INLINE_BODY {
      using B = decltype(block);
      Normed<LANES> n[B::VECTORS];
      Floats<LANES> of_grad[B::VECTORS], of_product[B::VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < B::VECTORS; ++v) {
        n[v].template read<B::WHOLE>(of, c + v * LANES, count);
        get<LANES, B::WHOLE>(of.of_grad + c + v * LANES, count, &of_grad[v]);
        get<LANES, B::WHOLE>(of.of_product + c + v * LANES, count, &of_product[v]);
      }
      for (int64_t p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < B::VECTORS; ++v) {
          const int64_t place = p * channels + c + v * LANES;
          Floats<LANES> value, dz;
          get<LANES, B::WHOLE>(x + place, count, &value);
          get<LANES, B::WHOLE>(grad + place, count, &dz);
          value = (value - n[v].mean) * n[v].rstd;
          through_activation<LANES, ACTIVATION>(value * n[v].weight + n[v].bias, &dz);
          put<LANES, B::WHOLE>(n[v].rstd * (n[v].weight * dz - of_grad[v] - value * of_product[v]), count,
                               out + place);
        }
      }
    });
  }
};

// Calls body with the activation as a compile-time constant.
template <typename Body>
void with_activation(const std::string& name, const Body& body) {
  if (name == "none") return body(std::integral_constant<int, kNone>{});
  if (name == "leaky_relu") return body(std::integral_constant<int, kLeakyRelu>{});
  if (name == "gelu") return body(std::integral_constant<int, kGelu>{});
  if (name == "silu") return body(std::integral_constant<int, kSilu>{});
  throw std::invalid_argument("activation " + name + " is not one of none, leaky_relu, gelu, silu");
}

// Calls body(sample, tile number, first element, pixels) for every tile.
template <typename Body>
void for_tiles(const Problem& p, int threads, const Body& body) {
  parallel_for(p.batch * p.tiles, p.useful_threads(threads), [&](int64_t item, int) {
    const int64_t sample = item / p.tiles, number = item % p.tiles;
    body(sample, item, (sample * p.pixels + number * p.tile) * p.channels, p.tile_pixels(number));
  });
}

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

// A number per (sample, group) as one per (sample, channel).
std::vector<float> per_channel(const Problem& p, const float* per_group) {
  std::vector<float> result(p.batch * p.channels);
  for (int64_t i = 0; i < p.batch * p.channels; ++i)
    result[i] = per_group[i / p.channels * p.groups + i % p.channels / p.group_size()];
  return result;
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

// Sums [B, C] from those of tiles [B, tiles, C].
std::vector<float> sum_of_tiles(const Problem& p, const std::vector<float>& of_tiles) {
  std::vector<float> result(p.batch * p.channels);
  for (int64_t item = 0; item < p.batch * p.tiles; ++item)
    add_to(result.data() + item / p.tiles * p.channels, of_tiles.data() + item * p.channels, p.channels);
  return result;
}

// Means over a sample's group of weight * sum, as one number per (sample, channel).
std::vector<float> group_means(const Problem& p, const std::vector<float>& sums, const float* weight) {
  std::vector<float> of_groups(p.batch * p.groups);
  for (int64_t i = 0; i < p.batch * p.channels; ++i) {
    const int64_t c = i % p.channels;
    of_groups[i / p.channels * p.groups + c / p.group_size()] += weight[c] * sums[i];
  }
  const float share = 1.0f / static_cast<float>(p.pixels * p.group_size());
  for (float& value : of_groups) value *= share;
  return per_channel(p, of_groups.data());
}

void sum_over_samples(const Problem& p, const std::vector<float>& sums, uintptr_t address) {
  float* target = reinterpret_cast<float*>(address);
  std::fill_n(target, p.channels, 0.0f);
  for (int64_t sample = 0; sample < p.batch; ++sample)
    add_to(target, sums.data() + sample * p.channels, p.channels);
}

template <typename T>
void run_backward(const GroupNormTensors& tensors, uintptr_t grad_address, uintptr_t grad_weight,
                  uintptr_t grad_bias, const Problem& p, const std::string& activation, int threads) {
  const T* x = reinterpret_cast<const T*>(tensors.x);
  const T* grad = reinterpret_cast<const T*>(grad_address);
  const float* weight = reinterpret_cast<const float*>(tensors.weight);
  const std::vector<float> mean_of = per_channel(p, reinterpret_cast<const float*>(tensors.mean));
  const std::vector<float> rstd_of = per_channel(p, reinterpret_cast<const float*>(tensors.rstd));
  Channels all{mean_of.data(), rstd_of.data(), weight, reinterpret_cast<const float*>(tensors.bias), nullptr,
               nullptr};
  const auto of_sample = [&](int64_t sample) {
    const int64_t shift = sample * p.channels;
    const auto moved = [&](const float* base) { return base == nullptr ? nullptr : base + shift; };
    return Channels{all.mean + shift, all.rstd + shift, all.weight, all.bias, moved(all.of_grad),
                    moved(all.of_product)};
  };
  std::vector<float> grads(p.batch * p.tiles * p.channels), products(grads.size());
  with_activation(activation, [&](auto kind) {
    for_tiles(p, threads, [&](int64_t sample, int64_t item, int64_t first, int64_t pixels) {
      for_best_isa<TileSums<T, decltype(kind)::value>>(
          x + first, grad + first, pixels, p.channels, of_sample(sample), grads.data() + item * p.channels,
          products.data() + item * p.channels);
    });
    const std::vector<float> of_grad = sum_of_tiles(p, grads), of_product = sum_of_tiles(p, products);
    sum_over_samples(p, of_product, grad_weight);
    sum_over_samples(p, of_grad, grad_bias);
    const std::vector<float> mean_grad = group_means(p, of_grad, weight);
    const std::vector<float> mean_product = group_means(p, of_product, weight);
    all.of_grad = mean_grad.data();
    all.of_product = mean_product.data();
    for_tiles(p, threads, [&](int64_t sample, int64_t, int64_t first, int64_t pixels) {
      for_best_isa<BackwardTile<T, decltype(kind)::value>>(x + first, grad + first, pixels, p.channels,
                                                           of_sample(sample),
                                                           reinterpret_cast<T*>(tensors.out) + first);
    });
  });
}

Problem checked(int64_t batch, int64_t pixels, int64_t channels, int64_t groups, int threads, DType type) {
  check_at_least("batch", batch, 0);
  check_at_least("pixels", pixels, 1);
  check_at_least("groups", groups, 1);
  check_at_least("threads", threads, 1);
  check(channels >= groups && channels % groups == 0,
        std::to_string(channels) + " channels cannot be divided into " + std::to_string(groups) + " groups");
  check(type != DType::kFloat16, "group_norm on the CPU takes float32 and bfloat16, not float16");
  return Problem(batch, pixels, channels, groups);
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

void group_norm_backward_cpu(const GroupNormTensors& tensors, uintptr_t grad, uintptr_t grad_weight,
                             uintptr_t grad_bias, const std::string& dtype, int64_t batch, int64_t pixels,
                             int64_t channels, int64_t groups, const std::string& activation, int threads) {
  const DType type = parse_dtype(dtype);
  const Problem problem = checked(batch, pixels, channels, groups, threads, type);
  if (type == DType::kFloat32) {
    run_backward<float>(tensors, grad, grad_weight, grad_bias, problem, activation, threads);
  } else {
    run_backward<BFloat16>(tensors, grad, grad_weight, grad_bias, problem, activation, threads);
  }
}

}  // namespace vfmvae
