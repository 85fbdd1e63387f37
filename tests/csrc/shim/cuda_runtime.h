// Enough of the CUDA runtime to run a kernel on the CPU, thread after thread: index arithmetic, shared
// memory, barriers and shuffles (block.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after the other, so that a static variable serves them all. What a block left there is
// found by the next: as on a GPU, nobody may rely on it.
#define __shared__ static

using std::max;
using std::min;

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
template <typename T>
T __ldg(const T* source) {
  return *source;
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > shim::kMostSharedBytes) shim::fail("too much shared memory");
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.y > 65535 || gridDim.z > 65535) shim::fail("the grid has too many blocks");
  if (config->dynamicSmemBytes > shim::kMostSharedBytes) shim::fail("too much shared memory");
  const std::function<void()> thread = [&] { kernel(arguments...); };
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        std::memset(shim::shared_memory, 0xFF, config->dynamicSmemBytes);  // NaN in every dtype
        shim::block.run(thread);
      }
  return cudaSuccess;
}
