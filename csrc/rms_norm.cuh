// What the two passes of RMSNorm share: a group of threads for a row, and the instances of a kernel.
#pragma once

#include "launch.h"
#include "launch_shape.h"

namespace megallm {

constexpr int kMaxWarps = 32;

// Threads of the largest block; see norm_shape.
template <int kVector, int kPerThread>
constexpr int kMaxThreads = kVector == 1 ? 1024 : kPerThread == 1 ? 256 : 512;

// The sum over a group of threads_per_row threads, a multiple of 32, for each of them. `scratch`: one number a warp of
// at most kWarps, two sets of them used in turn, so that one barrier a sum is enough.
template <int kWarps>
__device__ float group_sum(float value, int threads_per_row, float (&scratch)[2][kMaxWarps], int turn) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warps = threads_per_row / 32;
  if (warps == 1) return value;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) scratch[turn][warp] = value;
  __syncthreads();
  const int lane = threadIdx.x % kWarps;
  value = lane < warps ? scratch[turn][warp / warps * warps + lane] : 0.0f;
#pragma unroll
  for (int offset = kWarps / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Whether a thread's access k lies inside the row; norm_shape gives every thread all vectors but the last.
template <int kVector, int kPerThread>
__device__ bool is_inside(int k, int column, int hidden) {
  return (kVector > 1 && k + 1 < kPerThread) || column < hidden;
}

// A thread's accesses of one row; threads_per_row apart.
template <typename T, int kVector, int kPerThread>
__device__ void read_row(const T* row, int lane, int threads_per_row, int hidden,
                         Vector<T, kVector> (&out)[kPerThread]) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int column = (k * threads_per_row + lane) * kVector;
    if (is_inside<kVector, kPerThread>(k, column, hidden)) out[k] = load<kVector>(row + column);
  }
}

// Calls function<T, W, vector, per thread> as constants of the shape. The weight's type W is T or fp32.
template <typename Function>
void with_shape(const NormShape& shape, int dtype, int weight_dtype, const Function& function) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto with_weight = [&]<typename W>(W) {
      constexpr int kVector = kVectorBytes / sizeof(T);
      if (shape.per_thread == 16) {
        function.template operator()<T, W, 1, 16>();
      } else if (shape.per_thread == 1) {
        function.template operator()<T, W, kVector, 1>();
      } else if (shape.per_thread == 2) {
        function.template operator()<T, W, kVector, 2>();
      } else if (shape.per_thread == 4) {
        function.template operator()<T, W, kVector, 4>();
      } else if constexpr (sizeof(T) == 4) {
        function.template operator()<T, W, kVector, 8>();
      }
    };
    if (weight_dtype == dtype) {
      with_weight(T{});
    } else {
      with_weight(float{});
    }
  });
}

}  // namespace megallm
