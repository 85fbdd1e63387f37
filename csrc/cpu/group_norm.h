// What group norm's two passes on the CPU share: tiles, blocks of channels, and their vectors.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "parallel.h"
#include "simd.h"

namespace vfmvae {
namespace norm {

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

// A number per (sample, group) as one per (sample, channel).
inline std::vector<float> per_channel(const Problem& p, const float* per_group) {
  std::vector<float> result(p.batch * p.channels);
  for (int64_t i = 0; i < p.batch * p.channels; ++i)
    result[i] = per_group[i / p.channels * p.groups + i % p.channels / p.group_size()];
  return result;
}

inline Problem checked(int64_t batch, int64_t pixels, int64_t channels, int64_t groups, int threads,
                       DType type) {
  check_at_least("batch", batch, 0);
  check_at_least("pixels", pixels, 1);
  check_at_least("groups", groups, 1);
  check_at_least("threads", threads, 1);
  check(channels >= groups && channels % groups == 0,
        std::to_string(channels) + " channels cannot be divided into " + std::to_string(groups) + " groups");
  check(type != DType::kFloat16, "group_norm on the CPU takes float32 and bfloat16, not float16");
  return Problem(batch, pixels, channels, groups);
}

}  // namespace norm
}  // namespace vfmvae
