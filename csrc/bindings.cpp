// The Python names of the extension vfmvae._C, and nothing else. Only vfmvae/ops calls them.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;
using namespace pybind11::literals;

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
#ifdef VFMVAE_WITH_CUDA
  module.def("cuda_objection", &vfmvae::cuda_objection, "device"_a, no_gil);
  module.def("upsample_blur_cuda", &vfmvae::upsample_blur_cuda, py::kw_only(), "x"_a, "residual"_a, "out"_a,
             "dtype"_a, "batch"_a, "height"_a, "width"_a, "channels"_a, "kernel_size"_a, "upscale"_a,
             "adjoint"_a, "device"_a, "stream"_a, no_gil);
#endif
}
