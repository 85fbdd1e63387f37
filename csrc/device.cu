// Can the kernels of this build run on a device at all? Asked once per device, before the first launch.
#include <string>

#include "launch.cuh"
#include "ops.h"

namespace vfmvae {
namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string cuda_objection(int device) {
  int devices = 0;
  cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && device >= devices) return "there is no CUDA device " + std::to_string(device);
  if (status == cudaSuccess) {
    DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, probe_kernel);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // clears it: the caller falls back
  return std::string("the CUDA build of vfmvae._C does not run on this device: ") +
         cudaGetErrorString(status);
}

}  // namespace vfmvae
