// Copies from global to shared memory that go on while the thread computes (cp.async, sm_80 and later).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#ifndef __CUDACC__
#include <cuda_pipeline_primitives.h>  // of tests/csrc/shim
#endif

namespace vfmvae {

// Begins a copy of 16 bytes, or writes 16 zero bytes and reads nothing. Both addresses are aligned to 16.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool read) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(target))),
               "l"(source), "r"(read ? 16 : 0)
               : "memory");
#else
  __pipeline_memcpy_async(target, source, 16, read ? 0 : 16);
#endif
}

// Ends a group of copies of this thread; a group may be empty.
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  __pipeline_commit();
#endif
}

// Waits until all groups of this thread but the last N have arrived. Other threads need a barrier as well.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  __pipeline_wait_prior(N);
#endif
}

}  // namespace vfmvae
