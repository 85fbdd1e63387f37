// csrc/upsample_blur.cu as a CPU library with a C interface; compiled by test_upsample_blur.py.
#include "upsample_blur.cu"

extern "C" void run(const void* x, const void* residual, void* out, const char* dtype, int64_t batch,
                    int64_t height, int64_t width, int64_t channels, int kernel_size, int upscale,
                    int adjoint) {
  vfmvae::upsample_blur_cuda(reinterpret_cast<uintptr_t>(x), reinterpret_cast<uintptr_t>(residual),
                             reinterpret_cast<uintptr_t>(out), dtype, batch, height, width, channels,
                             kernel_size, upscale, adjoint != 0, 0, 0);
}
