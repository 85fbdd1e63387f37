// A kernel that uses all that tests/csrc/shim offers; compiled by test_shim.py.
#include <cuda_pipeline_primitives.h>

#include "launch.cuh"

namespace {

constexpr int kThreads = 96;  // three warps

// out[block] = sum of the squares of the block's part of x; the last part may be shorter.
__global__ void sum_of_squares(const float* x, float* out, int count) {
  __shared__ float of_warp[kThreads / 32];
  float* held = reinterpret_cast<float*>(vfmvae::shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int at = blockIdx.x * kThreads + threadIdx.x;
  const bool inside = at < count;
  __pipeline_memcpy_async(held + threadIdx.x, x + (inside ? at : 0), 4, inside ? 0 : 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  const float value = held[kThreads - 1 - threadIdx.x];  // another thread's copy
  float sum = value * value;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, bits);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (warp > 0) return;  // the others go on without them
  sum = lane < kThreads / 32 ? of_warp[lane] : 0.0f;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
  __syncthreads();
  if (lane == 0) out[blockIdx.x] = sum;
}

__global__ void wait_apart() {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

}  // namespace

extern "C" void run(const float* x, float* out, int count) {
  const dim3 grid((count + kThreads - 1) / kThreads);
  const size_t shared = kThreads * sizeof(float);
  vfmvae::launch_with_shared(sum_of_squares, grid, dim3(kThreads), shared, 0, x, out, count);
}
extern "C" void run_into_deadlock() { vfmvae::launch(wait_apart, dim3(1), dim3(32), 0); }
