// The gradients of group norm on the CPU, channels-last. With z what enters the activation, xhat the normalised
// x and dz the gradient of z:
//
//     dbias = sum dz    dweight = sum dz xhat    dx = rstd (w dz - mean of w dz - xhat * mean of w dz xhat)
//
// The sums are over pixels and samples, the means over the group of a sample. As in the forward pass, sums of
// tiles are added in order, so the number of threads does not show.
#include <string>
#include <vector>

#include "group_norm.h"

namespace vfmvae {
namespace {

using namespace norm;

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

}  // namespace

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
