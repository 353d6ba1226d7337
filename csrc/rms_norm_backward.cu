// Backward of RMSNorm: a fixed number of groups of threads walk over the rows.
//
// While a group adds up one row, its next one is on the way (but for the longest). Each group keeps its sums for the
// weight's gradient in registers and writes them once; a second kernel adds them in a fixed order: no atomics, so the
// result does not depend on timing.
// Bytes per element of a 2-byte dtype: 6 (8 with dnew_residual).
#include "rms_norm.cuh"

namespace megallm {
namespace {

constexpr int kColumns = 8;  // of a block of the second kernel: 32 bytes of a row of sums
constexpr int kLanes = 64;   // rows it reads at a time

// Keeps the two-byte elements as they are, where the compiler would keep them widened, in twice the registers.
template <typename T, int kVector>
__device__ void stay_narrow(Vector<T, kVector>& value) {
  if constexpr (sizeof(T) == 2) {
    auto& words = reinterpret_cast<uint32_t(&)[kVector / 2]>(value);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) asm("" : "+r"(words[i]));
  }
}

// What a thread has of one row.
template <typename T, int kVector, int kPerThread>
struct Row {
  Vector<T, kVector> x[kPerThread];
  Vector<T, kVector> dy[kPerThread];
  float rstd;

  __device__ void read(const NormBackward& a, int64_t row, int lane, int threads_per_row) {
    const int hidden = static_cast<int>(a.hidden);
    read_row(static_cast<const T*>(a.x) + row_offset(a.x_rows, row), lane, threads_per_row, hidden, x);
    read_row(static_cast<const T*>(a.dy) + row_offset(a.dy_rows, row), lane, threads_per_row, hidden, dy);
    rstd = a.rstd[row];
  }
};

// Elements of a row that a thread may hold, in bytes of registers: as much again is on its way for the next row.
template <typename T, int kVector, int kPerThread>
constexpr bool kReadsAhead = 2 * kVector * kPerThread * sizeof(T) <= 64;

template <typename T, typename W, int kVector, int kPerThread>
__global__ void __launch_bounds__(kMaxThreads<kVector, kPerThread>)
    rms_norm_backward_kernel(const NormBackward a, int threads_per_row) {
  constexpr bool kAhead = kReadsAhead<T, kVector, kPerThread>;
  constexpr int kWarps = kMaxThreads<kVector, kPerThread> / 32;
  __shared__ float scratch[2][kMaxWarps];
  const int rows_per_block = blockDim.x / threads_per_row;
  const int lane = threadIdx.x % threads_per_row;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const int hidden = static_cast<int>(a.hidden);
  const W* weights = static_cast<const W*>(a.weight);
  float sums[kPerThread][kVector] = {};
  Row<T, kVector, kPerThread> held;
  if (kAhead && group < a.rows) held.read(a, group, lane, threads_per_row);
  int turn = 0;
  int64_t row = group;
  for (int64_t base = group - threadIdx.x / threads_per_row; base < a.rows; base += groups, row += groups, turn ^= 1) {
    const bool is_row = row < a.rows;  // the same number of turns for the whole block
    if (!kAhead && is_row) held.read(a, row, lane, threads_per_row);
    float products = 0.0f;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int column = (k * threads_per_row + lane) * kVector;
      if (is_row && is_inside<kVector, kPerThread>(k, column, hidden)) {
        const auto weight = load<kVector>(weights + column);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float product = widen(held.dy[k].item[i]) * widen(held.x[k].item[i]);
          sums[k][i] += product * held.rstd;
          products += product * widen(weight.item[i]);
        }
      }
      stay_narrow(held.x[k]);
      stay_narrow(held.dy[k]);
    }
    Row<T, kVector, kPerThread> next;
    if (kAhead && row + groups < a.rows) next.read(a, row + groups, lane, threads_per_row);
    const T* added = static_cast<const T*>(a.dnew_residual);
    if (added != nullptr && is_row) added += row_offset(a.dnew_residual_rows, row);
    products = group_sum<kWarps>(products, threads_per_row, scratch, turn);
    const float pull = rms_norm_pull(products, held.rstd, a.inverse_hidden);
    T* dx = static_cast<T*>(a.dx) + row * a.hidden;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int column = (k * threads_per_row + lane) * kVector;
      if (is_row && is_inside<kVector, kPerThread>(k, column, hidden)) {
        const auto weight = load<kVector>(weights + column);
        Vector<T, kVector> out{};
        if (added != nullptr) out = load<kVector>(added + column);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float ds = rms_norm_gradient(widen(held.dy[k].item[i]), widen(weight.item[i]), widen(held.x[k].item[i]),
                                             held.rstd, pull);
          out.item[i] = narrow<T>(ds + widen(out.item[i]));
        }
        store<kVector>(dx + column, out);
      }
    }
    if constexpr (kAhead) held = next;
  }
  if (a.partial == nullptr) return;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int column = (k * threads_per_row + lane) * kVector;
    if (is_inside<kVector, kPerThread>(k, column, hidden)) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        store<4>(a.partial + group * a.hidden + column + i,
                 Vector<float, 4>{sums[k][i], sums[k][i + 1], sums[k][i + 2], sums[k][i + 3]});
      }
    }
  }
}

// The same for rows that are not aligned, one element after another; the sums are kept in `partial` itself.
template <typename T, typename W>
__global__ void __launch_bounds__(1024) rms_norm_backward_unaligned_kernel(const NormBackward a, int threads_per_row) {
  __shared__ float scratch[2][kMaxWarps];
  const W* weights = static_cast<const W*>(a.weight);
  int turn = 0;
  const int rows_per_block = blockDim.x / threads_per_row;
  const int lane = threadIdx.x % threads_per_row;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / threads_per_row;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * rows_per_block;
  const int hidden = static_cast<int>(a.hidden);
  float* sums = a.partial == nullptr ? nullptr : a.partial + group * a.hidden;
  if (sums != nullptr) {
    for (int column = lane; column < hidden; column += threads_per_row) sums[column] = 0.0f;
  }
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * rows_per_block; base < a.rows;
       base += groups, turn ^= 1) {
    const int64_t row = base + threadIdx.x / threads_per_row;
    const bool is_row = row < a.rows;
    const T* x = static_cast<const T*>(a.x) + (is_row ? row_offset(a.x_rows, row) : 0);
    const T* dy = static_cast<const T*>(a.dy) + (is_row ? row_offset(a.dy_rows, row) : 0);
    const float rstd = is_row ? a.rstd[row] : 0.0f;
    const T* added = static_cast<const T*>(a.dnew_residual);
    if (added != nullptr && is_row) added += row_offset(a.dnew_residual_rows, row);
    float products = 0.0f;
    for (int column = lane; is_row && column < hidden; column += threads_per_row) {
      const float product = widen(dy[column]) * widen(x[column]);
      products += product * widen(weights[column]);
      if (sums != nullptr) sums[column] += product * rstd;
    }
    products = group_sum<kMaxWarps>(products, threads_per_row, scratch, turn);
    const float pull = rms_norm_pull(products, rstd, a.inverse_hidden);
    for (int column = lane; is_row && column < hidden; column += threads_per_row) {
      float ds = rms_norm_gradient(widen(dy[column]), widen(weights[column]), widen(x[column]), rstd, pull);
      if (added != nullptr) ds += widen(added[column]);
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
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kLanes) sum += partial[row * hidden + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    __syncthreads();
    if (threadIdx.y < lanes) sums[threadIdx.y][threadIdx.x] = sum += sums[threadIdx.y + lanes][threadIdx.x];
  }
  if (threadIdx.y == 0 && column < hidden) dweight[column] = narrow<W>(sum);
}

}  // namespace

int64_t norm_partials(int64_t rows, int64_t hidden, int dtype, int weight_dtype, int num_multiprocessors, int device) {
  check_size("hidden", hidden, kMaxHidden);
  check_weight_dtype(dtype, weight_dtype);
  const NormShape shape = norm_shape(hidden, dtype, true);
  int blocks = estimated_blocks(shape);
  if (device >= 0) {
    const int threads = shape.threads_per_row * shape.rows_per_block;
    check_cuda(cudaSetDevice(device), "backward of RMSNorm on GPU ", device);
    with_shape(shape, dtype, weight_dtype, [&]<typename T, typename W, int kVector, int kPerThread>() {
      const void* kernel = nullptr;
      if constexpr (kVector == 1) {
        kernel = reinterpret_cast<const void*>(rms_norm_backward_unaligned_kernel<T, W>);
      } else {
        kernel = reinterpret_cast<const void*>(rms_norm_backward_kernel<T, W, kVector, kPerThread>);
      }
      check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0),
                 "backward of RMSNorm of rows of ", hidden, " elements on GPU ", device);
    });
  }
  return norm_partials(rows, shape, num_multiprocessors, blocks);
}

void launch(const NormBackward& a, int device, cudaStream_t stream) {
  check(a);
  const NormShape shape = norm_shape(a);
  const auto blocks = static_cast<unsigned>(a.num_partials / shape.rows_per_block);
  check_cuda(cudaSetDevice(device), "backward of RMSNorm on GPU ", device);
  with_shape(shape, a.dtype, a.weight_dtype, [&]<typename T, typename W, int kVector, int kPerThread>() {
    const int threads = shape.threads_per_row * shape.rows_per_block;
    if constexpr (kVector == 1) {
      rms_norm_backward_unaligned_kernel<T, W><<<blocks, threads, 0, stream>>>(a, shape.threads_per_row);
    } else {
      rms_norm_backward_kernel<T, W, kVector, kPerThread><<<blocks, threads, 0, stream>>>(a, shape.threads_per_row);
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
