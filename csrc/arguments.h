// What each operation is given, and the checks of it: plain C++, the same for the GPU and the CPU.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "maths.h"

namespace megallm {

constexpr int kFloat32 = 0;
constexpr int kFloat16 = 1;
constexpr int kBFloat16 = 2;
constexpr int kNone = -1;  // no tensor of that kind

constexpr int64_t kMaxHidden = 16384;  // one block's registers hold a row
constexpr int kTableColumns = 8;       // param, grad, exp_avg, exp_avg_sq, copy, first element, end, flags
constexpr int kDecayed = 1;            // flags
constexpr int kAligned = 2;

// y, and new_residual = x + residual where there is a residual, from rows of `hidden` elements.
struct NormForward {
  const void* x;
  const void* residual;  // may be null
  const void* weight;    // [hidden]
  void* y;               // [rows, hidden] contiguous
  void* new_residual;    // the same; null without a residual
  float* rstd;           // [rows]
  int64_t rows;
  int64_t hidden;
  Rows x_rows;
  Rows residual_rows;
  float eps;
  float inverse_hidden;
  int dtype;         // of x, residual, y, new_residual
  int weight_dtype;  // dtype, or fp32
};

// dx, and one row of sums of dy u for each group of threads.
struct NormBackward {
  const void* dy;
  const void* x;              // what was normalised
  const void* weight;         // [hidden]
  const float* rstd;          // [rows]
  const void* dnew_residual;  // may be null; is added to dx
  void* dx;                   // [rows, hidden] contiguous
  float* partial;             // [num_partials, hidden]; null: no gradient of the weight
  void* dweight;              // [hidden], in weight_dtype; null without partial
  int64_t rows;
  int64_t hidden;
  Rows x_rows;
  Rows dy_rows;
  Rows dnew_residual_rows;
  int64_t num_partials;  // a multiple of 4
  float inverse_hidden;
  int dtype;
  int weight_dtype;
};

// Turns the first 2 half elements of each head of x [tokens, heads, D] and writes them to out, which may be x.
struct Rope {
  const void* x;
  void* out;
  const float* cosine;  // [rows, half]
  const float* sine;
  const int64_t* positions;   // [tokens], or null
  const int32_t* cu_seqlens;  // [documents + 1], or null
  int64_t tokens;
  int64_t heads;
  int64_t half;
  int64_t rows;  // of the tables; tokens that ask for another row become NaN
  int64_t documents;
  int64_t token_stride;
  int64_t head_stride;
  int64_t out_token_stride;
  int64_t out_head_stride;
  int dtype;
  bool conjugate;  // the opposite angle
};

// Updates the tensors of a table [n, kTableColumns], chunk by chunk; see kernels/megallm_kernels/adamw.py.
struct AdamW {
  const int64_t* table;
  const int32_t* chunks;  // [num_chunks, 2]: tensor, number of the chunk in it
  int32_t* ticket;        // 0 between launches
  float* step;            // updates done so far
  const float* learning_rate;
  const float* grad_divisor;
  const float* is_bad;
  int64_t num_chunks;
  int64_t chunk;  // elements, a multiple of 4
  float log_beta1;
  float log_beta2;
  float weight1;
  float weight2;
  float eps;
  float weight_decay;
  int grad_dtype;
  int copy_dtype;  // kNone: no copies
};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline void check_pointer(const char* name, const void* pointer) {
  if (pointer == nullptr) refuse(name, " is a null pointer");
}

inline void check_size(const char* name, int64_t size, int64_t most = INT64_MAX) {
  if (size < 1) refuse(name, " is ", size, ", it must be at least 1: nothing is launched for an empty tensor");
  if (size > most) refuse(name, " is ", size, ", it must be at most ", most);
}

inline int element_size(int dtype) {
  if (dtype == kFloat32) return 4;
  if (dtype == kFloat16 || dtype == kBFloat16) return 2;
  refuse("dtype code ", dtype, " is none of 0 (fp32), 1 (fp16), 2 (bf16)");
}

inline void check_weight_dtype(int dtype, int weight_dtype) {
  element_size(dtype);
  element_size(weight_dtype);
  if (weight_dtype != dtype && weight_dtype != kFloat32) {
    refuse("the weight's dtype code ", weight_dtype, " is neither that of x (", dtype, ") nor 0 (fp32)");
  }
}

inline void check(const NormForward& a) {
  check_pointer("x", a.x);
  check_pointer("weight", a.weight);
  check_pointer("y", a.y);
  check_pointer("rstd", a.rstd);
  if ((a.residual == nullptr) != (a.new_residual == nullptr)) refuse("residual and new_residual go together");
  check_size("rows", a.rows);
  check_size("hidden", a.hidden, kMaxHidden);
  check_size("inner rows of x", a.x_rows.inner_rows);
  if (a.residual != nullptr) check_size("inner rows of residual", a.residual_rows.inner_rows);
  check_weight_dtype(a.dtype, a.weight_dtype);
}

inline void check(const NormBackward& a) {
  check_pointer("dy", a.dy);
  check_pointer("x", a.x);
  check_pointer("weight", a.weight);
  check_pointer("rstd", a.rstd);
  check_pointer("dx", a.dx);
  if ((a.partial == nullptr) != (a.dweight == nullptr)) refuse("partial and dweight go together");
  check_size("rows", a.rows);
  check_size("hidden", a.hidden, kMaxHidden);
  check_size("inner rows of x", a.x_rows.inner_rows);
  check_size("inner rows of dy", a.dy_rows.inner_rows);
  if (a.dnew_residual != nullptr) check_size("inner rows of dnew_residual", a.dnew_residual_rows.inner_rows);
  check_size("num_partials", a.num_partials, int64_t{1} << 30);
  if (a.num_partials % 4 != 0) refuse("num_partials is ", a.num_partials, ", it must be a multiple of 4");
  check_weight_dtype(a.dtype, a.weight_dtype);
}

inline void check(const Rope& a) {
  check_pointer("x", a.x);
  check_pointer("out", a.out);
  check_pointer("cos", a.cosine);
  check_pointer("sin", a.sine);
  if (a.positions != nullptr && a.cu_seqlens != nullptr) refuse("rope takes positions or cu_seqlens, not both");
  if (a.cu_seqlens != nullptr) check_size("documents", a.documents);
  check_size("tokens", a.tokens);
  check_size("heads", a.heads);
  check_size("half of the rotary dim", a.half);
  check_size("rows of the tables", a.rows);
  element_size(a.dtype);
}

inline void check(const AdamW& a) {
  check_pointer("table", a.table);
  check_pointer("chunks", a.chunks);
  check_pointer("ticket", a.ticket);
  check_pointer("step", a.step);
  check_pointer("learning_rate", a.learning_rate);
  check_pointer("grad_divisor", a.grad_divisor);
  check_pointer("is_bad", a.is_bad);
  check_size("num_chunks", a.num_chunks, INT32_MAX);
  check_size("chunk", a.chunk, int64_t{1} << 30);
  if (a.chunk % 4 != 0) refuse("chunk is ", a.chunk, ", it must be a multiple of 4");
  element_size(a.grad_dtype);
  if (a.copy_dtype != kNone && element_size(a.copy_dtype) != 2) refuse("copies must be fp16 or bf16");
}

}  // namespace megallm
