// How each operation is cut into blocks and threads: pure functions of its arguments.
#pragma once

#include <algorithm>

#include "arguments.h"

namespace megallm {

constexpr int kVectorBytes = 16;
constexpr int kSmallBlock = 128;  // threads; short rows share such a block

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether every row begins at a multiple of 16 bytes.
inline bool rows_aligned(const void* pointer, const Rows& rows, int vector) {
  return pointer == nullptr || (is_aligned(pointer, kVectorBytes) && rows.outer % vector == 0 &&
                                (rows.inner_rows == 1 || rows.inner % vector == 0));
}

struct NormShape {
  int vector;          // elements an access: 16 bytes of them, or 1
  int per_thread;      // accesses a thread and row
  int threads_per_row; // a multiple of 32
  int rows_per_block;  // 1, 2 or 4
};

// Vectors: at most 512 threads, which hold the usual rows with two accesses each; every thread's accesses but the last
// lie inside the row. One by one: 16 accesses a thread.
inline NormShape norm_shape(int64_t hidden, int dtype, bool aligned) {
  NormShape shape{};
  shape.vector = aligned && hidden % (kVectorBytes / element_size(dtype)) == 0 ? kVectorBytes / element_size(dtype) : 1;
  const int64_t vectors = hidden / shape.vector;
  shape.per_thread = shape.vector == 1 ? 16 : vectors <= 256 ? 1 : vectors <= 1024 ? 2 : vectors <= 2048 ? 4 : 8;
  const int64_t threads = ceil_div(ceil_div(vectors, shape.per_thread), 32) * 32;
  shape.threads_per_row = static_cast<int>(threads == 96 ? 128 : threads);
  shape.rows_per_block = std::max(kSmallBlock / shape.threads_per_row, 1);
  return shape;
}

inline NormShape norm_shape(const NormForward& a) {
  const int vector = kVectorBytes / element_size(a.dtype);
  const bool aligned = rows_aligned(a.x, a.x_rows, vector) && rows_aligned(a.residual, a.residual_rows, vector) &&
                       is_aligned(a.weight, kVectorBytes) && is_aligned(a.y, kVectorBytes) &&
                       is_aligned(a.new_residual, kVectorBytes);
  return norm_shape(a.hidden, a.dtype, aligned);
}

inline NormShape norm_shape(const NormBackward& a) {
  const int vector = kVectorBytes / element_size(a.dtype);
  const bool aligned = rows_aligned(a.x, a.x_rows, vector) && rows_aligned(a.dy, a.dy_rows, vector) &&
                       rows_aligned(a.dnew_residual, a.dnew_residual_rows, vector) &&
                       is_aligned(a.weight, kVectorBytes) && is_aligned(a.dx, kVectorBytes) &&
                       is_aligned(a.partial, kVectorBytes);
  return norm_shape(a.hidden, a.dtype, aligned);
}

// Rows of sums that the backward writes: one for each group of threads that `blocks` a multiprocessor make, in fours.
inline int64_t norm_partials(int64_t rows, const NormShape& shape, int num_multiprocessors, int blocks) {
  check_size("rows", rows);
  check_size("num_multiprocessors", num_multiprocessors);
  const int64_t groups = int64_t{num_multiprocessors} * std::max(blocks, 1) * shape.rows_per_block;
  return ceil_div(std::min(groups, rows), 4) * 4;
}

// Blocks of the backward that a multiprocessor of 65536 registers runs at a time, where CUDA cannot be asked: threads
// of one access a row have up to 64 registers, others up to 128.
inline int estimated_blocks(const NormShape& shape) {
  return (shape.per_thread == 1 ? 1024 : 512) / (shape.threads_per_row * shape.rows_per_block);
}

struct RopeShape {
  int vector;   // pairs an access
  int pairs;    // threads along the pairs
  int heads;    // threads along the heads
  int tokens;   // threads along the tokens
  int64_t grid; // blocks
};

inline RopeShape rope_shape(const Rope& a) {
  const int vector = kVectorBytes / element_size(a.dtype);
  const bool aligned = a.half % vector == 0 && a.token_stride % vector == 0 && a.head_stride % vector == 0 &&
                       a.out_token_stride % vector == 0 && a.out_head_stride % vector == 0 &&
                       is_aligned(a.x, kVectorBytes) && is_aligned(a.out, kVectorBytes) &&
                       is_aligned(a.cosine, kVectorBytes) && is_aligned(a.sine, kVectorBytes);
  constexpr int64_t threads = 256;
  RopeShape shape{};
  shape.vector = aligned ? vector : 1;
  shape.pairs = static_cast<int>(std::min(a.half / shape.vector, threads));
  const int64_t rounds = ceil_div(a.heads, threads / shape.pairs);  // equal ones: 40 heads are 2 x 20, not 32 + 8
  shape.heads = static_cast<int>(ceil_div(a.heads, rounds));
  shape.tokens = static_cast<int>(std::min({a.tokens, threads / (shape.pairs * shape.heads), int64_t{64}}));
  shape.grid = ceil_div(a.tokens, shape.tokens);
  if (shape.grid > INT32_MAX) refuse("rope of ", a.tokens, " tokens takes more than 2^31 blocks: split the tensor");
  return shape;
}

constexpr int kAdamWThreads = 256;
constexpr int kAdamWVector = 4;

}  // namespace megallm
