// csrc/group_norm*.cu as a CPU library with a C interface; compiled by test_group_norm.py.
#include "group_norm.cu"
#include "group_norm_backward.cu"
#include "group_norm_small.cu"

extern "C" {

int64_t tiles(int64_t batch, int64_t pixels, int64_t channels) {
  return vfmvae::group_norm_tiles(batch, pixels, channels);
}

void forward(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t style, uintptr_t partials,
             uintptr_t counts, uintptr_t table, uintptr_t out, const char* dtype, int64_t batch,
             int64_t pixels, int64_t channels, int64_t groups, const char* activation, int64_t given_tiles,
             double eps) {
  vfmvae::group_norm_cuda({x, weight, bias, style, partials, counts, table, out}, dtype, batch, pixels,
                          channels, groups, given_tiles, eps, activation, 0, 0);
}

void backward(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t style, uintptr_t partials,
              uintptr_t table, uintptr_t grad, uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias,
              uintptr_t grad_style, uintptr_t coefficients, const char* dtype, int64_t batch, int64_t pixels,
              int64_t channels, int64_t groups, const char* activation) {
  vfmvae::group_norm_backward_cuda({x, weight, bias, style, partials, 0, table, 0},
                                   {grad, grad_x, grad_weight, grad_bias, grad_style, coefficients}, dtype,
                                   batch, pixels, channels, groups, activation, 0, 0);
}

}
