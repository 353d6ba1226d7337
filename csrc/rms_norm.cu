// RMSNorm over rows of up to 16384 elements, forward (with or without adding a residual first) and backward.
//
// Forward: a group of threads holds a row in registers; every element is read and written once. Backward: a fixed number
// of groups walk over the rows; each keeps its sums for the weight's gradient in registers and writes them once, a second
// kernel adds the groups' sums in a fixed order: no atomics, so the result does not depend on timing.
// Bytes per element of a 2-byte dtype: forward 4 (8 with the addition), backward 6 (8 with dnew_residual).
#include "launch.h"
#include "launch_shape.h"

namespace megallm {
namespace {

constexpr int kMaxWarps = 32;
constexpr int kColumns = 32;  // of a block of the second kernel
constexpr int kLanes = 16;    // rows it reads at a time

// Threads of the largest block: 16-byte vectors of 2-byte elements hold a row in half as many.
template <int kVector>
constexpr int kMaxThreads = kVector == 8 ? 512 : 1024;

// The sum over a group of threads_per_row threads, a multiple of 32, for each of them. `scratch`: one number a warp.
__device__ float group_sum(float value, int threads_per_row, float* scratch) {
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

template <typename T, int kVector, int kPerThread>
__global__ void __launch_bounds__(kMaxThreads<kVector>) rms_norm_forward_kernel(const NormForward a, int threads_per_row) {
  __shared__ float scratch[kMaxWarps];
  const int rows_per_block = blockDim.x / threads_per_row;
  const int lane = threadIdx.x % threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  const bool is_row = row < a.rows;
  const T* x = static_cast<const T*>(a.x) + (is_row ? row_offset(a.x_rows, row) : 0);
  Vector<T, kVector> held[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int column = (k * threads_per_row + lane) * kVector;
    if (is_row && column < a.hidden) held[k] = load<kVector>(x + column);
  }
  if (a.residual != nullptr && is_row) {
    const T* residual = static_cast<const T*>(a.residual) + row_offset(a.residual_rows, row);
    T* sum = static_cast<T*>(a.new_residual) + row * a.hidden;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int column = (k * threads_per_row + lane) * kVector;
      if (column < a.hidden) {
        const auto added = load<kVector>(residual + column);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          held[k].item[i] = narrow<T>(widen(held[k].item[i]) + widen(added.item[i]));
        }
        store<kVector>(sum + column, held[k]);
      }
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (is_row && (k * threads_per_row + lane) * kVector < a.hidden) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares += widen(held[k].item[i]) * widen(held[k].item[i]);
    }
  }
  const float rstd = rms_norm_rstd(group_sum(squares, threads_per_row, scratch), a.hidden, a.eps);
  if (!is_row) return;
  if (lane == 0) a.rstd[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * a.hidden;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int column = (k * threads_per_row + lane) * kVector;
    if (column < a.hidden) {
      float weight[kVector];
      read_weight<T, kVector>(a.weight, a.weight_dtype, column, weight);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        held[k].item[i] = narrow<T>(rms_norm_value(widen(held[k].item[i]), rstd, weight[i]));
      }
      store<kVector>(y + column, held[k]);
    }
  }
}

template <typename T, int kVector, int kPerThread>
__global__ void __launch_bounds__(kMaxThreads<kVector>) rms_norm_backward_kernel(const NormBackward a, int threads_per_row) {
  // Whether x and dy stay in registers between the two passes over a row; long rows take them from the cache again.
  constexpr bool kHolds = kVector > 1 && kPerThread * kVector * sizeof(T) <= (sizeof(T) == 2 ? 64 : 32);
  __shared__ float scratch[kMaxWarps];
  const int rows_per_block = blockDim.x / threads_per_row;
  const int lane = threadIdx.x % threads_per_row;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * rows_per_block;
  float sums[kPerThread][kVector] = {};
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * rows_per_block; base < a.rows; base += groups) {
    const int64_t row = base + threadIdx.x / threads_per_row;  // the same number of turns for the whole block
    const bool is_row = row < a.rows;
    const T* x = static_cast<const T*>(a.x) + (is_row ? row_offset(a.x_rows, row) : 0);
    const T* dy = static_cast<const T*>(a.dy) + (is_row ? row_offset(a.dy_rows, row) : 0);
    const float rstd = is_row ? a.rstd[row] : 0.0f;
    Vector<T, kVector> xs[kHolds ? kPerThread : 1];
    Vector<T, kVector> dys[kHolds ? kPerThread : 1];
    float products = 0.0f;
    if constexpr (kHolds) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const int column = (k * threads_per_row + lane) * kVector;
        if (is_row && column < a.hidden) {
          xs[k] = load<kVector>(x + column);
          dys[k] = load<kVector>(dy + column);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int column = (k * threads_per_row + lane) * kVector;
      const int at = kHolds ? k : 0;
      if (is_row && column < a.hidden) {
        if constexpr (!kHolds) {
          xs[at] = load<kVector>(x + column);
          dys[at] = load<kVector>(dy + column);
        }
        float weight[kVector];
        read_weight<T, kVector>(a.weight, a.weight_dtype, column, weight);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float product = widen(dys[at].item[i]) * (widen(xs[at].item[i]) * rstd);
          sums[k][i] += product;
          products += product * weight[i];
        }
      }
    }
    const float mean = group_sum(products, threads_per_row, scratch) / static_cast<float>(a.hidden);
    if (!is_row) continue;
    T* dx = static_cast<T*>(a.dx) + row * a.hidden;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int column = (k * threads_per_row + lane) * kVector;
      const int at = kHolds ? k : 0;
      if (column < a.hidden) {
        if constexpr (!kHolds) {
          xs[at] = load<kVector>(x + column);
          dys[at] = load<kVector>(dy + column);
        }
        float weight[kVector];
        read_weight<T, kVector>(a.weight, a.weight_dtype, column, weight);
        Vector<T, kVector> added{};
        if (a.dnew_residual != nullptr) {
          added = load<kVector>(static_cast<const T*>(a.dnew_residual) + row_offset(a.dnew_residual_rows, row) + column);
        }
        Vector<T, kVector> out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float ds = rms_norm_gradient(widen(dys[at].item[i]), weight[i], widen(xs[at].item[i]), rstd, mean);
          out.item[i] = narrow<T>(a.dnew_residual != nullptr ? ds + widen(added.item[i]) : ds);
        }
        store<kVector>(dx + column, out);
      }
    }
  }
  if (a.partial == nullptr) return;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int column = (k * threads_per_row + lane) * kVector;
    if (column < a.hidden) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) a.partial[group * a.hidden + column + i] = sums[k][i];
    }
  }
}

// dweight = the sum of the rows of partial, in a fixed order.
template <typename W>
__global__ void __launch_bounds__(kColumns* kLanes) rms_norm_sum_kernel(const float* partial, W* dweight, int64_t rows, int64_t hidden) {
  __shared__ float sums[kLanes][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.0f;
  if (column < hidden) {
    for (int64_t row = threadIdx.y; row < rows; row += kLanes) sum += partial[row * hidden + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < hidden) {
    for (int lane = 1; lane < kLanes; ++lane) sum += sums[lane][threadIdx.x];
    dweight[column] = narrow<W>(sum);
  }
}

// Calls function<T, vector, per thread> as constants of the shape.
template <typename Function>
void with_shape(const NormShape& shape, int dtype, const Function& function) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVector = kVectorBytes / sizeof(T);
    if (shape.vector == 1) {
      function.template operator()<T, 1, 16>();
    } else if (shape.per_thread == 1) {
      function.template operator()<T, kVector, 1>();
    } else if (shape.per_thread == 2) {
      function.template operator()<T, kVector, 2>();
    } else {
      function.template operator()<T, kVector, 4>();
    }
  });
}

}  // namespace

void launch(const NormForward& a, int device, cudaStream_t stream) {
  check(a);
  const NormShape shape = norm_shape(a);
  const int64_t blocks = ceil_div(a.rows, shape.rows_per_block);
  check_size("blocks of RMSNorm", blocks, INT32_MAX);
  check_cuda(cudaSetDevice(device), "RMSNorm on GPU ", device);
  with_shape(shape, a.dtype, [&]<typename T, int kVector, int kPerThread>() {
    rms_norm_forward_kernel<T, kVector, kPerThread>
        <<<static_cast<unsigned>(blocks), shape.threads_per_row * shape.rows_per_block, 0, stream>>>(a, shape.threads_per_row);
  });
  check_cuda(cudaGetLastError(), "RMSNorm of ", a.rows, " rows x ", a.hidden, " elements on GPU ", device);
}

void launch(const NormBackward& a, int device, cudaStream_t stream) {
  check(a);
  const NormShape shape = norm_shape(a);
  const auto blocks = static_cast<unsigned>(a.num_partials / shape.rows_per_block);
  check_cuda(cudaSetDevice(device), "backward of RMSNorm on GPU ", device);
  with_shape(shape, a.dtype, [&]<typename T, int kVector, int kPerThread>() {
    rms_norm_backward_kernel<T, kVector, kPerThread>
        <<<blocks, shape.threads_per_row * shape.rows_per_block, 0, stream>>>(a, shape.threads_per_row);
  });
  check_cuda(cudaGetLastError(), "backward of RMSNorm of ", a.rows, " rows x ", a.hidden, " elements on GPU ", device);
  if (a.partial == nullptr) return;
  with_type(a.weight_dtype, [&](auto type) {
    using W = decltype(type);
    rms_norm_sum_kernel<W><<<static_cast<unsigned>(ceil_div(a.hidden, kColumns)), dim3(kColumns, kLanes), 0, stream>>>(
        a.partial, static_cast<W*>(a.dweight), a.num_partials, a.hidden);
  });
  check_cuda(cudaGetLastError(), "sum of ", a.num_partials, " rows x ", a.hidden, " elements on GPU ", device);
}

}  // namespace megallm
