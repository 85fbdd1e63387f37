// csrc/depthwise_conv.cu as a CPU library with a C interface; compiled by test_depthwise_conv.py.
#include "depthwise_conv.cu"

extern "C" void run(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t noise, uintptr_t out,
                    uintptr_t partials, uintptr_t counts, const char* dtype, int64_t batch, int64_t height,
                    int64_t width, int64_t channels, int kernel_size, int flipped, int strip_rows) {
  vfmvae::depthwise_conv_cuda({x, weight, bias, noise, out, partials, counts}, dtype, batch, height, width,
                              channels, kernel_size, flipped != 0, strip_rows, 0, 0);
}
