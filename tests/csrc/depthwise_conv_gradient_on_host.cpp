// csrc/depthwise_conv_gradient.cu as a CPU library with a C interface; compiled by test_depthwise_conv.py.
#include "depthwise_conv_gradient.cu"

extern "C" void run(uintptr_t x, uintptr_t grad, uintptr_t partials, uintptr_t out, const char* dtype,
                    int64_t batch, int64_t height, int64_t width, int64_t channels, int kernel_size,
                    int strip_rows, int parts) {
  vfmvae::depthwise_weight_gradient_cuda(x, grad, partials, out, dtype, batch, height, width, channels,
                                         kernel_size, strip_rows, parts, 0, 0);
}
