// Backward of RMSNorm: a fixed number of groups of threads walk over the rows.
//
// Each group keeps its sums for the weight's gradient in registers and writes them once; a second kernel adds them in a
// fixed order: no atomics, so the result does not depend on timing.
// Bytes per element of a 2-byte dtype: 6 (8 with dnew_residual).
#include "rms_norm.cuh"

namespace megallm {
namespace {

constexpr int kColumns = 32;  // of a block of the second kernel
constexpr int kLanes = 16;    // rows it reads at a time

template <typename T, int kVector, int kPerThread>
__global__ void __launch_bounds__(kMaxThreads<kVector, kPerThread>)
    rms_norm_backward_kernel(const NormBackward a, int threads_per_row) {
  // Whether x and dy stay in registers between the two passes over a row; long rows take them from the cache again.
  constexpr bool kHolds = kPerThread <= 2;
  __shared__ float scratch[kMaxWarps];
  const int rows_per_block = blockDim.x / threads_per_row;
  const int lane = threadIdx.x % threads_per_row;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const int hidden = static_cast<int>(a.hidden);
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
        if (is_row && column < hidden) {
          xs[k] = load<kVector>(x + column);
          dys[k] = load<kVector>(dy + column);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int column = (k * threads_per_row + lane) * kVector;
      const int at = kHolds ? k : 0;
      if (is_row && column < hidden) {
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
      if (column < hidden) {
        if constexpr (!kHolds) {
          xs[at] = load<kVector>(x + column);
          dys[at] = load<kVector>(dy + column);
        }
        float weight[kVector];
        read_weight<T, kVector>(a.weight, a.weight_dtype, column, weight);
        Vector<T, kVector> out;
        if (a.dnew_residual != nullptr) {
          out = load<kVector>(static_cast<const T*>(a.dnew_residual) + row_offset(a.dnew_residual_rows, row) + column);
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float ds = rms_norm_gradient(widen(dys[at].item[i]), weight[i], widen(xs[at].item[i]), rstd, mean);
          out.item[i] = narrow<T>(a.dnew_residual != nullptr ? ds + widen(out.item[i]) : ds);
        }
        store<kVector>(dx + column, out);
      }
    }
  }
  if (a.partial == nullptr) return;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int column = (k * threads_per_row + lane) * kVector;
    if (column < hidden) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        store<4>(a.partial + group * a.hidden + column + i,
                 Vector<float, 4>{sums[k][i], sums[k][i + 1], sums[k][i + 2], sums[k][i + 3]});
      }
    }
  }
}

// The same for rows that are not aligned, one element after another; the sums are kept in `partial` itself.
template <typename T>
__global__ void __launch_bounds__(1024) rms_norm_backward_unaligned_kernel(const NormBackward a, int threads_per_row) {
  __shared__ float scratch[kMaxWarps];
  const int rows_per_block = blockDim.x / threads_per_row;
  const int lane = threadIdx.x % threads_per_row;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const int hidden = static_cast<int>(a.hidden);
  float* sums = a.partial == nullptr ? nullptr : a.partial + group * a.hidden;
  if (sums != nullptr) {
    for (int column = lane; column < hidden; column += threads_per_row) sums[column] = 0.0f;
  }
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * rows_per_block; base < a.rows; base += groups) {
    const int64_t row = base + threadIdx.x / threads_per_row;
    const bool is_row = row < a.rows;
    const T* x = static_cast<const T*>(a.x) + (is_row ? row_offset(a.x_rows, row) : 0);
    const T* dy = static_cast<const T*>(a.dy) + (is_row ? row_offset(a.dy_rows, row) : 0);
    const float rstd = is_row ? a.rstd[row] : 0.0f;
    float products = 0.0f;
    for (int column = lane; is_row && column < hidden; column += threads_per_row) {
      float weight;
      read_weight<T, 1>(a.weight, a.weight_dtype, column, &weight);
      const float product = widen(dy[column]) * (widen(x[column]) * rstd);
      products += product * weight;
      if (sums != nullptr) sums[column] += product;
    }
    const float mean = group_sum(products, threads_per_row, scratch) / static_cast<float>(a.hidden);
    for (int column = lane; is_row && column < hidden; column += threads_per_row) {
      float weight;
      read_weight<T, 1>(a.weight, a.weight_dtype, column, &weight);
      float ds = rms_norm_gradient(widen(dy[column]), weight, widen(x[column]), rstd, mean);
      if (a.dnew_residual != nullptr) {
        ds += widen((static_cast<const T*>(a.dnew_residual) + row_offset(a.dnew_residual_rows, row))[column]);
      }
      (static_cast<T*>(a.dx) + row * a.hidden)[column] = narrow<T>(ds);
    }
  }
}

// dweight = the sum of the rows of partial, in a fixed order.
template <typename W>
__global__ void __launch_bounds__(kColumns* kLanes)
    rms_norm_sum_kernel(const float* partial, W* dweight, int64_t rows, int64_t hidden) {
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

}  // namespace

void launch(const NormBackward& a, int device, cudaStream_t stream) {
  check(a);
  const NormShape shape = norm_shape(a);
  const auto blocks = static_cast<unsigned>(a.num_partials / shape.rows_per_block);
  check_cuda(cudaSetDevice(device), "backward of RMSNorm on GPU ", device);
  with_shape(shape, a.dtype, [&]<typename T, int kVector, int kPerThread>() {
    const int threads = shape.threads_per_row * shape.rows_per_block;
    if constexpr (kVector == 1) {
      rms_norm_backward_unaligned_kernel<T><<<blocks, threads, 0, stream>>>(a, shape.threads_per_row);
    } else {
      rms_norm_backward_kernel<T, kVector, kPerThread><<<blocks, threads, 0, stream>>>(a, shape.threads_per_row);
    }
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
