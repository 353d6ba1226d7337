// Numbers of the three dtypes, one at a time and in vectors. Arithmetic is fp32: widen, then narrow.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef __CUDACC__
#define BOTH __host__ __device__ inline  // compiled for the GPU, and for the CPU, where the tests run it
#else
#define BOTH inline
#endif

namespace megallm {

BOTH float widen(float x) { return x; }
BOTH float widen(__half x) { return __half2float(x); }
BOTH float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
BOTH T narrow(float x);
template <>
BOTH float narrow<float>(float x) {
  return x;
}
template <>
BOTH __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
BOTH __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements that are loaded or stored by one instruction, or 32 bytes by two: the address is a multiple of
// N * sizeof(T), or of 16.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T item[N];
};

template <int N, typename T>
BOTH Vector<T, N> load(const T* at) {
  return *reinterpret_cast<const Vector<T, N>*>(at);
}

template <int N, typename T>
BOTH void store(T* at, const Vector<T, N>& value) {
  *reinterpret_cast<Vector<T, N>*>(at) = value;
}

}  // namespace megallm
