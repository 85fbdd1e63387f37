// The launchers of group_norm_small.cu, for group_norm.cu and group_norm_backward.cu.
#pragma once

#include "group_norm.cuh"
#include "ops.h"

namespace vfmvae {

constexpr int kSmallVectors = 8;  // 16-byte vectors of x that a thread holds at most, forward
constexpr int kSmallPairs = 4;    // and of x and its gradient, backward

struct GroupNormSmall {
  int pixels, channels, groups;
  int columns, rows;  // of threads in a block; 0 where a block cannot hold the group
};

// How blocks hold a (sample, group) with at most so many vectors in a thread. Addresses must be aligned.
GroupNormSmall group_norm_small(DType type, int64_t pixels, int64_t channels, int64_t groups, int vectors);

void launch_group_norm_small(const GroupNormCudaTensors& tensors, const GroupNormSmall& size, DType type,
                             int64_t batch, Activation activation, double eps, uintptr_t stream);
void launch_group_norm_small_gradient(const GroupNormCudaTensors& tensors,
                                      const GroupNormCudaGradients& gradients, const GroupNormSmall& size,
                                      DType type, int64_t batch, Activation activation, uintptr_t stream);

}  // namespace vfmvae
