// RMSNorm over rows of up to 16384 elements, with or without adding a residual first.
//
// A group of threads holds a row in registers; every element is read and written once.
// Bytes per element of a 2-byte dtype: 4 (8 with the addition).
#include "rms_norm.cuh"

namespace megallm {
namespace {

constexpr int kEarlyWeightBytes = 32;  // of a thread

// Blocks of 512 threads: two on a multiprocessor, but for the longest rows of fp32, which do not fit into 64 registers.
template <int kVector, int kPerThread>
constexpr int kMinBlocks = kVector == 1 || kPerThread == 8 ? 1 : 2;

template <typename T, typename W, int kVector, int kPerThread>
__global__ void __launch_bounds__(kMaxThreads<kVector, kPerThread>, kMinBlocks<kVector, kPerThread>)
    rms_norm_forward_kernel(const NormForward a, int threads_per_row) {
  constexpr int kWarps = kMaxThreads<kVector, kPerThread> / 32;
  __shared__ float scratch[2][kMaxWarps];
  const int rows_per_block = blockDim.x / threads_per_row;
  const int lane = threadIdx.x % threads_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  const bool is_row = row < a.rows;
  const int hidden = static_cast<int>(a.hidden);
  Vector<T, kVector> held[kPerThread];
  if (is_row) {
    read_row(static_cast<const T*>(a.x) + row_offset(a.x_rows, row), lane, threads_per_row, hidden, held);
  }
  if (a.residual != nullptr && is_row) {
    const T* residual = static_cast<const T*>(a.residual) + row_offset(a.residual_rows, row);
    T* sum = static_cast<T*>(a.new_residual) + row * a.hidden;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int column = (k * threads_per_row + lane) * kVector;
      if (is_inside<kVector, kPerThread>(k, column, hidden)) {
        const auto added = load<kVector>(residual + column);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          held[k].item[i] = narrow<T>(widen(held[k].item[i]) + widen(added.item[i]));
        }
        store<kVector>(sum + column, held[k]);
      }
    }
  }
  const W* weights = static_cast<const W*>(a.weight);
  constexpr bool kEarly = kVector > 1 && kVector * kPerThread * sizeof(W) <= kEarlyWeightBytes;
  Vector<W, kVector> early[kEarly ? kPerThread : 1];  // on its way during the sum
  if constexpr (kEarly) read_row(weights, lane, threads_per_row, hidden, early);
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (is_row && is_inside<kVector, kPerThread>(k, (k * threads_per_row + lane) * kVector, hidden)) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares += widen(held[k].item[i]) * widen(held[k].item[i]);
    }
  }
  const float sum = group_sum<kWarps>(squares, threads_per_row, scratch, 0);
  const float rstd = rms_norm_rstd(sum, a.inverse_hidden, a.eps);
  if (!is_row) return;
  if (lane == 0) a.rstd[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * a.hidden;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int column = (k * threads_per_row + lane) * kVector;
    if (is_inside<kVector, kPerThread>(k, column, hidden)) {
      const auto weight = kEarly ? early[kEarly ? k : 0] : load<kVector>(weights + column);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        held[k].item[i] = narrow<T>(rms_norm_value(widen(held[k].item[i]), rstd, widen(weight.item[i])));
      }
      store<kVector>(y + column, held[k]);
    }
  }
}

}  // namespace

void launch(const NormForward& a, int device, cudaStream_t stream) {
  check(a);
  const NormShape shape = norm_shape(a);
  const int64_t blocks = ceil_div(a.rows, shape.rows_per_block);
  check_size("blocks of RMSNorm", blocks, INT32_MAX);
  check_cuda(cudaSetDevice(device), "RMSNorm on GPU ", device);
  with_shape(shape, a.dtype, a.weight_dtype, [&]<typename T, typename W, int kVector, int kPerThread>() {
    rms_norm_forward_kernel<T, W, kVector, kPerThread>
        <<<static_cast<unsigned>(blocks), shape.threads_per_row * shape.rows_per_block, 0, stream>>>(
            a, shape.threads_per_row);
  });
  check_cuda(cudaGetLastError(), "RMSNorm of ", a.rows, " rows x ", a.hidden, " elements on GPU ", device);
}

}  // namespace megallm
