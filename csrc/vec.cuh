// Runs of neighbouring elements, read and written in 16-byte pieces, computed in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace vfmvae {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

constexpr int kVectorBytes = 16;

// N elements of T, moved by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T at[N];
};

// The widest piece that divides a run of N elements: 16 bytes, or the whole run where that is less.
template <typename T, int N>
constexpr int kPieceSize =
    N * static_cast<int>(sizeof(T)) < kVectorBytes ? N : kVectorBytes / static_cast<int>(sizeof(T));

// Reads N elements. ALIGNED promises that `source` is aligned to the piece.
template <bool ALIGNED, int N, typename T>
__device__ __forceinline__ void load_run(const T* source, float (&values)[N]) {
  constexpr int kPiece = ALIGNED ? kPieceSize<T, N> : 1;
#pragma unroll
  for (int start = 0; start < N; start += kPiece) {
    const auto piece = *reinterpret_cast<const Vec<T, kPiece>*>(source + start);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) values[start + i] = to_float(piece.at[i]);
  }
}

// Writes N elements, rounded to nearest even.
template <bool ALIGNED, int N, typename T>
__device__ __forceinline__ void store_run(T* target, const float (&values)[N]) {
  constexpr int kPiece = ALIGNED ? kPieceSize<T, N> : 1;
#pragma unroll
  for (int start = 0; start < N; start += kPiece) {
    Vec<T, kPiece> piece;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) piece.at[i] = from_float<T>(values[start + i]);
    *reinterpret_cast<Vec<T, kPiece>*>(target + start) = piece;
  }
}

}  // namespace vfmvae
