// Host entries of every operation: what bindings.cpp names. Pointers are addresses of dense memory; images
// lie channels-last ([B, H, W, C]). Bad arguments throw std::invalid_argument.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace vfmvae {

// Pixel-shuffle by `upscale` (1: none), binomial blur with replicated borders, + residual (0: none).
// `batch`, `height`, `width` count the input's pixels, `channels` the output's channels:
//   forward   x [B, H, W, C*upscale^2]       -> out [B, H*upscale, W*upscale, C]
//   adjoint   x [B, H*upscale, W*upscale, C] -> out [B, H, W, C*upscale^2]     (the exact transpose; no
//   residual)
// x, residual and out have the same dtype: float32, bfloat16 and, on CUDA, float16. Sums are in float32.
void upsample_blur_cpu(uintptr_t x, uintptr_t residual, uintptr_t out, const std::string& dtype,
                       int64_t batch, int64_t height, int64_t width, int64_t channels, int kernel_size,
                       int upscale, bool adjoint, int threads);
void upsample_blur_cuda(uintptr_t x, uintptr_t residual, uintptr_t out, const std::string& dtype,
                        int64_t batch, int64_t height, int64_t width, int64_t channels, int kernel_size,
                        int upscale, bool adjoint, int device, uintptr_t stream);

// Weight and bias gradient of a depthwise convolution of odd size k, "same" zero padding, stride 1:
//   x, grad [B, H, W, C], float32 or bfloat16  ->  out [k*k + 1, C] float32, the bias in the last row
void depthwise_weight_gradient_cpu(uintptr_t x, uintptr_t grad, uintptr_t out, const std::string& dtype,
                                   int64_t batch, int64_t height, int64_t width, int64_t channels,
                                   int kernel_size, int threads);
// The same, with float16 too. `partials` is scratch memory, float32 [parts, k*k + 1, C]; the sums of part p
// are over the tiles p, p + parts, ... An image is cut into strips of `strip_rows` rows.
void depthwise_weight_gradient_cuda(uintptr_t x, uintptr_t grad, uintptr_t partials, uintptr_t out,
                                    const std::string& dtype, int64_t batch, int64_t height, int64_t width,
                                    int64_t channels, int kernel_size, int strip_rows, int parts, int device,
                                    uintptr_t stream);

// Addresses; 0 where there is none. x and out have the dtype of the op, the others are float32.
struct DepthwiseTensors {
  uintptr_t x, weight, bias, noise;  // [B, H, W, C], [C, k, k], [C] or 0, [H, W] or 0
  uintptr_t out;
  uintptr_t partials, counts;  // [B, tiles, 2, C], [tiles], or 0
};

// Depthwise convolution of odd size k (3, 5, 7), "same" zero padding, stride 1. `flipped` turns the weights
// by half a circle: the input gradient from the output's. An image is cut into strips of `strip_rows` rows.
// `partials` become, per channel of each tile of out, the mean and the sum of the squared deviations from it;
// `counts` the pixels of each tile. tiles = ceil(H / strip_rows) * ceil(W / 4).
void depthwise_conv_cuda(const DepthwiseTensors& tensors, const std::string& dtype, int64_t batch,
                         int64_t height, int64_t width, int64_t channels, int kernel_size, bool flipped,
                         int strip_rows, int device, uintptr_t stream);

// Addresses of float32 tensors, E hidden channels.
struct ModulatedMlpWeights {
  uintptr_t style, demodulation;      // [B, C], [B, E]
  uintptr_t expand, expand_bias;      // [E, C], [E]
  uintptr_t contract, contract_bias;  // [C, E], [C]
};
// `x` has the dtype of the op's x, the others are float32 and as those of the weights; where `expand` is 0,
// gradients of expand, contract and their biases are not computed.
struct ModulatedMlpGradients {
  uintptr_t x, style, demodulation;
  uintptr_t expand, expand_bias, contract, contract_bias;
};

// out = residual + contract gelu(demodulation * (expand (style * x)) + expand_bias) + contract_bias
// with x, residual, out [B, pixels, C], float32 or bfloat16; sums are in float32.
void modulated_mlp_cpu(uintptr_t x, uintptr_t residual, const ModulatedMlpWeights& weights, uintptr_t out,
                       const std::string& dtype, int64_t batch, int64_t pixels, int64_t channels,
                       int64_t hidden, int threads);
// Gradients of all but the residual, whose gradient is `grad`, from grad [B, pixels, C].
void modulated_mlp_backward_cpu(uintptr_t x, uintptr_t grad, const ModulatedMlpWeights& weights,
                                const ModulatedMlpGradients& gradients, const std::string& dtype,
                                int64_t batch, int64_t pixels, int64_t channels, int64_t hidden, int threads);

// Addresses. x and out have the dtype of the op, the others are float32.
struct GroupNormTensors {
  uintptr_t x, weight, bias;  // [B, pixels, C], [C], [C]
  uintptr_t mean, rstd, out;  // [B, groups] twice, [B, pixels, C]
};

// out = activation((x - mean) * rstd * weight + bias) with the mean and 1 / sqrt(variance + eps) of every
// group of C / groups channels over all pixels, which are results too. Sums are in float32 or better.
void group_norm_cpu(const GroupNormTensors& tensors, const std::string& dtype, int64_t batch, int64_t pixels,
                    int64_t channels, int64_t groups, double eps, const std::string& activation, int threads);
// From grad [B, pixels, C]: `out` becomes the gradient of x; those of weight and bias are float32 [C].
void group_norm_backward_cpu(const GroupNormTensors& tensors, uintptr_t grad, uintptr_t grad_weight,
                             uintptr_t grad_bias, const std::string& dtype, int64_t batch, int64_t pixels,
                             int64_t channels, int64_t groups, const std::string& activation, int threads);

// Addresses for CUDA. x and out have the dtype of the op, the others are float32; style may be 0.
struct GroupNormCudaTensors {
  uintptr_t x, weight, bias, style;  // [B, pixels, C], [C], [C], [B, C]
  uintptr_t partials, counts;        // [B, tiles, 2, C], [tiles]: workspace, or statistics that are given
  uintptr_t table;                   // [B, 5, C]: what the backward needs of the statistics
  uintptr_t out;                     // [B, pixels, C]
};

// Tiles into which the CUDA form cuts a sample.
int64_t group_norm_tiles(int64_t batch, int64_t pixels, int64_t channels);

// out = activation(style * ((x - mean) * rstd * weight + bias)). With given_tiles > 0 the statistics are
// given: partials [B, given_tiles, 2, C] holds the mean of each channel over a tile's pixels, and the sum of
// squared deviations from it, and counts [given_tiles] how many pixels that are. With 0, and for small maps,
// they are computed from x.
void group_norm_cuda(const GroupNormCudaTensors& tensors, const std::string& dtype, int64_t batch,
                     int64_t pixels, int64_t channels, int64_t groups, int64_t given_tiles, double eps,
                     const std::string& activation, int device, uintptr_t stream);

// out (the gradient that comes in) and x have the dtype of the op, the others are float32.
struct GroupNormCudaGradients {
  uintptr_t out, x, weight, bias, style;  // weight and bias, or style, may be 0: not computed
  uintptr_t coefficients;                 // [B, 4, C], workspace
};

// `tensors` as above with the table of the forward; partials [B, group_norm_tiles(...), 2, C] is a workspace,
// counts and out are not used.
void group_norm_backward_cuda(const GroupNormCudaTensors& tensors, const GroupNormCudaGradients& gradients,
                              const std::string& dtype, int64_t batch, int64_t pixels, int64_t channels,
                              int64_t groups, const std::string& activation, int device, uintptr_t stream);

// Addresses: maps a, b of the dtype of the op, [B, P, C] with dense channels; weights [C] float32, or 0 for
// ones.
struct LpipsTensors {
  uintptr_t a, b, weights;
  uintptr_t out;
};

// out [B] float32 = mean over positions of sum over channels of weights * (a / (|a| + 1e-10) - the same of
// b)^2; strides are those of sample and position. Sums are in float32.
void lpips_cpu(const LpipsTensors& tensors, const std::array<int64_t, 2>& a_strides,
               const std::array<int64_t, 2>& b_strides, const std::string& dtype, int64_t batch,
               int64_t positions, int64_t channels, int threads);
// out, dense and of the dtype of the op, becomes the gradient of a from grad [B] float32.
void lpips_gradient_cpu(const LpipsTensors& tensors, uintptr_t grad, const std::array<int64_t, 2>& a_strides,
                        const std::array<int64_t, 2>& b_strides, const std::string& dtype, int64_t batch,
                        int64_t positions, int64_t channels, int threads);

// Addresses for ssim. a and b have the dtype of the op, the others are float32; what ssim.h calls the maps P,
// Q and M of a and of b is [B, C, H - 10, W - 10]. Those of M may be 0, and all of them: not computed.
struct SsimTensors {
  uintptr_t a, b;
  uintptr_t map_p, map_q, map_a, map_b;
  uintptr_t partials;  // [B, ssim_partials(...)], workspace; not used on the CPU
  uintptr_t out;       // [B]
};
// The gradient of one of the images: image, other and out have the dtype of the op, the others are float32.
struct SsimGradient {
  uintptr_t grad;               // [B], of the index
  uintptr_t image, other;       // the one whose gradient this is, and the one it is compared with
  uintptr_t map, map_p, map_q;  // M of `image`, P and Q
  uintptr_t out;
};

// Partial sums of one sample in the CUDA form.
int64_t ssim_partials(int64_t channels, int64_t height, int64_t width);

// out = mean structural similarity of each pair of images [B, C, H, W], H and W at least 11, whose elements
// lie wherever the strides say. Sums are in float32.
void ssim_cuda(const SsimTensors& tensors, const std::array<int64_t, 4>& a_strides,
               const std::array<int64_t, 4>& b_strides, const std::string& dtype, int64_t batch,
               int64_t channels, int64_t height, int64_t width, double data_range, int device,
               uintptr_t stream);
void ssim_cpu(const SsimTensors& tensors, const std::array<int64_t, 4>& a_strides,
              const std::array<int64_t, 4>& b_strides, const std::string& dtype, int64_t batch,
              int64_t channels, int64_t height, int64_t width, double data_range, int threads);
void ssim_gradient_cuda(const SsimGradient& tensors, const std::array<int64_t, 4>& image_strides,
                        const std::array<int64_t, 4>& other_strides,
                        const std::array<int64_t, 4>& out_strides, const std::string& dtype, int64_t batch,
                        int64_t channels, int64_t height, int64_t width, int device, uintptr_t stream);
void ssim_gradient_cpu(const SsimGradient& tensors, const std::array<int64_t, 4>& image_strides,
                       const std::array<int64_t, 4>& other_strides, const std::array<int64_t, 4>& out_strides,
                       const std::string& dtype, int64_t batch, int64_t channels, int64_t height,
                       int64_t width, int threads);

// Whether this processor multiplies matrices of bfloat16 faster than those of float32.
bool cpu_multiplies_bfloat16();

// Why this build cannot run on a CUDA device, or "".
std::string cuda_objection(int device);

}  // namespace vfmvae
