// AdamW over many tensors in one launch: a block updates one chunk of one tensor.
//
// Bytes per element: 28 with fp32 gradients, 26 with 2-byte ones, 2 more with a copy. A thread has 4 neighbouring
// elements at a time: 16-byte accesses of fp32, 8-byte ones of 2-byte dtypes. A tensor's edges are taken one by one.
#include "launch.h"
#include "launch_shape.h"

namespace megallm {
namespace {

constexpr int kVector = kAdamWVector;

// C is the dtype of the copies, float where there are none.
template <typename C>
constexpr bool kCopies = sizeof(C) == 2;

struct Addresses {
  float* p;
  const void* g;
  float* m;
  float* v;
  void* copy;
};

template <typename G, typename C>
__device__ void update_vector(const Addresses& at, int64_t e, const AdamWRates& rates) {
  auto p = load<kVector>(at.p + e);
  const auto g = load<kVector>(static_cast<const G*>(at.g) + e);
  auto m = load<kVector>(at.m + e);
  auto v = load<kVector>(at.v + e);
#pragma unroll
  for (int i = 0; i < kVector; ++i) adamw_element(p.item[i], widen(g.item[i]), m.item[i], v.item[i], rates);
  store<kVector>(at.p + e, p);
  store<kVector>(at.m + e, m);
  store<kVector>(at.v + e, v);
  if constexpr (kCopies<C>) {
    Vector<C, kVector> copy;
#pragma unroll
    for (int i = 0; i < kVector; ++i) copy.item[i] = narrow<C>(p.item[i]);
    store<kVector>(static_cast<C*>(at.copy) + e, copy);
  }
}

template <typename G, typename C>
__device__ void update_element(const Addresses& at, int64_t e, const AdamWRates& rates) {
  float p = at.p[e];
  float m = at.m[e];
  float v = at.v[e];
  adamw_element(p, widen(static_cast<const G*>(at.g)[e]), m, v, rates);
  at.p[e] = p;
  at.m[e] = m;
  at.v[e] = v;
  if constexpr (kCopies<C>) static_cast<C*>(at.copy)[e] = narrow<C>(p);
}

template <typename G, typename C>
__global__ void __launch_bounds__(kAdamWThreads, 4) adamw_kernel(const AdamW a) {
  if (*a.is_bad != 0.0f) return;
  const int64_t* row = a.table + static_cast<int64_t>(a.chunks[2 * blockIdx.x]) * kTableColumns;
  const int64_t start = static_cast<int64_t>(a.chunks[2 * blockIdx.x + 1]) * a.chunk;
  const Addresses at{reinterpret_cast<float*>(row[0]), reinterpret_cast<const void*>(row[1]),
                     reinterpret_cast<float*>(row[2]), reinterpret_cast<float*>(row[3]),
                     reinterpret_cast<void*>(row[4])};
  __builtin_assume(__isGlobal(at.p));  // for all the compiler knows, an address out of a table is one of shared memory
  __builtin_assume(__isGlobal(at.g));
  __builtin_assume(__isGlobal(at.m));
  __builtin_assume(__isGlobal(at.v));
  if constexpr (kCopies<C>) __builtin_assume(__isGlobal(at.copy));
  const int64_t first = row[5];
  const int64_t end = row[6];
  const bool aligned = (row[7] & kAligned) != 0;
  const float t = *a.step + 1.0f;
  const AdamWRates rates =
      adamw_rates(t, *a.learning_rate, *a.grad_divisor, a.log_beta1, a.log_beta2, a.weight1, a.weight2, a.eps,
                  (row[7] & kDecayed) != 0 ? a.weight_decay : 0.0f);
  const int length = static_cast<int>(end - start < a.chunk ? end - start : a.chunk);
  for (int offset = threadIdx.x * kVector; offset < length; offset += kAdamWThreads * kVector) {
    const int64_t e = start + offset;
    if (aligned && e >= first && e + kVector <= end) {
      update_vector<G, C>(at, e, rates);
    } else {
      for (int64_t each = e < first ? first : e; each < e + kVector && each < end; ++each) {
        update_element<G, C>(at, each, rates);
      }
    }
  }
  __syncthreads();  // every thread of the block has read the step
  if (threadIdx.x == 0) {
    __threadfence();  // these reads come before the ticket: atomicAdd alone orders nothing
    if (atomicAdd(a.ticket, 1) == static_cast<int>(gridDim.x) - 1) {
      __threadfence();
      *a.step = t;  // the last block of all
      *a.ticket = 0;
    }
  }
}

template <typename G>
void launch_with_gradient(const AdamW& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(a.num_chunks);
  with_type(a.copy_dtype == kNone ? kFloat32 : a.copy_dtype, [&](auto copy) {
    adamw_kernel<G, decltype(copy)><<<blocks, kAdamWThreads, 0, stream>>>(a);
  });
}

}  // namespace

void launch(const AdamW& a, int device, cudaStream_t stream) {
  check(a);
  check_cuda(cudaSetDevice(device), "AdamW on GPU ", device);
  with_type(a.grad_dtype, [&](auto type) { launch_with_gradient<decltype(type)>(a, stream); });
  check_cuda(cudaGetLastError(), "AdamW over ", a.num_chunks, " chunks of ", a.chunk, " elements on GPU ", device);
}

// The load of any kernel of this build tells whether a GPU and its driver can run them all.
void check_runs(int device) {
  check_cuda(cudaSetDevice(device), "GPU ", device);
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, adamw_kernel<float, float>), "the compiled kernels on GPU ", device);
}

}  // namespace megallm
