// Host entries of every operation: what bindings.cpp names. Pointers are addresses of dense memory; images
// lie channels-last ([B, H, W, C]). Bad arguments throw std::invalid_argument.
#pragma once

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

// Why this build cannot run on a CUDA device, or "".
std::string cuda_objection(int device);

}  // namespace vfmvae
