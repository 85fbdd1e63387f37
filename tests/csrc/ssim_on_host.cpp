// csrc/ssim.cu as a CPU library with a C interface; compiled by test_ssim.py.
#include "ssim.cu"

namespace {

vfmvae::ImageStrides strides(const int64_t* given) { return {given[0], given[1], given[2], given[3]}; }

}  // namespace

extern "C" int64_t partials(int64_t channels, int64_t height, int64_t width) {
  return vfmvae::ssim_partials(channels, height, width);
}

extern "C" void forward(uintptr_t a, uintptr_t b, uintptr_t map_p, uintptr_t map_q, uintptr_t map_a,
                        uintptr_t map_b, uintptr_t partials, uintptr_t out, const int64_t* a_strides,
                        const int64_t* b_strides, const char* dtype, int64_t batch, int64_t channels,
                        int64_t height, int64_t width, double data_range) {
  vfmvae::ssim_cuda({a, b, map_p, map_q, map_a, map_b, partials, out}, strides(a_strides), strides(b_strides),
                    dtype, batch, channels, height, width, data_range, 0, 0);
}

extern "C" void gradient(uintptr_t grad, uintptr_t image, uintptr_t other, uintptr_t map, uintptr_t map_p,
                         uintptr_t map_q, uintptr_t out, const int64_t* image_strides,
                         const int64_t* other_strides, const int64_t* out_strides, const char* dtype,
                         int64_t batch, int64_t channels, int64_t height, int64_t width) {
  vfmvae::ssim_gradient_cuda({grad, image, other, map, map_p, map_q, out}, strides(image_strides),
                             strides(other_strides), strides(out_strides), dtype, batch, channels, height,
                             width, 0, 0);
}
