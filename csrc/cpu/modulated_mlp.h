// How the work of modulated_mlp.cpp is cut up, and what its threads read and sum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "products.h"

namespace vfmvae::modulated_mlp {

constexpr int64_t kHiddenFloats = 1 << 15;  // of one tile and one of two buffers: all lie in the L2 cache
constexpr int64_t kLeastTileRows = 24;
constexpr int64_t kMostTileRows = 192;
constexpr int64_t kBandRows = 512;               // at least, so that a band's sums are little beside its work
constexpr int64_t kMostBands = 16;               // the sums of all bands lie in memory at once
constexpr int64_t kProductsPerThread = 1 << 21;  // below this, starting a thread costs more than it brings

struct Problem {
  int64_t batch, pixels, channels, hidden;
  int64_t padded_channels, padded_hidden;  // to whole vectors
  int64_t tile_rows, tiles, bands;         // tiles per sample; bands in all

  Problem(int64_t batch, int64_t pixels, int64_t channels, int64_t hidden, int lanes)
      : batch(batch), pixels(pixels), channels(channels), hidden(hidden) {
    padded_channels = round_up(channels, lanes);
    padded_hidden = round_up(hidden, lanes);
    const int64_t rows = std::clamp(kHiddenFloats / padded_hidden, kLeastTileRows, kMostTileRows);
    tile_rows = rows / 12 * 12;  // a multiple of every kProductRows
    tiles = (pixels + tile_rows - 1) / tile_rows;
    const int64_t most = std::min({kMostBands, batch * tiles, batch * pixels / kBandRows});
    bands = std::max<int64_t>(1, most);
  }
  // The first tile of a band; tiles are counted over all samples.
  int64_t first_tile(int64_t band) const { return batch * tiles * band / bands; }
  int useful_threads(int threads) const {
    const int64_t products = batch * pixels * channels * hidden * 2;
    return static_cast<int>(std::clamp<int64_t>(products / kProductsPerThread, 1, threads));
  }
};

// What all threads read.
template <typename T>
struct Inputs {
  const T *x, *residual, *grad;  // residual forward only, grad backward only
  const float *style, *demodulation, *expand_bias, *contract_bias;
  const Panels *expand, *contract;            // [C][E], [E][C]
  const Panels *expand_back, *contract_back;  // [E][C], [C][E]; backward only
  T* out;                                     // the result, or the gradient of x
};

// Sums of one band. Matrices are padded to whole vectors in their last dimension.
struct BandSums {
  std::vector<float> expand, contract;  // [C][E], [E][C]
  std::vector<float> expand_bias, contract_bias;

  explicit BandSums(const Problem& p)
      : expand(p.channels * p.padded_hidden),
        contract(p.hidden * p.padded_channels),
        expand_bias(p.padded_hidden),
        contract_bias(p.padded_channels) {}
};

// One thread's tile: rows of a sample, floats padded with zeros to whole vectors.
struct Tile {
  std::vector<float> input, grad, input_grad;    // [rows][C]
  std::vector<float> linear, hidden;             // [rows][E]
  std::vector<float> style, demodulation, bias;  // of the present sample: [C], [E], [E]
  std::vector<float> style_sums, demodulation_sums;

  explicit Tile(const Problem& p)
      : input(p.tile_rows * p.padded_channels),
        grad(input.size()),
        input_grad(input.size()),
        linear(p.tile_rows * p.padded_hidden),
        hidden(linear.size()),
        style(p.padded_channels),
        demodulation(p.padded_hidden),
        bias(p.padded_hidden),
        style_sums(p.padded_channels),
        demodulation_sums(p.padded_hidden) {}

  template <typename T>
  void enter_sample(const Problem& p, const Inputs<T>& in, int64_t sample) {
    std::copy_n(in.style + sample * p.channels, p.channels, style.begin());
    std::copy_n(in.demodulation + sample * p.hidden, p.hidden, demodulation.begin());
    std::copy_n(in.expand_bias, p.hidden, bias.begin());
  }
};

}  // namespace vfmvae::modulated_mlp
