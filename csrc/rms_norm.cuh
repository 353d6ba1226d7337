// What the two passes of RMSNorm share: a group of threads for a row, and the instances of a kernel.
#pragma once

#include "launch.h"
#include "launch_shape.h"

namespace megallm {

constexpr int kMaxWarps = 32;

// Threads of the largest block; see norm_shape.
template <int kVector, int kPerThread>
constexpr int kMaxThreads = kVector == 1 ? 1024 : kPerThread == 1 ? 256 : 512;

// The sum over a group of threads_per_row threads, a multiple of 32, for each of them. `scratch`: one number a warp.
static __device__ float group_sum(float value, int threads_per_row, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warps = threads_per_row / 32;
  if (warps == 1) return value;
  const int warp = threadIdx.x / 32;
  __syncthreads();  // the sums of the row before have been read
  if (threadIdx.x % 32 == 0) scratch[warp] = value;
  __syncthreads();
  const int first = warp / warps * warps;
  value = 0.0f;
  for (int i = 0; i < warps; ++i) value += scratch[first + i];
  return value;
}

template <int kVector, typename W>
__device__ void read_weight(const W* weight, int64_t column, float* out) {
  constexpr int kAccess = kVector * sizeof(W) > kVectorBytes ? kVectorBytes / sizeof(W) : kVector;
#pragma unroll
  for (int i = 0; i < kVector; i += kAccess) {
    const auto part = load<kAccess>(weight + column + i);
#pragma unroll
    for (int j = 0; j < kAccess; ++j) out[i + j] = widen(part.item[j]);
  }
}

// Weights are of x's dtype or fp32.
template <typename T, int kVector>
__device__ void read_weight(const void* weight, int weight_dtype, int64_t column, float* out) {
  if (weight_dtype == kFloat32) {
    read_weight<kVector>(static_cast<const float*>(weight), column, out);
  } else {
    read_weight<kVector>(static_cast<const T*>(weight), column, out);
  }
}

// Calls function<T, vector, per thread> as constants of the shape.
template <typename Function>
void with_shape(const NormShape& shape, int dtype, const Function& function) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVector = kVectorBytes / sizeof(T);
    if (shape.per_thread == 16) {
      function.template operator()<T, 1, 16>();
    } else if (shape.per_thread == 1) {
      function.template operator()<T, kVector, 1>();
    } else if (shape.per_thread == 2) {
      function.template operator()<T, kVector, 2>();
    } else if (shape.per_thread == 4) {
      function.template operator()<T, kVector, 4>();
    } else if constexpr (sizeof(T) == 4) {
      function.template operator()<T, kVector, 8>();
    }
  });
}

}  // namespace megallm
