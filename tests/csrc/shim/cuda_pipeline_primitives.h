// Asynchronous copies to shared memory for kernels that run on the CPU in tests. A copy is made where the
// kernel waits for it, not before, so that a missing wait shows as old data.
#pragma once

#include <cstring>

#include "block.h"

inline void __pipeline_memcpy_async(void* target, const void* source, size_t bytes, size_t zeros = 0) {
  if (bytes != 4 && bytes != 8 && bytes != 16) shim::fail("an asynchronous copy has 4, 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(target) % bytes || (reinterpret_cast<uintptr_t>(source) % bytes))
    shim::fail("an asynchronous copy is not aligned to its size");
  shim::block.copies().push_back({target, source, bytes, zeros});
}
inline void __pipeline_commit() { shim::block.copies().push_back({nullptr, nullptr, 0, 0}); }
inline void __pipeline_wait_prior(int groups) {
  auto& copies = shim::block.copies();
  int held = 0;
  for (const auto& copy : copies) held += copy.bytes == 0;
  for (; held > groups; copies.pop_front()) {
    const shim::Copy& copy = copies.front();
    if (copy.bytes == 0) {
      --held;
      continue;
    }
    // The source may be invalid where all is zero.
    std::memset(copy.target, 0, copy.bytes);
    if (copy.bytes > copy.zeros) std::memcpy(copy.target, copy.source, copy.bytes - copy.zeros);
  }
}
