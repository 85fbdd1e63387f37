// The Python names of the extension vfmvae._C, and nothing else. Only vfmvae/ops calls them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;
using namespace pybind11::literals;

using Strides = std::array<int64_t, 4>;
using RowStrides = std::array<int64_t, 2>;

PYBIND11_MODULE(_C, module) {
  module.attr("build_info") = VFMVAE_BUILD_INFO;
#ifdef VFMVAE_WITH_CUDA
  module.attr("with_cuda") = true;
#else
  module.attr("with_cuda") = false;
#endif

  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  module.def("upsample_blur_cpu", &vfmvae::upsample_blur_cpu, py::kw_only(), "x"_a, "residual"_a, "out"_a,
             "dtype"_a, "batch"_a, "height"_a, "width"_a, "channels"_a, "kernel_size"_a, "upscale"_a,
             "adjoint"_a, "threads"_a, no_gil);
  module.def("depthwise_weight_gradient_cpu", &vfmvae::depthwise_weight_gradient_cpu, py::kw_only(), "x"_a,
             "grad"_a, "out"_a, "dtype"_a, "batch"_a, "height"_a, "width"_a, "channels"_a, "kernel_size"_a,
             "threads"_a, no_gil);
  module.def(
      "modulated_mlp_cpu",
      [](uintptr_t x, uintptr_t residual, uintptr_t style, uintptr_t demodulation, uintptr_t expand,
         uintptr_t expand_bias, uintptr_t contract, uintptr_t contract_bias, uintptr_t out,
         const std::string& dtype, int64_t batch, int64_t pixels, int64_t channels, int64_t hidden,
         int threads) {
        vfmvae::modulated_mlp_cpu(x, residual,
                                  {style, demodulation, expand, expand_bias, contract, contract_bias}, out,
                                  dtype, batch, pixels, channels, hidden, threads);
      },
      py::kw_only(), "x"_a, "residual"_a, "style"_a, "demodulation"_a, "expand"_a, "expand_bias"_a,
      "contract"_a, "contract_bias"_a, "out"_a, "dtype"_a, "batch"_a, "pixels"_a, "channels"_a, "hidden"_a,
      "threads"_a, no_gil);
  module.def(
      "modulated_mlp_backward_cpu",
      [](uintptr_t x, uintptr_t grad, uintptr_t style, uintptr_t demodulation, uintptr_t expand,
         uintptr_t expand_bias, uintptr_t contract, uintptr_t contract_bias, uintptr_t grad_x,
         uintptr_t grad_style, uintptr_t grad_demodulation, uintptr_t grad_expand, uintptr_t grad_expand_bias,
         uintptr_t grad_contract, uintptr_t grad_contract_bias, const std::string& dtype, int64_t batch,
         int64_t pixels, int64_t channels, int64_t hidden, int threads) {
        vfmvae::modulated_mlp_backward_cpu(
            x, grad, {style, demodulation, expand, expand_bias, contract, contract_bias},
            {grad_x, grad_style, grad_demodulation, grad_expand, grad_expand_bias, grad_contract,
             grad_contract_bias},
            dtype, batch, pixels, channels, hidden, threads);
      },
      py::kw_only(), "x"_a, "grad"_a, "style"_a, "demodulation"_a, "expand"_a, "expand_bias"_a, "contract"_a,
      "contract_bias"_a, "grad_x"_a, "grad_style"_a, "grad_demodulation"_a, "grad_expand"_a,
      "grad_expand_bias"_a, "grad_contract"_a, "grad_contract_bias"_a, "dtype"_a, "batch"_a, "pixels"_a,
      "channels"_a, "hidden"_a, "threads"_a, no_gil);
  module.def(
      "group_norm_cpu",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t rstd, uintptr_t out,
         const std::string& dtype, int64_t batch, int64_t pixels, int64_t channels, int64_t groups,
         double eps, const std::string& activation, int threads) {
        vfmvae::group_norm_cpu({x, weight, bias, mean, rstd, out}, dtype, batch, pixels, channels, groups,
                               eps, activation, threads);
      },
      py::kw_only(), "x"_a, "weight"_a, "bias"_a, "mean"_a, "rstd"_a, "out"_a, "dtype"_a, "batch"_a,
      "pixels"_a, "channels"_a, "groups"_a, "eps"_a, "activation"_a, "threads"_a, no_gil);
  module.def(
      "group_norm_backward_cpu",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t rstd, uintptr_t grad,
         uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias, const std::string& dtype,
         int64_t batch, int64_t pixels, int64_t channels, int64_t groups, const std::string& activation,
         int threads) {
        vfmvae::group_norm_backward_cpu({x, weight, bias, mean, rstd, grad_x}, grad, grad_weight, grad_bias,
                                        dtype, batch, pixels, channels, groups, activation, threads);
      },
      py::kw_only(), "x"_a, "weight"_a, "bias"_a, "mean"_a, "rstd"_a, "grad"_a, "grad_x"_a, "grad_weight"_a,
      "grad_bias"_a, "dtype"_a, "batch"_a, "pixels"_a, "channels"_a, "groups"_a, "activation"_a, "threads"_a,
      no_gil);
  module.def(
      "lpips_cpu",
      [](uintptr_t a, uintptr_t b, uintptr_t weights, uintptr_t out, const RowStrides& a_strides,
         const RowStrides& b_strides, const std::string& dtype, int64_t batch, int64_t positions,
         int64_t channels, int threads) {
        vfmvae::lpips_cpu({a, b, weights, out}, a_strides, b_strides, dtype, batch, positions, channels,
                          threads);
      },
      py::kw_only(), "a"_a, "b"_a, "weights"_a, "out"_a, "a_strides"_a, "b_strides"_a, "dtype"_a, "batch"_a,
      "positions"_a, "channels"_a, "threads"_a, no_gil);
  module.def(
      "lpips_gradient_cpu",
      [](uintptr_t a, uintptr_t b, uintptr_t weights, uintptr_t grad, uintptr_t out,
         const RowStrides& a_strides, const RowStrides& b_strides, const std::string& dtype, int64_t batch,
         int64_t positions, int64_t channels, int threads) {
        vfmvae::lpips_gradient_cpu({a, b, weights, out}, grad, a_strides, b_strides, dtype, batch, positions,
                                   channels, threads);
      },
      py::kw_only(), "a"_a, "b"_a, "weights"_a, "grad"_a, "out"_a, "a_strides"_a, "b_strides"_a, "dtype"_a,
      "batch"_a, "positions"_a, "channels"_a, "threads"_a, no_gil);
  module.def(
      "ssim_cpu",
      [](uintptr_t a, uintptr_t b, uintptr_t map_p, uintptr_t map_q, uintptr_t map_a, uintptr_t map_b,
         uintptr_t out, const Strides& a_strides, const Strides& b_strides, const std::string& dtype,
         int64_t batch, int64_t channels, int64_t height, int64_t width, double data_range, int threads) {
        vfmvae::ssim_cpu({a, b, map_p, map_q, map_a, map_b, 0, out}, a_strides, b_strides, dtype, batch,
                         channels, height, width, data_range, threads);
      },
      py::kw_only(), "a"_a, "b"_a, "map_p"_a, "map_q"_a, "map_a"_a, "map_b"_a, "out"_a, "a_strides"_a,
      "b_strides"_a, "dtype"_a, "batch"_a, "channels"_a, "height"_a, "width"_a, "data_range"_a, "threads"_a,
      no_gil);
  module.def(
      "ssim_gradient_cpu",
      [](uintptr_t grad, uintptr_t image, uintptr_t other, uintptr_t map, uintptr_t map_p, uintptr_t map_q,
         uintptr_t out, const Strides& image_strides, const Strides& other_strides,
         const Strides& out_strides, const std::string& dtype, int64_t batch, int64_t channels,
         int64_t height, int64_t width, int threads) {
        vfmvae::ssim_gradient_cpu({grad, image, other, map, map_p, map_q, out}, image_strides, other_strides,
                                  out_strides, dtype, batch, channels, height, width, threads);
      },
      py::kw_only(), "grad"_a, "image"_a, "other"_a, "map"_a, "map_p"_a, "map_q"_a, "out"_a,
      "image_strides"_a, "other_strides"_a, "out_strides"_a, "dtype"_a, "batch"_a, "channels"_a, "height"_a,
      "width"_a, "threads"_a, no_gil);
  module.def("cpu_multiplies_bfloat16", &vfmvae::cpu_multiplies_bfloat16, no_gil);
#ifdef VFMVAE_WITH_CUDA
  module.def("cuda_objection", &vfmvae::cuda_objection, "device"_a, no_gil);
  module.def("upsample_blur_cuda", &vfmvae::upsample_blur_cuda, py::kw_only(), "x"_a, "residual"_a, "out"_a,
             "dtype"_a, "batch"_a, "height"_a, "width"_a, "channels"_a, "kernel_size"_a, "upscale"_a,
             "adjoint"_a, "device"_a, "stream"_a, no_gil);
  module.def(
      "depthwise_conv_cuda",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t noise, uintptr_t out, uintptr_t partials,
         uintptr_t counts, const std::string& dtype, int64_t batch, int64_t height, int64_t width,
         int64_t channels, int kernel_size, bool flipped, int strip_rows, int device, uintptr_t stream) {
        vfmvae::depthwise_conv_cuda({x, weight, bias, noise, out, partials, counts}, dtype, batch, height,
                                    width, channels, kernel_size, flipped, strip_rows, device, stream);
      },
      py::kw_only(), "x"_a, "weight"_a, "bias"_a, "noise"_a, "out"_a, "partials"_a, "counts"_a, "dtype"_a,
      "batch"_a, "height"_a, "width"_a, "channels"_a, "kernel_size"_a, "flipped"_a, "strip_rows"_a,
      "device"_a, "stream"_a, no_gil);
  module.def("depthwise_weight_gradient_cuda", &vfmvae::depthwise_weight_gradient_cuda, py::kw_only(), "x"_a,
             "grad"_a, "partials"_a, "out"_a, "dtype"_a, "batch"_a, "height"_a, "width"_a, "channels"_a,
             "kernel_size"_a, "strip_rows"_a, "parts"_a, "device"_a, "stream"_a, no_gil);
  module.def("group_norm_tiles", &vfmvae::group_norm_tiles, py::kw_only(), "batch"_a, "pixels"_a,
             "channels"_a, no_gil);
  module.def(
      "group_norm_cuda",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t style, uintptr_t partials, uintptr_t counts,
         uintptr_t table, uintptr_t out, const std::string& dtype, int64_t batch, int64_t pixels,
         int64_t channels, int64_t groups, int64_t given_tiles, double eps, const std::string& activation,
         int device, uintptr_t stream) {
        vfmvae::group_norm_cuda({x, weight, bias, style, partials, counts, table, out}, dtype, batch, pixels,
                                channels, groups, given_tiles, eps, activation, device, stream);
      },
      py::kw_only(), "x"_a, "weight"_a, "bias"_a, "style"_a, "partials"_a, "counts"_a, "table"_a, "out"_a,
      "dtype"_a, "batch"_a, "pixels"_a, "channels"_a, "groups"_a, "given_tiles"_a, "eps"_a, "activation"_a,
      "device"_a, "stream"_a, no_gil);
  module.def(
      "group_norm_backward_cuda",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t style, uintptr_t partials, uintptr_t table,
         uintptr_t grad, uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t grad_style,
         uintptr_t coefficients, const std::string& dtype, int64_t batch, int64_t pixels, int64_t channels,
         int64_t groups, const std::string& activation, int device, uintptr_t stream) {
        vfmvae::group_norm_backward_cuda({x, weight, bias, style, partials, 0, table, 0},
                                         {grad, grad_x, grad_weight, grad_bias, grad_style, coefficients},
                                         dtype, batch, pixels, channels, groups, activation, device, stream);
      },
      py::kw_only(), "x"_a, "weight"_a, "bias"_a, "style"_a, "partials"_a, "table"_a, "grad"_a, "grad_x"_a,
      "grad_weight"_a, "grad_bias"_a, "grad_style"_a, "coefficients"_a, "dtype"_a, "batch"_a, "pixels"_a,
      "channels"_a, "groups"_a, "activation"_a, "device"_a, "stream"_a, no_gil);
  module.def("ssim_partials", &vfmvae::ssim_partials, py::kw_only(), "channels"_a, "height"_a, "width"_a,
             no_gil);
  module.def(
      "ssim_cuda",
      [](uintptr_t a, uintptr_t b, uintptr_t map_p, uintptr_t map_q, uintptr_t map_a, uintptr_t map_b,
         uintptr_t partials, uintptr_t out, const Strides& a_strides, const Strides& b_strides,
         const std::string& dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
         double data_range, int device, uintptr_t stream) {
        vfmvae::ssim_cuda({a, b, map_p, map_q, map_a, map_b, partials, out}, a_strides, b_strides, dtype,
                          batch, channels, height, width, data_range, device, stream);
      },
      py::kw_only(), "a"_a, "b"_a, "map_p"_a, "map_q"_a, "map_a"_a, "map_b"_a, "partials"_a, "out"_a,
      "a_strides"_a, "b_strides"_a, "dtype"_a, "batch"_a, "channels"_a, "height"_a, "width"_a, "data_range"_a,
      "device"_a, "stream"_a, no_gil);
  module.def(
      "ssim_gradient_cuda",
      [](uintptr_t grad, uintptr_t image, uintptr_t other, uintptr_t map, uintptr_t map_p, uintptr_t map_q,
         uintptr_t out, const Strides& image_strides, const Strides& other_strides,
         const Strides& out_strides, const std::string& dtype, int64_t batch, int64_t channels,
         int64_t height, int64_t width, int device, uintptr_t stream) {
        vfmvae::ssim_gradient_cuda({grad, image, other, map, map_p, map_q, out}, image_strides, other_strides,
                                   out_strides, dtype, batch, channels, height, width, device, stream);
      },
      py::kw_only(), "grad"_a, "image"_a, "other"_a, "map"_a, "map_p"_a, "map_q"_a, "out"_a,
      "image_strides"_a, "other_strides"_a, "out_strides"_a, "dtype"_a, "batch"_a, "channels"_a, "height"_a,
      "width"_a, "device"_a, "stream"_a, no_gil);
#endif
}
