// The tail of a modulated ConvNeXt layer on the CPU:
//
//     u = W1 (v * x)      h = d * u + b1      out = residual + W2 gelu(h) + b2
//
// with v per sample and input channel, d per sample and hidden channel. Rows (pixels) go through in tiles
// whose hidden numbers stay in the cache; the backward pass computes them again. Rows are cut into bands
// whose sums are added in order, so that the number of threads does not show in the result.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "modulated_mlp.h"
#include "parallel.h"
#include "products.h"
#include "simd.h"

namespace vfmvae {
namespace {

using namespace modulated_mlp;

// target[r][c] = source[r][c] * scale[c], scale of whole vectors.
template <int LANES, typename T>
VFMVAE_INLINE void load_rows(const T* source, int64_t rows, int64_t channels, const float* scale,
                             float* target, int64_t stride) {
  Floats<LANES> value, factor;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < channels; c += LANES) {
      if (c + LANES <= channels) {
        load<LANES>(source + r * channels + c, &value);
      } else {
        load_some<LANES>(source + r * channels + c, channels - c, &value);
      }
      if (scale != nullptr) {
        load<LANES>(scale + c, &factor);
        value *= factor;
      }
      store<LANES>(value, target + r * stride + c);
    }
  }
}

template <typename T>
struct ForwardTile {
  template <int LANES>
  static VFMVAE_INLINE void run(const Problem& p, const Inputs<T>& in, int64_t first_row, int64_t rows,
                                Tile* const& tile) {
    const int64_t first = first_row * p.channels;
    float *input = tile->input.data(), *hidden = tile->hidden.data(), *result = tile->input_grad.data();
    load_rows<LANES>(in.x + first, rows, p.channels, tile->style.data(), input, p.padded_channels);
    product<LANES>(input, p.padded_channels, rows, *in.expand, hidden);
    activate<LANES>(hidden, rows, p.padded_hidden, tile->demodulation.data(), tile->bias.data());
    product<LANES>(hidden, p.padded_hidden, rows, *in.contract, result);
    Floats<LANES> value, bias;
    for (int64_t r = 0; r < rows; ++r) {
      const T* residual = in.residual + first + r * p.channels;
      T* out = in.out + first + r * p.channels;
      for (int64_t c = 0; c < p.channels; c += LANES) {
        const int64_t count = std::min<int64_t>(LANES, p.channels - c);
        Floats<LANES> sum;
        load<LANES>(result + r * p.padded_channels + c, &sum);
        if (count == LANES) {
          load<LANES>(residual + c, &value);
          load<LANES>(in.contract_bias + c, &bias);
          store<LANES>(value + sum + bias, out + c);
        } else {
          load_some<LANES>(residual + c, count, &value);
          load_some<LANES>(in.contract_bias + c, count, &bias);
          store_some<LANES>(value + sum + bias, count, out + c);
        }
      }
    }
  }

 private:
  template <int LANES>
  static VFMVAE_INLINE void activate(float* hidden, int64_t rows, int64_t width, const float* demodulation,
                                     const float* bias) {
    Floats<LANES> u, d, b, below, density;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t e = 0; e < width; e += LANES) {
        load<LANES>(hidden + r * width + e, &u);
        load<LANES>(demodulation + e, &d);
        load<LANES>(bias + e, &b);
        const Floats<LANES> h = u * d + b;
        normal_distribution<LANES>(h, &below, &density);
        store<LANES>(h * below, hidden + r * width + e);
      }
    }
  }
};

template <typename T>
struct BackwardTile {
  // `sums`: null where no gradients of weights are asked for.
  template <int LANES>
  static VFMVAE_INLINE void run(const Problem& p, const Inputs<T>& in, int64_t first_row, int64_t rows,
                                Tile* const& tile, BandSums* const& sums) {
    const int64_t first = first_row * p.channels, stride = p.padded_channels;
    float *input = tile->input.data(), *grad = tile->grad.data(), *input_grad = tile->input_grad.data();
    float *linear = tile->linear.data(), *hidden = tile->hidden.data();
    load_rows<LANES>(in.x + first, rows, p.channels, tile->style.data(), input, stride);
    load_rows<LANES>(in.grad + first, rows, p.channels, nullptr, grad, stride);
    product<LANES>(input, stride, rows, *in.expand, linear);
    product<LANES>(grad, stride, rows, *in.contract_back, hidden);
    through_activation<LANES>(p, rows, tile, sums == nullptr ? nullptr : sums->expand_bias.data());
    product<LANES>(hidden, p.padded_hidden, rows, *in.expand_back, input_grad);
    through_style<LANES>(p, in, first, rows, tile);
    if (sums == nullptr) return;
    add_inner_product<LANES>(input, p.channels, stride, hidden, p.padded_hidden, rows, sums->expand.data());
    add_inner_product<LANES>(linear, p.hidden, p.padded_hidden, grad, stride, rows, sums->contract.data());
    Floats<LANES> g;
    for (int64_t c = 0; c < stride; c += LANES) {
      Floats<LANES> sum = {};
      for (int64_t r = 0; r < rows; ++r) {
        load<LANES>(grad + r * stride + c, &g);
        sum += g;
      }
      add<LANES>(sum, sums->contract_bias.data() + c);
    }
  }

 private:
  template <int LANES>
  static VFMVAE_INLINE void add(const Floats<LANES>& sum, float* target) {
    Floats<LANES> before;
    load<LANES>(target, &before);
    store<LANES>(before + sum, target);
  }

  // linear: u -> gelu(h); hidden: gradient of gelu(h) -> gradient of u.
  template <int LANES>
  static VFMVAE_INLINE void through_activation(const Problem& p, int64_t rows, Tile* tile, float* bias_sums) {
    const int64_t width = p.padded_hidden;
    for (int64_t e = 0; e < width; e += LANES) {
      Floats<LANES> d, b, u, g, below, density, of_bias = {}, of_demodulation = {};
      load<LANES>(tile->demodulation.data() + e, &d);
      load<LANES>(tile->bias.data() + e, &b);
      for (int64_t r = 0; r < rows; ++r) {
        load<LANES>(tile->linear.data() + r * width + e, &u);
        load<LANES>(tile->hidden.data() + r * width + e, &g);
        const Floats<LANES> h = u * d + b;
        normal_distribution<LANES>(h, &below, &density);
        g *= below + h * density;
        of_bias += g;
        of_demodulation += g * u;
        store<LANES>(g * d, tile->hidden.data() + r * width + e);
        if (bias_sums != nullptr) store<LANES>(h * below, tile->linear.data() + r * width + e);
      }
      add<LANES>(of_demodulation, tile->demodulation_sums.data() + e);
      if (bias_sums != nullptr) add<LANES>(of_bias, bias_sums + e);
    }
  }

  // input_grad: gradient of v * x; writes that of x, and sums that of v.
  template <int LANES>
  static VFMVAE_INLINE void through_style(const Problem& p, const Inputs<T>& in, int64_t first, int64_t rows,
                                          Tile* tile) {
    for (int64_t c = 0; c < p.channels; c += LANES) {
      const int64_t count = std::min<int64_t>(LANES, p.channels - c);
      Floats<LANES> v, g, x, of_style = {};
      load<LANES>(tile->style.data() + c, &v);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = first + r * p.channels + c;
        load<LANES>(tile->input_grad.data() + r * p.padded_channels + c, &g);
        if (count == LANES) {
          load<LANES>(in.x + place, &x);
          store<LANES>(g * v, in.out + place);
        } else {
          load_some<LANES>(in.x + place, count, &x);
          store_some<LANES>(g * v, count, in.out + place);
        }
        of_style += g * x;
      }
      add<LANES>(of_style, tile->style_sums.data() + c);
    }
  }
};

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

// Rows and columns of a matrix [columns][rows] in memory.
Panels packed_transpose(const float* matrix, int64_t depth, int64_t width) {
  return Panels(depth, width, best_lanes(), [=](int64_t k, int64_t n) { return matrix[n * depth + k]; });
}
Panels packed(const float* matrix, int64_t depth, int64_t width) {
  return Panels(depth, width, best_lanes(), [=](int64_t k, int64_t n) { return matrix[k * width + n]; });
}

template <typename T>
void run_forward(Inputs<T> in, const Problem& p, const ModulatedMlpWeights& weights, int threads) {
  const Panels expand = packed_transpose(floats(weights.expand), p.channels, p.hidden);
  const Panels contract = packed_transpose(floats(weights.contract), p.hidden, p.channels);
  in.expand = &expand;
  in.contract = &contract;
  threads = p.useful_threads(threads);
  std::vector<Tile> own(threads, Tile(p));
  parallel_for(p.batch * p.tiles, threads, [&](int64_t item, int worker) {
    const int64_t sample = item / p.tiles, row = item % p.tiles * p.tile_rows;
    own[worker].enter_sample(p, in, sample);
    for_best_isa<ForwardTile<T>>(p, in, sample * p.pixels + row, std::min(p.tile_rows, p.pixels - row),
                                 &own[worker]);
  });
}

// transposed: target [columns][rows] from sums [rows][stride].
void add_transposed(const std::vector<float>& sums, int64_t rows, int64_t columns, int64_t stride,
                    float* target) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) target[c * rows + r] += sums[r * stride + c];
}

template <typename T>
void run_backward(Inputs<T> in, const Problem& p, const ModulatedMlpWeights& weights,
                  const ModulatedMlpGradients& gradients, int threads) {
  const Panels expand = packed_transpose(floats(weights.expand), p.channels, p.hidden);
  const Panels expand_back = packed(floats(weights.expand), p.hidden, p.channels);
  const Panels contract_back = packed(floats(weights.contract), p.channels, p.hidden);
  in.expand = &expand;
  in.expand_back = &expand_back;
  in.contract_back = &contract_back;
  threads = p.useful_threads(threads);
  std::vector<Tile> own(threads, Tile(p));
  const bool of_weights = gradients.expand != 0;
  std::vector<BandSums> sums(of_weights ? p.bands : 0, BandSums(p));
  // Of the style, and of the demodulation: a row per tile, since a band may end within a sample.
  const int64_t tiles = p.batch * p.tiles, width = p.channels + p.hidden;
  std::vector<float> of_tiles(tiles * width);
  parallel_for(p.bands, threads, [&](int64_t band, int worker) {
    Tile& tile = own[worker];
    for (int64_t item = p.first_tile(band); item < p.first_tile(band + 1); ++item) {
      const int64_t sample = item / p.tiles, row = item % p.tiles * p.tile_rows;
      tile.enter_sample(p, in, sample);
      std::fill(tile.style_sums.begin(), tile.style_sums.end(), 0.0f);
      std::fill(tile.demodulation_sums.begin(), tile.demodulation_sums.end(), 0.0f);
      for_best_isa<BackwardTile<T>>(p, in, sample * p.pixels + row, std::min(p.tile_rows, p.pixels - row),
                                    &tile, of_weights ? &sums[band] : nullptr);
      float* target = of_tiles.data() + item * width;
      std::copy_n(tile.style_sums.begin(), p.channels, target);
      std::copy_n(tile.demodulation_sums.begin(), p.hidden, target + p.channels);
    }
  });
  float *style = reinterpret_cast<float*>(gradients.style);
  float *demodulation = reinterpret_cast<float*>(gradients.demodulation);
  std::fill_n(style, p.batch * p.channels, 0.0f);
  std::fill_n(demodulation, p.batch * p.hidden, 0.0f);
  for (int64_t item = 0; item < tiles; ++item) {
    const float* source = of_tiles.data() + item * width;
    add_to(style + item / p.tiles * p.channels, source, p.channels);
    add_to(demodulation + item / p.tiles * p.hidden, source + p.channels, p.hidden);
  }
  if (!of_weights) return;
  const auto target = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
  std::fill_n(target(gradients.expand), p.hidden * p.channels, 0.0f);
  std::fill_n(target(gradients.contract), p.hidden * p.channels, 0.0f);
  std::fill_n(target(gradients.expand_bias), p.hidden, 0.0f);
  std::fill_n(target(gradients.contract_bias), p.channels, 0.0f);
  for (const BandSums& band : sums) {
    add_transposed(band.expand, p.channels, p.hidden, p.padded_hidden, target(gradients.expand));
    add_transposed(band.contract, p.hidden, p.channels, p.padded_channels, target(gradients.contract));
    add_to(target(gradients.expand_bias), band.expand_bias.data(), p.hidden);
    add_to(target(gradients.contract_bias), band.contract_bias.data(), p.channels);
  }
}

template <typename T>
Inputs<T> inputs(uintptr_t x, const ModulatedMlpWeights& weights, uintptr_t out) {
  Inputs<T> in{};
  in.x = reinterpret_cast<const T*>(x);
  in.style = floats(weights.style);
  in.demodulation = floats(weights.demodulation);
  in.expand_bias = floats(weights.expand_bias);
  in.contract_bias = floats(weights.contract_bias);
  in.out = reinterpret_cast<T*>(out);
  return in;
}

DType checked(const std::string& dtype, int64_t batch, int64_t pixels, int64_t channels, int64_t hidden,
              int threads) {
  check_at_least("batch", batch, 0);
  check_at_least("pixels", pixels, 0);
  check_at_least("channels", channels, 1);
  check_at_least("hidden", hidden, 1);
  check_at_least("threads", threads, 1);
  const DType type = parse_dtype(dtype);
  check(type != DType::kFloat16, "modulated_mlp on the CPU takes float32 and bfloat16, not float16");
  return type;
}

}  // namespace

void modulated_mlp_cpu(uintptr_t x, uintptr_t residual, const ModulatedMlpWeights& weights, uintptr_t out,
                       const std::string& dtype, int64_t batch, int64_t pixels, int64_t channels,
                       int64_t hidden, int threads) {
  const DType type = checked(dtype, batch, pixels, channels, hidden, threads);
  const Problem problem(batch, pixels, channels, hidden, best_lanes());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Inputs<T> in = inputs<T>(x, weights, out);
    in.residual = reinterpret_cast<const T*>(residual);
    run_forward(in, problem, weights, threads);
  };
  if (type == DType::kFloat32) {
    run(float{});
  } else {
    run(BFloat16{});
  }
}

void modulated_mlp_backward_cpu(uintptr_t x, uintptr_t grad, const ModulatedMlpWeights& weights,
                                const ModulatedMlpGradients& gradients, const std::string& dtype,
                                int64_t batch, int64_t pixels, int64_t channels, int64_t hidden,
                                int threads) {
  const DType type = checked(dtype, batch, pixels, channels, hidden, threads);
  const Problem problem(batch, pixels, channels, hidden, best_lanes());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Inputs<T> in = inputs<T>(x, weights, gradients.x);
    in.grad = reinterpret_cast<const T*>(grad);
    run_backward(in, problem, weights, gradients, threads);
  };
  if (type == DType::kFloat32) {
    run(float{});
  } else {
    run(BFloat16{});
  }
}

}  // namespace vfmvae
