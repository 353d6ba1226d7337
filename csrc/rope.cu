// Rotary embedding over the heads of strided tokens, in place or not. Bytes per element of a 2-byte dtype: 4.
//
// A thread holds the cosines and sines of its 16 bytes of pairs and walks over the heads. A row that the tables do not
// have gives NaN, not what lies behind them in memory.
#include "launch.h"
#include "launch_shape.h"

namespace megallm {
namespace {

constexpr int kThreads = 256;

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) rope_kernel(const Rope a) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (token >= a.tokens) return;
  const int64_t row = rope_row(token, a.positions, a.cu_seqlens, a.documents);
  const bool known = row >= 0 && row < a.rows;
  const int64_t table = known ? row * a.half : 0;
  for (int64_t pair = threadIdx.x * kVector; pair < a.half; pair += blockDim.x * kVector) {
    constexpr int kTableVector = kVector < 4 ? kVector : 4;  // fp32: 16 bytes
    float cosine[kVector];
    float sine[kVector];
#pragma unroll
    for (int i = 0; i < kVector; i += kTableVector) {
      const auto c = load<kTableVector>(a.cosine + table + pair + i);
      const auto s = load<kTableVector>(a.sine + table + pair + i);
#pragma unroll
      for (int j = 0; j < kTableVector; ++j) {
        cosine[i + j] = known ? c.item[j] : NAN;
        sine[i + j] = a.conjugate ? -s.item[j] : s.item[j];
      }
    }
    const T* x = static_cast<const T*>(a.x) + token * a.token_stride + pair;
    T* out = static_cast<T*>(a.out) + token * a.out_token_stride + pair;
#pragma unroll 2
    for (int64_t head = threadIdx.y; head < a.heads; head += blockDim.y) {
      const T* at = x + head * a.head_stride;
      T* to = out + head * a.out_head_stride;
      auto x1 = load<kVector>(at);
      auto x2 = load<kVector>(at + a.half);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const Pair turned = rope_pair(widen(x1.item[i]), widen(x2.item[i]), cosine[i], sine[i]);
        x1.item[i] = narrow<T>(turned.first);
        x2.item[i] = narrow<T>(turned.second);
      }
      store<kVector>(to, x1);
      store<kVector>(to + a.half, x2);
    }
  }
}

}  // namespace

void launch(const Rope& a, int device, cudaStream_t stream) {
  check(a);
  const RopeShape shape = rope_shape(a);
  check_cuda(cudaSetDevice(device), "rope on GPU ", device);
  const dim3 threads(shape.pairs, shape.heads, shape.tokens);
  const auto blocks = static_cast<unsigned>(shape.grid);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (shape.vector == 1) {
      rope_kernel<T, 1><<<blocks, threads, 0, stream>>>(a);
    } else {
      rope_kernel<T, kVectorBytes / sizeof(T)><<<blocks, threads, 0, stream>>>(a);
    }
  });
  check_cuda(cudaGetLastError(), "rope of ", a.tokens, " tokens x ", a.heads, " heads x ", 2 * a.half,
             " elements on GPU ", device);
}

}  // namespace megallm
